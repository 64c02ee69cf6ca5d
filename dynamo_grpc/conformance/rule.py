"""What a rule is, and what a verdict."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from dynamo_grpc.conformance.target import Target

Outcome = Literal["passed", "failed", "skipped"]


class Broken(Exception):  # noqa: N818 - a verdict, not a failure of ours
    """The worker breaks the rule; says what came in place of what the contract wants."""


class NotSeen(Exception):  # noqa: N818 - likewise
    """This worker gives no occasion to judge it by the rule; says why."""


Check = Callable[["Target"], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Rule:
    """A thing that the contract wants.

    Attributes:
        wants: in a sentence.
        is_for_vectors: holds for models that make vectors and nothing else, too.
        is_last: takes the worker out of service.
    """

    name: str
    wants: str
    check: Check
    is_for_vectors: bool = False
    is_last: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a worker did by one rule.

    Attributes:
        came: what it did, if it failed; why it wasn't judged, if it was skipped.
    """

    rule: str
    wants: str
    outcome: Outcome
    came: str = ""
    took_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """All verdicts on one worker."""

    address: str
    model: str
    verdicts: tuple[Verdict, ...]

    @property
    def failed(self) -> list[Verdict]:
        """Those that it failed."""
        return [verdict for verdict in self.verdicts if verdict.outcome == "failed"]

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON has it."""
        counts = {o: sum(v.outcome == o for v in self.verdicts) for o in ("passed", "failed", "skipped")}
        rules = [
            {
                "rule": v.rule,
                "outcome": v.outcome,
                "wants": v.wants,
                "came": v.came or None,
                "took_s": round(v.took_s, 3),
            }
            for v in self.verdicts
        ]
        return {"address": self.address, "model": self.model, **counts, "rules": rules}


class Rules:
    """Collects the rules of a module, in order."""

    def __init__(self) -> None:
        self.all: list[Rule] = []

    def rule(self, *, is_for_vectors: bool = False, is_last: bool = False) -> Callable[[Check], Check]:
        """Make a function that raises Broken or NotSeen a rule: of its name, and its docstring is what is wanted."""

        def add(check: Check) -> Check:
            assert check.__doc__
            name, wants = check.__name__.replace("_", "-"), check.__doc__.removesuffix(".")
            self.all.append(Rule(name, wants, check, is_for_vectors, is_last))
            return check

        return add
