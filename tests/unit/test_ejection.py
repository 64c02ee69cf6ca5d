"""Instances whose answers fail: left out, tried, taken back; and how many retries there may be."""

from __future__ import annotations

from dynamo_grpc.routing.budget import RetryBudget
from dynamo_grpc.routing.ejection import FAILURES, Ejections
from dynamo_grpc.testing import FakeClock


def eject(ejections: Ejections, key: str, num_all: int = 4) -> float | None:
    return [ejections.failed(key, num_all) for _ in range(FAILURES)][-1]


def test_several_failures_in_a_row_eject_and_one_between_them_does_not() -> None:
    clock = FakeClock()
    ejections = Ejections(clock)
    assert [ejections.failed("a", 4) for _ in range(FAILURES - 1)] == [None] * (FAILURES - 1)
    ejections.succeeded("a")
    assert eject(ejections, "a") == 1.0
    assert (ejections.is_out("a"), ejections.is_out("b")) == (True, False)


def test_one_request_tries_it_and_its_answer_decides() -> None:
    clock = FakeClock()
    ejections = Ejections(clock)
    eject(ejections, "a")
    clock.advance(1.0)
    assert not ejections.is_out("a")
    assert ejections.chosen("a")
    assert ejections.is_out("a")  # one is enough
    assert not ejections.chosen("a")
    assert ejections.failed("a", 4) == 2.0  # twice as long
    clock.advance(2.0)
    assert ejections.chosen("a")
    assert ejections.answered("a")
    assert not ejections.is_ejected("a")
    assert ejections.failed("a", 4) == 4.0  # it has to show that it works
    clock.advance(4.0)
    ejections.chosen("a")
    assert ejections.succeeded("a")
    assert eject(ejections, "a") == 1.0  # all is forgiven


def test_a_try_without_a_verdict_lets_another_one_try() -> None:
    clock = FakeClock()
    ejections = Ejections(clock)
    eject(ejections, "a")
    clock.advance(1.0)
    ejections.chosen("a")
    assert ejections.left("a")
    assert not ejections.is_out("a")


def test_failures_of_requests_that_were_there_before_prolong_nothing() -> None:
    clock = FakeClock()
    ejections = Ejections(clock)
    eject(ejections, "a")
    assert [ejections.failed("a", 4) for _ in range(20)] == [None] * 20
    clock.advance(1.0)
    assert not ejections.is_out("a")


def test_never_more_than_half_are_ejected() -> None:
    ejections = Ejections(FakeClock())
    assert eject(ejections, "only", num_all=1) is None
    assert [eject(ejections, key, num_all=5) for key in "abcde"] == [1.0, 1.0, None, None, None]
    ejections.forget("a")
    assert ejections.failed("c", 4) == 1.0  # there is room for another one


def test_no_ejection_lasts_for_ever() -> None:
    clock = FakeClock()
    ejections = Ejections(clock)
    seconds = [eject(ejections, "a")]
    for _ in range(8):
        clock.advance(60.0)
        ejections.chosen("a")
        seconds.append(ejections.failed("a", 4))
    assert seconds == [1, 2, 4, 8, 16, 30, 30, 30, 30]


def test_retries_are_a_share_of_the_requests() -> None:
    clock = FakeClock()
    budget = RetryBudget(clock=clock)
    assert sum(budget.spend() for _ in range(50)) == 10  # the floor
    for _ in range(100):
        budget.request()
    assert sum(budget.spend() for _ in range(50)) == 20
    clock.advance(600.0)  # long ago
    assert sum(budget.spend() for _ in range(50)) == 10
