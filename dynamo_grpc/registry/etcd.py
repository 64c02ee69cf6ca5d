"""The registry on etcd: watches that survive an outage, and registrations (`etcd_lease`), on a thin client of our own.

PyPI's `etcd3` can't be imported beside current protobuf and is synchronous; see the README. Keys and values are plain,
so etcdctl and any other client can read and write them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import grpc

from dynamo_grpc.errors import RegistryError
from dynamo_grpc.registry import etcd_pb2 as pb
from dynamo_grpc.registry import wire
from dynamo_grpc.registry.backoff import Backoff
from dynamo_grpc.registry.base import Change, Entry, Registry, Renew
from dynamo_grpc.registry.etcd_client import EtcdClient
from dynamo_grpc.registry.etcd_lease import EtcdRegistration, LeaseKeeper
from dynamo_grpc.registry.etcd_settings import EtcdSettings

logger = logging.getLogger(__name__)

#: How often a prefix is read again though its watch seems well: an event that etcd lost is missed for no longer.
_READ_AGAIN_S = 300.0
#: How long etcd may take to say that it watches.
_CREATED_S = 5.0


class EtcdRegistry(Registry):
    """The registry on etcd. Connections are made on first use.

    Args:
        settings: where etcd is.
        rng: for jitter.
    """

    has_leases = True

    def __init__(self, settings: EtcdSettings | None = None, rng: random.Random | None = None) -> None:
        super().__init__()
        self.settings = settings or EtcdSettings.from_env()
        self.description = f"etcd at {','.join(self.settings.endpoints)}"
        self.rng = rng or random.Random()
        self.client = EtcdClient(self.settings, self.rng)
        self.keeper = LeaseKeeper(self.client, self.outages, self.rng)

    async def register(self, values: Mapping[str, bytes], renew: Renew | None = None) -> EtcdRegistration:
        return EtcdRegistration(self.client, self.keeper, self.outages, self.rng, values, renew)

    async def watch(self, prefix: str) -> AsyncIterator[Change]:
        backoff = Backoff(0.2, 2.0, self.rng)
        activity = self.outages.activity(f"watching {prefix}")

        def works() -> None:
            backoff.reset()
            activity.works()

        try:
            while True:
                problem: BaseException | None = None
                try:
                    async with contextlib.aclosing(self._watch_once(prefix.encode(), works)) as changes:  # type: ignore[type-var]
                        async for change in changes:
                            yield change
                except (grpc.RpcError, RegistryError, TimeoutError) as error:
                    problem = error
                    activity.failed(error)
                await asyncio.sleep(backoff.next_s(is_refused=wire.is_refusal(problem)))
        finally:
            activity.close()

    async def _watch_once(self, key: bytes, works: Callable[[], None]) -> AsyncIterator[Change]:
        """One snapshot and the changes after it, until the stream breaks or it is time to read all again.

        `works` is called when the stream is there, which a snapshot alone doesn't show.

        A stream that broke is never resumed from its last revision: a store that came back empty may have come as far
        by then, with another history. What was missed is in the snapshot.
        """
        header, found = await self.client.read_all(key)
        yield Change(puts=tuple(entry for kv in found if (entry := _entry(kv))), is_snapshot=True)
        del found
        ends = time.monotonic() + _READ_AGAIN_S * self.rng.uniform(0.8, 1.2)
        async with self.client.stream(wire.WATCH) as call:
            end = wire.prefix_end(key)
            create = pb.WatchCreateRequest(key=key, range_end=end, start_revision=header.revision + 1)
            async with asyncio.timeout(_CREATED_S):
                await call.write(pb.WatchRequest(create_request=create))
                self._check(await call.read(), header)
            works()
            while (left_s := ends - time.monotonic()) > 0:
                try:
                    async with asyncio.timeout(left_s):
                        response = await call.read()
                except TimeoutError:
                    return  # its end ended the call too; and a timer may come a little early
                self._check(response, header)
                if response.events:
                    yield _change(response.events)

    def _check(self, response: Any, listed: pb.ResponseHeader) -> None:
        """Refuse to go on where the changes would not be those after the snapshot."""
        if response is grpc.aio.EOF:
            raise RegistryError("the watch ended")
        if response.compact_revision or response.canceled:
            # also when created: a refused watch is told in its first response alone
            reason = response.cancel_reason or f"compacted at {response.compact_revision}"
            raise RegistryError(f"the watch was cancelled: {reason}")
        if response.header.cluster_id != listed.cluster_id or response.header.revision < listed.revision:
            raise RegistryError("the store is another one, or an older one, than was read")

    async def close(self) -> None:
        await self.keeper.close()
        await self.client.close()


def _entry(kv: pb.KeyValue) -> Entry | None:
    try:
        return Entry(kv.key.decode(), kv.value, kv.create_revision)
    except UnicodeDecodeError:  # not ours: ours are ASCII
        logger.warning("registry key %r is no text, left out", kv.key)
        return None


def _change(events: Any) -> Change:
    """Fold a batch of events: the last one of each key counts."""
    last = {event.kv.key: event for event in events}
    puts = tuple(entry for e in last.values() if e.type == pb.Event.PUT and (entry := _entry(e.kv)))
    deletes = tuple(key.decode(errors="replace") for key, e in last.items() if e.type == pb.Event.DELETE)
    return Change(puts, deletes)
