"""The simple policies: round robin, random, least loaded, power of two choices.

A policy is given the candidates (discovered, up, not excluded) and picks one. No I/O, and chance is an argument.
"""

from __future__ import annotations

import bisect
import enum
import random
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar


class Candidate(Protocol):
    """An instance that could take the request.

    Attributes:
        num_inflight: requests this process has running there.
    """

    @property
    def instance_id(self) -> int: ...

    @property
    def num_inflight(self) -> int: ...


C = TypeVar("C", bound=Candidate)


class Policy(Protocol):
    """Picks one of the candidates, which are never none and come in order of their ids."""

    def choose(self, candidates: Sequence[C]) -> C: ...

    def scores(self, candidates: Sequence[C]) -> Sequence[float]:
        """What `choose` would go by now: of the lowest one, equal ones by chance. Changes nothing."""


class RouterMode(enum.Enum):
    """How a client spreads its requests."""

    RoundRobin = "round-robin"
    Random = "random"
    LeastLoaded = "least-loaded"
    PowerOfTwoChoices = "power-of-two"
    Direct = "direct"


class RoundRobin:
    """Each in turn, in order of their ids; newcomers fit in where their id belongs."""

    def __init__(self, rng: random.Random) -> None:
        self._last = rng.getrandbits(64)  # clients that start together don't all begin with the same one

    def choose(self, candidates: Sequence[C]) -> C:
        """The one with the next higher id, or the first."""
        place = bisect.bisect_right(candidates, self._last, key=lambda c: c.instance_id)
        chosen = candidates[place % len(candidates)]
        self._last = chosen.instance_id
        return chosen

    def scores(self, candidates: Sequence[C]) -> Sequence[float]:
        """How many others come before each."""
        place = bisect.bisect_right(candidates, self._last, key=lambda c: c.instance_id)
        return [(number - place) % len(candidates) for number in range(len(candidates))]


class Random:
    """Any, with equal chances."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, candidates: Sequence[C]) -> C:
        """One by chance."""
        return self._rng.choice(candidates)

    def scores(self, candidates: Sequence[C]) -> Sequence[float]:
        """All the same."""
        return [0.0] * len(candidates)


class LeastLoaded:
    """The one with the fewest requests of ours; ties by chance."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, candidates: Sequence[C]) -> C:
        """The least loaded."""
        fewest = min(c.num_inflight for c in candidates)
        return self._rng.choice([c for c in candidates if c.num_inflight == fewest])

    def scores(self, candidates: Sequence[C]) -> Sequence[float]:
        """Their requests."""
        return [float(c.num_inflight) for c in candidates]


class PowerOfTwoChoices:
    """The less loaded of two picked by chance (Mitzenmacher, "The Power of Two Choices", 2001)."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, candidates: Sequence[C]) -> C:
        """The less loaded of two."""
        pair = self._rng.sample(candidates, min(2, len(candidates)))
        return min(pair, key=lambda c: c.num_inflight)

    def scores(self, candidates: Sequence[C]) -> Sequence[float]:
        """Their requests; the lowest is chosen if it is one of the two."""
        return [float(c.num_inflight) for c in candidates]


POLICIES: dict[RouterMode, Callable[[random.Random], Policy]] = {
    RouterMode.RoundRobin: RoundRobin,
    RouterMode.Random: Random,
    RouterMode.LeastLoaded: LeastLoaded,
    RouterMode.PowerOfTwoChoices: PowerOfTwoChoices,
}


def make_policy(mode: RouterMode, rng: random.Random | None = None) -> Policy | None:
    """The policy of a mode; None for Direct, where the caller names the instance."""
    make = POLICIES.get(mode)
    return make(rng or random.Random()) if make else None
