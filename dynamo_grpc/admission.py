"""Who of an endpoint's requests may run: so many at once, some wait for their turn, others are refused."""

from __future__ import annotations

import asyncio
import bisect
import collections
import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from dynamo_grpc.context import Context
from dynamo_grpc.errors import MeshError, OverloadedError

#: Requests that wait where the author set a limit and said nothing of a queue.
MAX_QUEUED = 16
#: Ends of requests that the rate is measured by.
_NUM_ENDS = 64
#: Told when nothing has ended yet, so that no rate is known; and the longest that is told, in seconds.
_UNKNOWN_S, _LONGEST_S = 1.0, 60.0


class Drain:
    """How fast requests end when all turns are taken, for telling others when to come back.

    What the last ones took on average is the time that all of them ran, added up, by their number: it doesn't depend on
    how often requests come.

    Attributes:
        num_running: requests that have begun and not ended.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.num_running = 0
        self._run_s, self._at = 0.0, clock()
        self._ends: collections.deque[float] = collections.deque(maxlen=_NUM_ENDS)  # `_run_s` at each

    def _advance(self) -> None:
        now = self._clock()
        self._run_s += self.num_running * (now - self._at)
        self._at = now

    def began(self) -> None:
        """One more runs."""
        self._advance()
        self.num_running += 1

    def ended(self) -> None:
        """One has ended."""
        self._advance()
        self.num_running -= 1
        self._ends.append(self._run_s)

    def seconds_for(self, count: int, num_at_once: int) -> float | None:
        """How long so many will take to end when so many run at once; None while that isn't known."""
        if len(self._ends) < 2:
            return None
        mean_s = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return count * mean_s / num_at_once

    def retry_after_s(self, count: int, num_at_once: int) -> float:
        """What to tell somebody who comes after so many others."""
        seconds = self.seconds_for(count, num_at_once)
        return _UNKNOWN_S if seconds is None else min(max(seconds, 0.001), _LONGEST_S)


@dataclass(order=True, slots=True)
class _Waiting:
    rank: tuple[int, int, int]  # resumed ones, then high priorities, then early ones
    turn: asyncio.Future[None] = field(compare=False)


class Admission:
    """The turns of one endpoint.

    Args:
        max_concurrent: how many run at once; None is no limit.
        max_queued: how many wait.
        where: says whose limit it is, in errors: the worker's address.
        clock: monotonic seconds.

    Attributes:
        num_entered: requests that have had one since the start.
        num_refused: requests that found no room.
    """

    def __init__(
        self,
        max_concurrent: int | None = None,
        max_queued: int = MAX_QUEUED,
        where: Callable[[], str] = lambda: "this worker",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_concurrent, self.max_queued, self._where = max_concurrent, max_queued, where
        self.num_entered = self.num_refused = 0
        self._drain = Drain(clock)
        self._numbers = itertools.count()
        self._waiting: list[_Waiting] = []
        self._closed: MeshError | None = None

    @property
    def num_running(self) -> int:
        """Requests that have their turn."""
        return self._drain.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._waiting)

    async def enter(
        self,
        context: Context,
        priority: int = 0,
        *,
        is_resumed: bool = False,
        on_wait: Callable[[], Awaitable[None]] | None = None,
    ) -> bool:
        """Wait for a turn. One that has it must `leave`.

        Args:
            priority: higher goes first.
            is_resumed: its client has a part of the answer already: it goes before all others, and is never refused.
            on_wait: called once if it has to wait.

        Returns:
            True with the turn; False when the request was stopped before.

        Raises:
            OverloadedError: as many wait as may, or its time will be over before its turn.
        """
        if self.max_concurrent is None or (self.num_running < self.max_concurrent and not self._waiting):
            self._give_turn()
            return True
        if self._closed is not None:
            raise self._closed
        rank = (0 if is_resumed else 1, -priority, next(self._numbers))
        if not is_resumed:
            self._check_room(rank, context)
        waiting = _Waiting(rank, asyncio.get_running_loop().create_future())
        bisect.insort(self._waiting, waiting)
        stopped, has_turn = context.async_killed_or_stopped(), False
        try:
            if on_wait is not None:
                await on_wait()
            await asyncio.wait((waiting.turn, stopped), return_when=asyncio.FIRST_COMPLETED)
            if waiting.turn.done():
                waiting.turn.result()
                has_turn = True
            return has_turn
        finally:
            stopped.cancel()
            if not waiting.turn.done():
                self._waiting.remove(waiting)
            elif not has_turn and waiting.turn.exception() is None:  # it came in the moment of the cancel
                self.leave()

    def leave(self) -> None:
        """A request has ended: the next one has its turn."""
        self._drain.ended()
        if self._waiting:
            self._give_turn()
            self._waiting.pop(0).turn.set_result(None)

    def _give_turn(self) -> None:
        self._drain.began()
        self.num_entered += 1

    def close(self, error: MeshError) -> None:
        """Nobody gets a turn any more: those who wait, and all who come, are told `error`."""
        self._closed = error
        for waiting in self._waiting:
            waiting.turn.set_exception(error)
        self._waiting.clear()

    def _check_room(self, rank: tuple[int, int, int], context: Context) -> None:
        """See that there is a place in the queue: a free one, or that of one who waits with a lower priority.

        Raises:
            OverloadedError: there is none, or it would be of no use.
        """
        assert self.max_concurrent is not None
        left_s = context.remaining_s()
        if left_s is not None:
            ahead = bisect.bisect_left(self._waiting, rank, key=lambda waiting: waiting.rank)
            turn_s = self._drain.seconds_for(ahead + 1, self.max_concurrent)
            if turn_s is not None and turn_s > left_s:
                self.num_refused += 1
                raise OverloadedError(
                    f"{self._where()} would come to it after {turn_s:.1f} s, and its time-out is in {left_s:.1f} s: "
                    f"max_concurrent={self.max_concurrent} run and {len(self._waiting)} wait",
                    retry_after_s=min(turn_s, _LONGEST_S),
                )
        if len(self._waiting) < self.max_queued:
            return
        self.num_refused += 1
        last = self._waiting[-1] if self._waiting else None
        if last is None or last.rank[:2] <= rank[:2]:
            raise self._full("")
        self._waiting.pop().turn.set_exception(self._full(", and one of a higher priority came"))

    def _full(self, why: str) -> OverloadedError:
        waits = f"max_queued={self.max_queued} wait" if self.max_queued else "none may wait"
        return OverloadedError(
            f"{self._where()} is full: max_concurrent={self.max_concurrent} requests run and {waits}{why}",
            retry_after_s=self._drain.retry_after_s(len(self._waiting) + 1, self.max_concurrent or 1),
        )
