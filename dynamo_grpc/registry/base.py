"""The registry's interface: register under a lease, and watch a prefix as a snapshot and then deltas.

Everything else in the project knows only this module; backends are etcd (also served in process), a static list, and
memory. All pass the same conformance tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Self

from dynamo_grpc.errors import RegistryError
from dynamo_grpc.registry.outages import Outages


@dataclass(frozen=True, slots=True)
class Entry:
    """A key with its value.

    Attributes:
        created: position of the key's creation in the registry's history; smaller is earlier.
    """

    key: str
    value: bytes
    created: int


@dataclass(frozen=True, slots=True)
class Change:
    """What happened since the last change; a snapshot replaces everything known of the prefix."""

    puts: tuple[Entry, ...] = ()
    deletes: tuple[str, ...] = ()
    is_snapshot: bool = False


#: Gives the values of a registration that has to be made again.
Renew = Callable[[], Mapping[str, bytes]]


class Registration(ABC):
    """Keys that stay in the registry while this process lives."""

    @abstractmethod
    async def wait_registered(self) -> None:
        """Return when the keys are visible to others."""

    @abstractmethod
    async def update(self, values: Mapping[str, bytes]) -> None:
        """Replace all keys of the registration by these."""

    @abstractmethod
    async def close(self) -> None:
        """Remove the keys now (or, if the registry can't be reached, let the lease end)."""

    @abstractmethod
    async def orphan(self) -> None:
        """Do nothing for the keys any more, as if the process were gone: they stay until their lease ends."""


class Registry(ABC):
    """A place where instances are found. Use it as an async context manager, or call `close`."""

    #: What it is and where, for messages.
    description: str = ""
    #: Whether an entry can go though its owner lives: leases end when the registry can't be reached.
    has_leases: ClassVar[bool] = False

    def __init__(self) -> None:
        self.outages = Outages(lambda: self.description)

    @property
    def unreachable_since(self) -> float | None:
        """Seconds since the epoch from when on it didn't answer; None while it does. What was known goes on serving."""
        return self.outages.unreachable_since

    @property
    def problem(self) -> str:
        """What went wrong and how, while something is wrong; else empty."""
        return self.outages.text

    def no_answer(self) -> RegistryError:
        """What to raise when it was waited for in vain: it says why, if that is known."""
        why = self.problem or self.outages.last
        return RegistryError(f"{self.description} does not answer" + (f": {why}" if why else ""), retry_after_s=1.0)

    def status(self) -> dict[str, str | None]:
        """What health answers say of it."""
        since = self.unreachable_since
        told = None if since is None else dt.datetime.fromtimestamp(since, dt.UTC).isoformat(timespec="seconds")
        return {
            "description": self.description,
            "unreachable_since": told,
            "problem": self.problem or None,
        }

    @abstractmethod
    async def register(self, values: Mapping[str, bytes], renew: Renew | None = None) -> Registration:
        """Put keys under a fresh lease and keep it alive; returns at once, the work goes on behind it.

        Args:
            renew: when the lease was lost, the keys are put again under a new one, with the values that this gives.
        """

    @abstractmethod
    def watch(self, prefix: str) -> AsyncIterator[Change]:
        """Yield a snapshot of the prefix, then every change. It never ends by itself: outages are waited out."""

    @abstractmethod
    async def close(self) -> None:
        """Close connections; registrations must be closed before."""

    async def list(self, prefix: str, timeout_s: float = 5.0) -> list[Entry]:
        """The entries below `prefix` now, by key.

        Raises:
            RegistryError: the registry didn't answer within `timeout_s`; says why.
        """
        self.outages.last = ""
        try:
            async with asyncio.timeout(timeout_s), contextlib.aclosing(self.watch(prefix)) as changes:  # type: ignore[type-var]
                async for change in changes:
                    return sorted(change.puts, key=lambda entry: entry.key)
        except TimeoutError:
            raise self.no_answer() from None
        raise AssertionError("a watch never ends by itself")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
