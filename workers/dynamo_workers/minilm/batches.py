"""Rows of many requests, computed together: what waits while one batch runs is the next one. No model knowledge."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Row = Sequence[int]
Vectors = NDArray[np.float32]

#: A batch has so many tokens at most, the filling of shorter rows included: more costs memory and gains nothing.
MAX_TOKENS = 4_096


@dataclass(slots=True, eq=False)
class _Asked:
    """A row, and who waits for its vector."""

    row: Row
    answer: asyncio.Future[Vectors]


class Batches:
    """Computes vectors in a thread of its own, one batch after another.

    Args:
        compute: gives a vector for each row.
    """

    def __init__(self, compute: Callable[[Sequence[Row]], Vectors]) -> None:
        self._compute = compute
        self._waiting: deque[list[_Asked]] = deque()  # of each request its rows; the next one begins the next batch
        self._has_more = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="embed")
        self._task = asyncio.ensure_future(self._run())
        self.num_batches = 0

    async def embed(self, rows: Sequence[Row]) -> Vectors:
        """The vectors of rows, in order. One whose caller is cancelled is left out, if it isn't being computed."""
        loop = asyncio.get_running_loop()
        asked = [_Asked(row, loop.create_future()) for row in rows]
        self._waiting.append(asked)
        self._has_more.set()
        try:
            return np.stack([await one.answer for one in asked])
        finally:
            for one in asked:
                one.answer.cancel()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._has_more.wait()
            batch = self._next_batch()
            if not batch:
                self._has_more.clear()
                continue
            self.num_batches += 1
            try:
                vectors = await loop.run_in_executor(self._thread, self._compute, [one.row for one in batch])
            except Exception as error:  # of this batch alone
                for one in batch:
                    if not one.answer.done():
                        one.answer.set_exception(error)
                continue
            for one, vector in zip(batch, vectors, strict=True):
                if not one.answer.done():
                    one.answer.set_result(vector)

    def _next_batch(self) -> list[_Asked]:
        """A row of the request whose turn it is, and as many others of like length as there is room for."""
        left = [[one for one in rows if not one.answer.done()] for rows in self._waiting]
        self._waiting = deque(rows for rows in left if rows)
        if not self._waiting:
            return []
        first = self._waiting[0][0]
        by_length = sorted((one for rows in self._waiting for one in rows), key=lambda one: len(one.row))
        begin = end = by_length.index(first)
        longest = len(first.row)
        while end + 1 < len(by_length) and (end + 2 - begin) * len(by_length[end + 1].row) <= MAX_TOKENS:
            end += 1
            longest = len(by_length[end].row)
        while begin and (end + 2 - begin) * longest <= MAX_TOKENS:
            begin -= 1
        batch = by_length[begin : end + 1]
        taken = set(map(id, batch))
        rest = [[one for one in rows if id(one) not in taken] for rows in self._waiting]
        self._waiting = deque(rows for rows in [*rest[1:], rest[0]] if rows)
        return batch

    async def close(self) -> None:
        """Compute no more."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._thread.shutdown(wait=False, cancel_futures=True)
