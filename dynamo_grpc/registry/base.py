"""The registry's interface: register under a lease, and watch a prefix as a snapshot and then deltas.

Everything else in the project knows only this module; backends are etcd (also served in process), a static list, and
memory. All pass the same conformance tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

logger = logging.getLogger(__name__)


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
    """What happened since the last change; a snapshot replaces everything known of the prefix.

    Attributes:
        is_replaced: the snapshot is of another store than the changes before it: one that came back empty, or from an
            old backup. What it lacks may only not have registered again yet.
    """

    puts: tuple[Entry, ...] = ()
    deletes: tuple[str, ...] = ()
    is_snapshot: bool = False
    is_replaced: bool = False


#: Gives the values of a registration that has to be made again.
Renew = Callable[[], Mapping[str, bytes]]

#: How long entries are kept that a replaced store lacks: those that live register again within a lease's time to live.
GRACE_S = 15.0


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


class Registry(ABC):
    """A place where instances are found. Use it as an async context manager, or call `close`."""

    #: What it is and where, for messages.
    description: str = ""
    #: Seconds since the epoch from when on it didn't answer; None while it does. What was known goes on serving.
    unreachable_since: float | None = None

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
            TimeoutError: the registry didn't answer within `timeout_s`.
        """
        async with asyncio.timeout(timeout_s), contextlib.aclosing(self.watch(prefix)) as changes:  # type: ignore[type-var]
            async for change in changes:
                return sorted(change.puts, key=lambda entry: entry.key)
        return []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


@dataclass(slots=True)
class View:
    """A prefix as it is now, kept up to date by a task of its own.

    Attributes:
        entries: by key; read it, don't change it.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    _callbacks: list[Callable[[], None]] = field(default_factory=list)
    _task: asyncio.Task[None] | None = None
    _ready: asyncio.Event = field(default_factory=asyncio.Event)
    _unconfirmed: set[str] = field(default_factory=set)
    _grace: asyncio.TimerHandle | None = None

    @classmethod
    def start(cls, registry: Registry, prefix: str) -> View:
        """Begin to watch; `close` ends it."""
        view = cls()
        view._task = asyncio.get_running_loop().create_task(view._follow(registry, prefix), name=f"view {prefix}")
        return view

    async def _follow(self, registry: Registry, prefix: str) -> None:
        while True:
            try:
                async with contextlib.aclosing(registry.watch(prefix)) as changes:  # type: ignore[type-var]
                    async for change in changes:
                        self._apply(change)
            except Exception:  # a view that dies unseen is a mesh that stands still
                logger.exception("watching %s failed, trying again", prefix)
            await asyncio.sleep(1.0)

    def _apply(self, change: Change) -> None:
        if change.is_replaced:
            self._keep(set(self.entries) - {entry.key for entry in change.puts})
        elif change.is_snapshot:
            for key in self.entries.keys() - self._unconfirmed:
                del self.entries[key]
        for key in change.deletes:
            self.entries.pop(key, None)
            self._unconfirmed.discard(key)
        for entry in change.puts:
            self.entries[entry.key] = entry
            self._unconfirmed.discard(entry.key)
        self._ready.set()
        self._tell()

    def _keep(self, missing: set[str]) -> None:
        """Go on with entries that a replaced store lacks, for a while."""
        if missing:
            logger.warning("the registry's store was replaced: %d entries are kept for %.0f s", len(missing), GRACE_S)
        self._unconfirmed |= missing
        if self._grace is not None:
            self._grace.cancel()
        self._grace = asyncio.get_running_loop().call_later(GRACE_S, self._end_grace)

    def _end_grace(self) -> None:
        gone, self._unconfirmed = self._unconfirmed, set()
        for key in gone:
            self.entries.pop(key, None)
        if gone:
            logger.warning("%d entries did not come back after the registry's store was replaced", len(gone))
            self._tell()

    def _tell(self) -> None:
        for callback in tuple(self._callbacks):
            try:
                callback()
            except Exception:  # one reader's fault must not end the view of the others
                logger.exception("a reader of the registry view failed")

    @property
    def is_ready(self) -> bool:
        """Whether the first snapshot has arrived."""
        return self._ready.is_set()

    async def wait_ready(self) -> None:
        """Return when the first snapshot has arrived."""
        await self._ready.wait()

    def subscribe(self, callback: Callable[[], None]) -> None:
        """Call `callback` after each change, and now if there was a snapshot already."""
        self._callbacks.append(callback)
        if self.is_ready:
            callback()

    def unsubscribe(self, callback: Callable[[], None]) -> None:
        """Stop calling `callback`."""
        self._callbacks.remove(callback)

    async def close(self) -> None:
        """Stop watching."""
        if self._grace is not None:
            self._grace.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
