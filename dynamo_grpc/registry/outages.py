"""What of a registry does not work at the moment, since when, and why; each kind of failure is logged once an outage.

Read from other threads too: a health check must not wait for the event loop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from dynamo_grpc.registry import wire

logger = logging.getLogger(__name__)


class TakenError(Exception):
    """The registry answers, and somebody else has what is wanted there."""


@dataclass(slots=True)
class _Outage:
    since: float
    text: str
    is_answered: bool
    told: set[str] = field(default_factory=set)


class Outages:
    """Everything that a process does with one registry.

    Args:
        describe: says what the registry is, for the log.

    Attributes:
        last: why the latest attempt that failed did.
    """

    def __init__(self, describe: Callable[[], str]) -> None:
        self.describe = describe
        self.last = ""
        self.open: dict[Activity, _Outage] = {}

    def activity(self, name: str) -> Activity:
        """Something that can fail and work again; close it when it isn't done any more."""
        return Activity(self, name)

    @property
    def unreachable_since(self) -> float | None:
        """Since when the registry doesn't answer, in seconds since the epoch; None while it does, if only to refuse."""
        return min((outage.since for outage in list(self.open.values()) if not outage.is_answered), default=None)

    @property
    def text(self) -> str:
        """What does not work, and why; empty when everything works."""
        return next((f"{activity.name}: {outage.text}" for activity, outage in list(self.open.items())), "")


class Activity:
    """One thing that is done with the registry, such as watching a prefix."""

    def __init__(self, outages: Outages, name: str) -> None:
        self._outages, self.name = outages, name

    def failed(self, error: BaseException) -> bool:
        """It doesn't work now, and will be tried again; whether that was logged, as the first of its kind."""
        outages, text = self._outages, wire.describe(error)
        outages.last = text
        outage = outages.open.setdefault(self, _Outage(time.time(), "", is_answered=False))
        outage.text = text
        outage.is_answered = isinstance(error, TakenError) or wire.is_refusal(error)
        if (kind := wire.kind(error)) in outage.told:
            return False
        outage.told.add(kind)
        logger.warning("%s: %s failed, trying again: %s", outages.describe(), self.name, text)
        return True

    def broke(self, error: Exception) -> None:
        """It failed as nobody expected."""
        if self.failed(error):
            logger.error("%s: this should not happen", self.name, exc_info=error)

    def works(self) -> None:
        """It works."""
        if outage := self._outages.open.pop(self, None):
            text = "%s: %s works again after %.1f s"
            logger.info(text, self._outages.describe(), self.name, time.time() - outage.since)

    def close(self) -> None:
        """It is not tried any more."""
        self._outages.open.pop(self, None)
