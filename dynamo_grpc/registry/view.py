"""A prefix of the registry as it is now, decoded, and kept up to date by a task of its own.

A registry can lose an entry whose owner lives: its leases end while nobody can renew them, or its store comes back
empty. So an entry that goes is doubted before it is dropped: while its owner says itself that it serves, it stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Set
from typing import Any, Generic, TypeVar, overload

from dynamo_grpc.cancelling import is_being_cancelled
from dynamo_grpc.errors import RegistryError
from dynamo_grpc.registry.base import Change, Entry, Registry

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: How often the owner of an entry that went is asked again whether it still serves.
RECHECK_S = 5.0


class View(Generic[T]):
    """A prefix of the registry.

    Attributes:
        entries: as they are stored, by key; read them, don't change them.
        records: what was made of them, by key; entries that could not be decoded are left out.
        doubted: keys of entries that went from the registry, and whose owners still serve.
    """

    def __init__(
        self, decode: Callable[[Entry], T | None], still_serves: Callable[[T], Awaitable[bool]] | None = None
    ) -> None:
        self.entries: dict[str, Entry] = {}
        self.records: dict[str, T] = {}
        self.doubted: dict[str, asyncio.Task[None]] = {}
        self._decode, self._still_serves = decode, still_serves
        self._callbacks: list[Callable[[Set[str]], None]] = []
        self._task: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()

    @overload
    @staticmethod
    def start(registry: Registry, prefix: str) -> View[Entry]: ...

    @overload
    @staticmethod
    def start(
        registry: Registry,
        prefix: str,
        decode: Callable[[Entry], T | None],
        still_serves: Callable[[T], Awaitable[bool]] | None = None,
    ) -> View[T]: ...

    @staticmethod
    def start(registry: Registry, prefix: str, decode: Any = lambda entry: entry, still_serves: Any = None) -> Any:
        """Begin to watch; `close` ends it.

        Args:
            decode: makes a record of an entry, or None (and a line in the log) if it is none.
            still_serves: asks the owner of a record that the registry lost; by default nobody is asked.
        """
        view: View[Any] = View(decode, still_serves if registry.has_leases else None)
        view._task = asyncio.get_running_loop().create_task(view._follow(registry, prefix), name=f"view {prefix}")
        return view

    async def _follow(self, registry: Registry, prefix: str) -> None:
        activity = registry.outages.activity(f"reading {prefix}")
        try:
            while True:
                try:
                    async with contextlib.aclosing(registry.watch(prefix)) as changes:  # type: ignore[type-var]
                        async for change in changes:
                            self.apply(change)
                            activity.works()
                except asyncio.CancelledError:
                    if is_being_cancelled():
                        raise
                    activity.broke(RegistryError("its watch was cancelled"))  # by something below, not by us
                except Exception as error:  # a view that dies unseen is a mesh that stands still
                    activity.broke(error)
                await asyncio.sleep(1.0)
        finally:
            activity.close()

    def apply(self, change: Change) -> None:
        """Take in a change, and tell what it changed."""
        puts = {entry.key: entry for entry in change.puts}
        gone = self.entries.keys() - puts.keys() if change.is_snapshot else self.entries.keys() & set(change.deletes)
        changed = {key for key, entry in puts.items() if self.entries.get(key) != entry}
        for key in self.doubted.keys() & puts.keys():
            self.doubted.pop(key).cancel()
        for key in changed:
            self._put(puts[key])
        for key in gone - self.doubted.keys():
            if self._still_serves is not None and key in self.records:
                task = self._doubt(self.records[key], key, self._still_serves)
                self.doubted[key] = asyncio.get_running_loop().create_task(task, name=f"doubt {key}")
            else:
                self._drop(key)
                changed.add(key)
        if changed or not self.is_ready:
            self._ready.set()
            self._tell(changed)

    def _put(self, entry: Entry) -> None:
        self.entries[entry.key] = entry
        if (record := self._decode(entry)) is None:
            self.records.pop(entry.key, None)
        else:
            self.records[entry.key] = record

    def _drop(self, key: str) -> None:
        del self.entries[key]
        self.records.pop(key, None)

    async def _doubt(self, record: T, key: str, still_serves: Callable[[T], Awaitable[bool]]) -> None:
        """Keep an entry that the registry lost for as long as its owner serves."""
        try:
            is_told = False
            while await still_serves(record):
                if not is_told:
                    is_told = True
                    logger.warning("%s went from the registry, and still serves: it is kept", key)
                await asyncio.sleep(RECHECK_S)
        except Exception:  # whoever can't be asked is not kept
            logger.exception("asking %s whether it still serves failed", key)
        del self.doubted[key]
        self._drop(key)
        self._tell({key})

    def _tell(self, changed: Set[str]) -> None:
        for callback in tuple(self._callbacks):
            try:
                callback(changed)
            except Exception:  # one reader's fault must not end the view of the others
                logger.exception("a reader of the registry view failed")

    @property
    def is_ready(self) -> bool:
        """Whether the first snapshot has arrived."""
        return self._ready.is_set()

    async def wait_ready(self) -> None:
        """Return when the first snapshot has arrived."""
        await self._ready.wait()

    def subscribe(self, callback: Callable[[Set[str]], None]) -> None:
        """Call `callback` with the keys of each change, and now with all keys if there was a snapshot already."""
        self._callbacks.append(callback)
        if self.is_ready:
            callback(set(self.entries))

    def unsubscribe(self, callback: Callable[[Set[str]], None]) -> None:
        """Stop calling `callback`."""
        self._callbacks.remove(callback)

    async def close(self) -> None:
        """Stop watching."""
        tasks = [task for task in (self._task, *self.doubted.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
