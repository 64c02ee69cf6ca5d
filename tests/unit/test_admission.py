"""Turns of an endpoint's requests: how many run, who waits, who is refused and told what."""

from __future__ import annotations

import asyncio

import pytest

from dynamo_grpc import Context, DrainingError, OverloadedError
from dynamo_grpc.admission import Admission
from dynamo_grpc.testing import FakeClock


def admission(max_concurrent: int | None = 1, max_queued: int = 2, clock: FakeClock | None = None) -> Admission:
    return Admission(max_concurrent, max_queued, lambda: "worker a:1", clock or FakeClock())


class Asked:
    """A request that asks for its turn."""

    def __init__(
        self, turns: Admission, priority: int = 0, *, is_resumed: bool = False, timeout_s: float | None = None
    ):
        self.context = Context(timeout_s=timeout_s, clock=turns._drain._clock)
        self.task = asyncio.ensure_future(turns.enter(self.context, priority, is_resumed=is_resumed))

    @property
    def runs(self) -> bool:
        return self.task.done() and self.task.result()


async def turn() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_without_a_limit_all_run() -> None:
    turns = admission(None)
    assert [await turns.enter(Context()) for _ in range(100)] == [True] * 100
    assert (turns.num_running, turns.num_waiting) == (100, 0)


async def test_the_others_wait_in_order_and_beyond_the_queue_are_refused() -> None:
    turns = admission()
    first, second, third = (Asked(turns) for _ in range(3))
    await turn()
    assert (first.runs, second.runs, third.runs) == (True, False, False)
    with pytest.raises(
        OverloadedError, match=r"worker a:1 is full: max_concurrent=1 requests run and max_queued=2 wait"
    ):
        await turns.enter(Context())
    assert (turns.num_running, turns.num_waiting, turns.num_refused) == (1, 2, 1)
    turns.leave()
    await turn()
    assert (second.runs, third.runs) == (True, False)
    turns.leave()
    turns.leave()
    await turn()
    assert third.runs
    assert turns.num_waiting == 0


async def test_a_higher_priority_goes_first_and_takes_the_place_of_the_last() -> None:
    turns = admission()
    running, low, normal = Asked(turns), Asked(turns, -1), Asked(turns)
    await turn()
    high = Asked(turns, 5)
    await turn()
    with pytest.raises(OverloadedError, match="one of a higher priority came"):
        await low.task
    turns.leave()
    await turn()
    assert (running.runs, high.runs, normal.task.done()) == (True, True, False)
    normal.task.cancel()


async def test_one_that_goes_on_here_is_never_refused_and_goes_before_all() -> None:
    turns = admission(max_queued=1)
    await turns.enter(Context())
    waiting, resumed = Asked(turns, 9), Asked(turns, is_resumed=True)
    await turn()
    turns.leave()
    await turn()
    assert (resumed.runs, waiting.task.done()) == (True, False)
    waiting.task.cancel()


async def test_one_that_is_cancelled_or_stopped_leaves_the_queue() -> None:
    turns = admission(max_queued=3)
    await turns.enter(Context())
    cancelled, stopped, last = (Asked(turns) for _ in range(3))
    await turn()
    cancelled.task.cancel()
    stopped.context.stop_generating()
    await turn()
    assert cancelled.task.cancelled()
    assert stopped.task.result() is False
    turns.leave()
    await turn()
    assert (last.runs, turns.num_running, turns.num_waiting) == (True, 1, 0)


async def test_a_turn_that_comes_in_the_moment_of_a_cancel_is_given_on() -> None:
    turns = admission()
    await turns.enter(Context())
    first, second = Asked(turns), Asked(turns)
    await turn()
    turns.leave()
    first.task.cancel()
    await turn()
    assert (first.task.cancelled(), second.runs, turns.num_running) == (True, True, 1)


async def test_when_to_come_back_follows_from_what_requests_take() -> None:
    clock = FakeClock()
    turns = admission(2, 2, clock)
    asked = [Asked(turns) for _ in range(4)]
    await turn()
    with pytest.raises(OverloadedError) as unknown:
        await turns.enter(Context())
    assert unknown.value.retry_after_s == 1.0
    for _ in range(8):  # each takes a second, two run at once
        clock.advance(0.5)
        turns.leave()
        asked.append(Asked(turns))
        await turn()
    with pytest.raises(OverloadedError) as known:
        await turns.enter(Context())
    assert known.value.retry_after_s == pytest.approx(3 * 1.0 / 2)
    turns.max_queued = 3
    with pytest.raises(OverloadedError, match=r"would come to it after 1.5 s, and its time-out is in 0.6 s"):
        await turns.enter(Context(timeout_s=0.6, clock=clock))
    for one in asked:
        one.task.cancel()


async def test_idle_time_says_nothing_of_the_rate() -> None:
    clock = FakeClock()
    turns = admission(1, 2, clock)
    for _ in range(5):
        await turns.enter(Context())
        clock.advance(0.1)
        turns.leave()
        clock.advance(3600.0)
    await turns.enter(Context())
    waiting = Asked(turns, timeout_s=30.0)
    await turn()
    assert not waiting.task.done()  # it is not refused
    assert turns._drain.retry_after_s(10, 1) == pytest.approx(1.0)
    waiting.task.cancel()


async def test_one_that_has_no_time_takes_nobodys_place() -> None:
    clock = FakeClock()
    turns = admission(1, 1, clock)
    for _ in range(3):
        await turns.enter(Context())
        clock.advance(10.0)
        turns.leave()
    await turns.enter(Context())
    waiting = Asked(turns)
    await turn()
    with pytest.raises(OverloadedError, match=r"its time-out is in 1.0 s"):
        await turns.enter(Context(timeout_s=1.0, clock=clock), priority=9)
    assert not waiting.task.done()
    waiting.task.cancel()


async def test_a_worker_that_leaves_sends_away_those_who_wait() -> None:
    turns = admission()
    await turns.enter(Context())
    waiting = Asked(turns)
    await turn()
    turns.close(DrainingError("leaving"))
    with pytest.raises(DrainingError):
        await waiting.task
    with pytest.raises(DrainingError):
        await turns.enter(Context())
