"""What of a registry does not work at the moment, since when, and why; each outage is logged once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from dynamo_grpc.registry import wire

logger = logging.getLogger(__name__)


class Outages:
    """Everything that a process does with one registry.

    Args:
        describe: says what the registry is, for the log.

    Attributes:
        last: why the latest attempt that failed did.
    """

    def __init__(self, describe: Callable[[], str]) -> None:
        self._describe = describe
        self.last = ""
        self._open: dict[Activity, tuple[float, str]] = {}

    def activity(self, name: str) -> Activity:
        """Something that can fail and work again; close it when it isn't done any more."""
        return Activity(self, name)

    @property
    def since(self) -> float | None:
        """When the oldest outage began, in seconds since the epoch; None when everything works."""
        return min((since for since, _ in self._open.values()), default=None)

    @property
    def text(self) -> str:
        """What does not work, and why; empty when everything works."""
        return next((f"{activity.name}: {error}" for activity, (_, error) in self._open.items()), "")

    def begin(self, activity: Activity, error: BaseException) -> None:
        """An attempt failed."""
        since, _ = self._open.get(activity, (time.time(), ""))
        self.last = wire.describe(error)
        self._open[activity] = (since, self.last)
        if activity.told != (kind := wire.kind(error)):
            activity.told = kind
            logger.warning("%s: %s failed, trying again: %s", self._describe(), activity.name, self.last)

    def end(self, activity: Activity) -> None:
        """An attempt succeeded, or there will be no more."""
        if found := self._open.pop(activity, None):
            activity.told = ""
            logger.info("%s: %s works again after %.1f s", self._describe(), activity.name, time.time() - found[0])


class Activity:
    """One thing that is done with the registry, such as watching a prefix."""

    def __init__(self, outages: Outages, name: str) -> None:
        self._outages, self.name, self.told = outages, name, ""

    def failed(self, error: BaseException) -> None:
        """It doesn't work now; it will be tried again."""
        self._outages.begin(self, error)

    def works(self) -> None:
        """It works."""
        self._outages.end(self)

    def close(self) -> None:
        """It is not tried any more."""
        self._outages._open.pop(self, None)
