"""A thin etcd v3 client on grpc.aio: leases, keys under a lease, and watches that survive an outage.

PyPI's `etcd3` can't be imported beside current protobuf and is synchronous; see the README. Keys and values are plain,
so etcdctl and any other client can read and write them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc

from dynamo_grpc.errors import RegistryError
from dynamo_grpc.registry import etcd_pb2 as pb
from dynamo_grpc.registry import wire
from dynamo_grpc.registry.base import Change, Entry, Registry, Renew
from dynamo_grpc.registry.etcd_lease import EtcdRegistration
from dynamo_grpc.registry.etcd_settings import EtcdSettings

logger = logging.getLogger(__name__)

_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # keepalive_timeout_ms alone has no effect on a frozen server
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 2_000),  # also the time-out of a connection attempt
    ("grpc.max_reconnect_backoff_ms", 3_000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
)
_CALL_S = 3.0
_MOVE_ON = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


class EtcdRegistry(Registry):
    """The registry on etcd. Connections are made on first use.

    Args:
        settings: where etcd is.
        rng: for jitter.
    """

    def __init__(self, settings: EtcdSettings | None = None, rng: random.Random | None = None) -> None:
        self.settings = settings or EtcdSettings.from_env()
        self.description = f"etcd at {','.join(self.settings.endpoints)}"
        self.rng = rng or random.Random()
        self._channels: list[grpc.aio.Channel] = []
        self._current = 0
        self._token = ""
        self._auth_lock = asyncio.Lock()

    async def register(self, values: Mapping[str, bytes], renew: Renew | None = None) -> EtcdRegistration:
        return EtcdRegistration(self, values, renew)

    async def watch(self, prefix: str) -> AsyncIterator[Change]:
        key = prefix.encode()
        backoff_s, is_told = 0.2, False
        place = _Place()
        while True:
            try:
                async with contextlib.aclosing(self._watch_once(key, place)) as changes:  # type: ignore[type-var]
                    async for change in changes:
                        if is_told:
                            logger.info("%s answers", self.description)
                        backoff_s, is_told = 0.2, False
                        self.unreachable_since = None
                        yield change
            except (grpc.RpcError, RegistryError, TimeoutError) as error:
                if not is_told:
                    logger.warning("%s: watch broke, trying again: %s", self.description, wire.describe(error))
                    is_told = True
                self.unreachable_since = self.unreachable_since or time.time()
                self.rotate(error)
            await asyncio.sleep(backoff_s * self.rng.uniform(0.5, 1.0))
            backoff_s = min(backoff_s * 2, 2.0)

    async def _watch_once(self, key: bytes, place: _Place) -> AsyncIterator[Change]:
        """One snapshot and the changes after it, until the stream breaks or can't go on."""
        end = wire.prefix_end(key)
        found = await self.call(wire.RANGE, pb.RangeRequest(key=key, range_end=end))
        entries = tuple(entry for kv in found.kvs if (entry := _entry(kv)))
        yield Change(puts=entries, is_snapshot=True, is_replaced=place.is_replaced_by(found.header))
        place.move(found.header)
        call = wire.stream(self.channel(), wire.WATCH)(metadata=self.metadata() + wire.LEADER)
        try:
            create = pb.WatchCreateRequest(key=key, range_end=end, start_revision=found.header.revision + 1)
            await call.write(pb.WatchRequest(create_request=create))
            while (response := await call.read()) is not grpc.aio.EOF:
                if response.compact_revision or response.canceled:
                    # also when created: a refused watch is told in its first response alone
                    reason = response.cancel_reason or f"compacted at {response.compact_revision}"
                    if "token" in reason or "permission" in reason:
                        self._token = ""
                    raise RegistryError(f"watch cancelled: {reason}")
                if response.created and response.header.revision < found.header.revision:
                    raise RegistryError("the store was replaced by an older one")
                place.move(response.header)
                if response.events:
                    yield _change(response.events)
            raise RegistryError(f"watch ended: {await call.details()}")
        finally:
            call.cancel()

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()
        self._channels.clear()

    # -- calls ------------------------------------------------------------------------------------------------------

    def channel(self) -> grpc.aio.Channel:
        """The channel to the endpoint in use."""
        if not self._channels:
            self._channels = [self._open(endpoint) for endpoint in self.settings.endpoints]
        return self._channels[self._current % len(self._channels)]

    def rotate(self, error: BaseException) -> None:
        """Go on with the next endpoint if `error` says that this one is no good."""
        if len(self.settings.endpoints) > 1 and (
            not isinstance(error, grpc.aio.AioRpcError) or error.code() in _MOVE_ON
        ):
            self._current += 1

    def _open(self, endpoint: str) -> grpc.aio.Channel:
        target = endpoint.removeprefix("http://").removeprefix("https://").rstrip("/")
        credentials = self.settings.credentials()
        if credentials is None:
            return grpc.aio.insecure_channel(target, options=_OPTIONS)
        return grpc.aio.secure_channel(target, credentials, options=_OPTIONS)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries: the token, if there is one."""
        return (("token", self._token),) if self._token else ()

    async def call(self, method: wire.Method, request: Any, timeout_s: float = _CALL_S) -> Any:
        """One unary call, with a fresh token when the old one is no longer taken.

        Raises:
            grpc.aio.AioRpcError: as etcd answered.
        """
        if self.settings.username and not self._token:
            await self._authenticate("")
        token = self._token
        try:
            return await wire.unary(self.channel(), method)(request, timeout=timeout_s, metadata=self.metadata())
        except grpc.aio.AioRpcError as error:
            stale = error.code() is grpc.StatusCode.UNAUTHENTICATED or "auth: revision" in (error.details() or "")
            if not (stale and self.settings.username):
                raise
        await self._authenticate(token)
        return await wire.unary(self.channel(), method)(request, timeout=timeout_s, metadata=self.metadata())

    async def _authenticate(self, stale_token: str) -> None:
        async with self._auth_lock:
            if self._token != stale_token:
                return  # somebody else was faster
            request = pb.AuthenticateRequest(name=self.settings.username, password=self.settings.password)
            response = await wire.unary(self.channel(), wire.AUTHENTICATE)(request, timeout=_CALL_S)
            self._token = response.token


class _Place:
    """How far a watch has come, and in which store."""

    def __init__(self) -> None:
        self._cluster_id = self._revision = 0

    def move(self, header: pb.ResponseHeader) -> None:
        """Something was read there."""
        self._cluster_id, self._revision = header.cluster_id, header.revision

    def is_replaced_by(self, header: pb.ResponseHeader) -> bool:
        """Whether what is read now is another store: its history is not the one that was watched."""
        if not self._cluster_id:
            return False
        return header.cluster_id != self._cluster_id or header.revision < self._revision


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
