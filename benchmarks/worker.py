"""Workers that cost nothing, for measurements: one token at a time, with and without awaiting, or a batch at a time."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from dynamo_grpc import Context, Worker
from dynamo_grpc.v1 import inference_pb2

DELAY_S = float(os.environ.get("BENCH_DELAY_S", "0"))


def token(index: int) -> int:
    """Some token that is no special one."""
    return 1000 + index * 37 % 5000


class _Bench(Worker):
    model_path = Path(os.environ.get("BENCH_MODEL", "model"))
    model_name = "bench"
    context_length = 200_000


class Pacer(_Bench):
    """Waits BENCH_DELAY_S before each token; if that is 0, it never awaits."""

    async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> AsyncIterator[int]:
        for index in range(request.stop_conditions.max_tokens):
            if DELAY_S:
                await asyncio.sleep(DELAY_S)
            yield token(index)


class Yielding(_Bench):
    """Gives the loop a turn before each token."""

    async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> AsyncIterator[int]:
        for index in range(request.stop_conditions.max_tokens):
            await asyncio.sleep(0)
            yield token(index)


class Batcher(_Bench):
    """An engine's loop: each step gives one token to every request there is."""

    async def start(self) -> None:
        self._queues: set[asyncio.Queue[int]] = set()
        self._has_requests = asyncio.Event()
        self._task = asyncio.create_task(self._steps())

    async def _steps(self) -> None:
        for step in range(2**62):
            await self._has_requests.wait()
            await asyncio.sleep(DELAY_S)
            for queue in self._queues:
                queue.put_nowait(token(step))
            if not self._queues:
                self._has_requests.clear()

    async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> AsyncIterator[int]:
        queue: asyncio.Queue[int] = asyncio.Queue()
        self._queues.add(queue)
        self._has_requests.set()
        try:
            for _ in range(request.stop_conditions.max_tokens):
                yield await queue.get()
        finally:
            self._queues.discard(queue)

    async def close(self) -> None:
        self._task.cancel()


class Stamper(_Bench):
    """One token for each request; writes down when it came (CLOCK_MONOTONIC)."""

    async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> AsyncIterator[int]:
        print(f"began {context.id()} {time.monotonic():.6f} {len(request.token_ids)}", flush=True)
        yield token(0)


class Holder(_Bench):
    """A token each BENCH_DELAY_S, or one and then nothing; writes down when it was ended (CLOCK_MONOTONIC)."""

    async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> AsyncIterator[Any]:
        try:
            for index in range(request.stop_conditions.max_tokens):
                yield token(index)
                if index:  # what asks whether it is there wants two
                    await asyncio.sleep(DELAY_S or 3600)
        finally:
            print(f"ended {context.id()} {time.monotonic():.6f}", flush=True)
