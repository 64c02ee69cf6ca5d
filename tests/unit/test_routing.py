import random
from collections import Counter
from dataclasses import dataclass

import pytest

from dynamo_grpc.routing import RouterMode, make_policy


@dataclass(frozen=True)
class Candidate:
    instance_id: int
    num_inflight: int = 0


def spread(mode: RouterMode, candidates: list[Candidate], times: int = 300) -> Counter[int]:
    policy = make_policy(mode, random.Random(1))
    assert policy is not None
    return Counter(policy.choose(candidates).instance_id for _ in range(times))


IDLE = [Candidate(i) for i in (1, 2, 3)]


def test_round_robin_takes_turns() -> None:
    assert spread(RouterMode.RoundRobin, IDLE) == {1: 100, 2: 100, 3: 100}


def test_round_robin_goes_on_when_instances_change() -> None:
    policy = make_policy(RouterMode.RoundRobin, random.Random(1))
    assert policy is not None
    first = policy.choose(IDLE).instance_id
    others = [c for c in IDLE if c.instance_id != first]
    seen = [policy.choose(others).instance_id for _ in range(4)]
    assert seen[:2] == seen[2:]
    assert set(seen) == {c.instance_id for c in others}


@pytest.mark.parametrize("mode", [RouterMode.Random, RouterMode.LeastLoaded, RouterMode.PowerOfTwoChoices])
def test_equals_share(mode: RouterMode) -> None:
    assert min(spread(mode, IDLE).values()) > 60


def test_load_counts() -> None:
    loaded = [Candidate(1, 5), Candidate(2, 0), Candidate(3, 9)]
    assert spread(RouterMode.LeastLoaded, loaded) == {2: 300}
    power = spread(RouterMode.PowerOfTwoChoices, loaded)
    assert power[2] > power[1] > 0
    assert power[3] == 0


def test_one_candidate_is_enough() -> None:
    for mode in RouterMode:
        if policy := make_policy(mode):
            assert policy.choose([Candidate(7)]).instance_id == 7
    assert make_policy(RouterMode.Direct) is None
