"""The instances a client can use now: what the registry says, and whether each one's connection is up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dynamo_grpc.changes import Changes
from dynamo_grpc.connections import Connection, Connections
from dynamo_grpc.records import read_instances
from dynamo_grpc.registry.base import View
from dynamo_grpc.v1 import model_card_pb2


@dataclass(slots=True)
class Live:
    """An instance and the connection to it."""

    instance: model_card_pb2.Instance
    connection: Connection

    @property
    def instance_id(self) -> int:
        """Its id."""
        return self.instance.instance_id


class InstanceSet:
    """A live set of instances.

    Args:
        view: of registry entries; not owned.
        accepts: which instances belong to the set; asked again whenever the view changes.
    """

    def __init__(
        self, view: View, connections: Connections, accepts: Callable[[model_card_pb2.Instance], bool] = lambda _: True
    ) -> None:
        self._view, self._connections, self._accepts = view, connections, accepts
        self._live: dict[int, Live] = {}
        self._gone: set[int] = set()
        self._changes = Changes()
        view.subscribe(self.refresh)
        connections.subscribe(self._changes.tell)

    def refresh(self) -> None:
        """Compare with the view, by id and by value."""
        found = {i.instance_id: i for i in read_instances(self._view.entries.values()) if self._accepts(i)}
        self._gone &= found.keys()
        for gone in self._live.keys() - found.keys():
            self._connections.release(self._live.pop(gone).connection)
        for instance_id, instance in found.items():
            live = self._live.get(instance_id)
            if live is not None and live.instance.address == instance.address:
                live.instance = instance
                continue
            self._live[instance_id] = Live(instance, self._connections.acquire(instance.address))
            if live is not None:
                self._connections.release(live.connection)
        self._changes.tell()

    def all(self) -> list[Live]:
        """All that the registry lists, in order of their ids."""
        return sorted(self._live.values(), key=lambda live: live.instance_id)

    def routable(self, excluded: frozenset[int] = frozenset()) -> list[Live]:
        """Those that can be called now, without the excluded ones."""
        hidden = excluded | self._gone
        return [live for live in self.all() if live.connection.is_up and live.instance_id not in hidden]

    def mark_gone(self, instance_id: int) -> None:
        """Another process answers at its address: leave it out until the registry forgets it."""
        self._gone.add(instance_id)

    def get(self, instance_id: int) -> Live | None:
        """One by its id."""
        return self._live.get(instance_id)

    async def wait_changed(self) -> None:
        """Return at the next change."""
        await self._changes.wait()

    def close(self) -> None:
        """Let go of the connections."""
        self._view.unsubscribe(self.refresh)
        self._connections.unsubscribe(self._changes.tell)
        for live in self._live.values():
            self._connections.release(live.connection)
        self._live.clear()
        self._changes.tell()
