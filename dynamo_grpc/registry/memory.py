"""A registry inside one process: for tests, and for a frontend and its workers in one program."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

from dynamo_grpc.registry.base import Change, Entry, Registration, Registry, Renew


class MemoryRegistry(Registry):
    """Keys in a dict. All users must share the object, and the event loop."""

    description = "memory"

    def __init__(self) -> None:
        super().__init__()
        self._entries: dict[str, Entry] = {}
        self._watchers: list[tuple[str, asyncio.Queue[Change]]] = []
        self._revision = 0

    async def register(self, values: Mapping[str, bytes], renew: Renew | None = None) -> MemoryRegistration:
        return MemoryRegistration(self, values)

    async def watch(self, prefix: str) -> AsyncIterator[Change]:
        queue: asyncio.Queue[Change] = asyncio.Queue()
        watcher = (prefix, queue)
        self._watchers.append(watcher)
        try:
            known = tuple(entry for key, entry in self._entries.items() if key.startswith(prefix))
            yield Change(puts=known, is_snapshot=True)
            while True:
                yield await queue.get()
        finally:
            self._watchers.remove(watcher)

    async def close(self) -> None:
        """Nothing to close."""

    def apply(self, puts: Mapping[str, bytes], deletes: frozenset[str]) -> None:
        """Change keys and tell the watchers."""
        self._revision += 1
        gone = [key for key in deletes if self._entries.pop(key, None)]
        new = []
        for key, value in puts.items():
            old = self._entries.get(key)
            self._entries[key] = Entry(key, value, old.created if old else self._revision)
            new.append(self._entries[key])
        for prefix, queue in self._watchers:
            puts_here = tuple(entry for entry in new if entry.key.startswith(prefix))
            gone_here = tuple(key for key in gone if key.startswith(prefix))
            if puts_here or gone_here:
                queue.put_nowait(Change(puts_here, gone_here))


class MemoryRegistration(Registration):
    """Keys of one owner in a MemoryRegistry."""

    def __init__(self, registry: MemoryRegistry, values: Mapping[str, bytes]) -> None:
        self._registry, self._keys = registry, frozenset(values)
        registry.apply(values, frozenset())

    async def wait_registered(self) -> None:
        """They are visible from the start."""

    async def update(self, values: Mapping[str, bytes]) -> None:
        self._registry.apply(values, self._keys - frozenset(values))
        self._keys = frozenset(values)

    async def orphan(self) -> None:
        """They stay: there are no leases here."""

    async def close(self) -> None:
        self._registry.apply({}, self._keys)
        self._keys = frozenset()
