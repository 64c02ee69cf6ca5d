"""A thin etcd v3 client on grpc.aio: leases, keys under a lease, and watches that survive an outage.

PyPI's `etcd3` can't be imported beside current protobuf and is synchronous; see the README. Keys and values are plain,
so etcdctl and any other client can read and write them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from dynamo_grpc.errors import ConfigurationError, RegistryError
from dynamo_grpc.registry import etcd_pb2 as pb
from dynamo_grpc.registry import wire
from dynamo_grpc.registry.base import Change, Entry, Registration, Registry

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
_LEADER = (("hasleader", "true"),)  # a member cut off from the others must say so
_MOVE_ON = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


@dataclass(frozen=True, slots=True)
class EtcdSettings:
    """Where etcd is and who we are.

    Attributes:
        endpoints: URLs or host:port; all http or all https.
        ttl_s: time to live asked for leases, in seconds.
    """

    endpoints: tuple[str, ...] = ("localhost:2379",)
    ttl_s: int = 10
    username: str = ""
    password: str = field(default="", repr=False)
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> EtcdSettings:
        """Read `ETCD_ENDPOINTS`, `ETCD_LEASE_TTL` and `ETCD_AUTH_*`."""
        endpoints = tuple(e.strip() for e in env.get("ETCD_ENDPOINTS", "").split(",") if e.strip())
        ttl = env.get("ETCD_LEASE_TTL", "10")
        if not ttl.isdigit() or int(ttl) < 1:
            raise ConfigurationError(f"ETCD_LEASE_TTL={ttl!r} must be a whole number of seconds, 1 or more")
        return cls(
            endpoints=endpoints or cls.endpoints_default(),
            ttl_s=int(ttl),
            username=env.get("ETCD_AUTH_USERNAME", ""),
            password=env.get("ETCD_AUTH_PASSWORD", ""),
            ca_file=env.get("ETCD_AUTH_CA", ""),
            cert_file=env.get("ETCD_AUTH_CLIENT_CERT", ""),
            key_file=env.get("ETCD_AUTH_CLIENT_KEY", ""),
        )

    @staticmethod
    def endpoints_default() -> tuple[str, ...]:
        """Where etcd is when nobody says."""
        return ("localhost:2379",)

    def credentials(self) -> grpc.ChannelCredentials | None:
        """What connections are encrypted with; None when they are not.

        Raises:
            ConfigurationError: a certificate file can't be read.
        """
        if not (self.ca_file or self.cert_file or any(e.startswith("https://") for e in self.endpoints)):
            return None
        try:
            return grpc.ssl_channel_credentials(_read(self.ca_file), _read(self.key_file), _read(self.cert_file))
        except OSError as error:
            raise ConfigurationError(f"a certificate file for etcd can't be read: {error}") from error


class EtcdRegistry(Registry):
    """The registry on etcd. Connections are made on first use.

    Args:
        settings: where etcd is.
        rng: for jitter.
    """

    def __init__(self, settings: EtcdSettings | None = None, rng: random.Random | None = None) -> None:
        self.settings = settings or EtcdSettings.from_env()
        self.description = f"etcd at {','.join(self.settings.endpoints)}"
        self._rng = rng or random.Random()
        self._channels: list[grpc.aio.Channel] = []
        self._current = 0
        self._token = ""
        self._auth_lock = asyncio.Lock()

    async def register(self, values: Mapping[str, bytes]) -> EtcdRegistration:
        return EtcdRegistration(self, values)

    async def watch(self, prefix: str) -> AsyncIterator[Change]:
        key = prefix.encode()
        backoff_s, is_told = 0.2, False
        while True:
            try:
                async with contextlib.aclosing(self._watch_once(key)) as changes:  # type: ignore[type-var]
                    async for change in changes:
                        if is_told:
                            logger.info("registry is back", extra={"registry": self.description})
                        backoff_s, is_told = 0.2, False
                        yield change
            except (grpc.RpcError, RegistryError, TimeoutError) as error:
                if not is_told:
                    logger.warning("%s: watch broke, trying again: %s", self.description, describe(error))
                    is_told = True
                self.rotate(error)
            await asyncio.sleep(backoff_s * self._rng.uniform(0.5, 1.0))
            backoff_s = min(backoff_s * 2, 2.0)

    async def _watch_once(self, key: bytes) -> AsyncIterator[Change]:
        """One snapshot and the changes after it, until the stream breaks or can't go on."""
        end = wire.prefix_end(key)
        found = await self.call(wire.RANGE, pb.RangeRequest(key=key, range_end=end))
        yield Change(puts=tuple(entry for kv in found.kvs if (entry := _entry(kv))), is_snapshot=True)
        call = wire.stream(self.channel(), wire.WATCH)(metadata=self._metadata() + _LEADER)
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

    def _metadata(self) -> tuple[tuple[str, str], ...]:
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
            return await wire.unary(self.channel(), method)(request, timeout=timeout_s, metadata=self._metadata())
        except grpc.aio.AioRpcError as error:
            stale = error.code() is grpc.StatusCode.UNAUTHENTICATED or "auth: revision" in (error.details() or "")
            if not (stale and self.settings.username):
                raise
        await self._authenticate(token)
        return await wire.unary(self.channel(), method)(request, timeout=timeout_s, metadata=self._metadata())

    async def _authenticate(self, stale_token: str) -> None:
        async with self._auth_lock:
            if self._token != stale_token:
                return  # somebody else was faster
            request = pb.AuthenticateRequest(name=self.settings.username, password=self.settings.password)
            response = await wire.unary(self.channel(), wire.AUTHENTICATE)(request, timeout=_CALL_S)
            self._token = response.token


class EtcdRegistration(Registration):
    """Keys under a lease of their own, kept alive by a task; a lost lease is replaced by a new one."""

    def __init__(self, registry: EtcdRegistry, values: Mapping[str, bytes]) -> None:
        self._registry = registry
        self._values = dict(values)
        self._registered = asyncio.Event()
        self._changed = asyncio.Event()
        self._lease_id = 0
        self._lease_ends = 0.0
        self._task = asyncio.get_running_loop().create_task(self._run(), name="etcd registration")

    async def wait_registered(self) -> None:
        await self._registered.wait()

    async def update(self, values: Mapping[str, bytes]) -> None:
        self._registered.clear()
        self._values = dict(values)
        self._changed.set()
        await self._registered.wait()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self._lease_id:
            with contextlib.suppress(grpc.RpcError):
                await self._registry.call(wire.LEASE_REVOKE, pb.LeaseRevokeRequest(ID=self._lease_id), timeout_s=2.0)
            self._lease_id = 0

    async def _run(self) -> None:
        backoff_s, is_told = 0.2, False
        while True:
            started = time.monotonic()
            try:
                await self._end_lease()
                await self._hold_lease()
                logger.warning("%s: lease lost, registering again", self._registry.description)
            except grpc.RpcError as error:
                if not is_told:
                    logger.warning("%s: not registered, trying again: %s", self._registry.description, describe(error))
                    is_told = True
                self._registry.rotate(error)
            if time.monotonic() - started > 5.0:
                backoff_s, is_told = 0.2, False
            await asyncio.sleep(backoff_s * self._registry._rng.uniform(0.5, 1.0))
            backoff_s = min(backoff_s * 2, 2.0)

    async def _end_lease(self) -> None:
        """See to it that the lease before is over, before another one is granted.

        A put that timed out may still be applied; if its lease lived, it would move the keys to it, and they would go
        with it. Under a lease that is over it fails.
        """
        if not self._lease_id:
            return
        try:
            await self._registry.call(wire.LEASE_REVOKE, pb.LeaseRevokeRequest(ID=self._lease_id))
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND and time.monotonic() < self._lease_ends:
                raise  # tried again until it is revoked, or over by itself
        self._lease_id = 0

    async def _hold_lease(self) -> None:
        """Grant a lease, put the keys, keep both alive; returns when the lease is lost."""
        self._changed.clear()
        granted = await self._registry.call(wire.LEASE_GRANT, pb.LeaseGrantRequest(TTL=self._registry.settings.ttl_s))
        self._lease_id = granted.ID
        expires = self._lease_ends = time.monotonic() + granted.TTL
        keys = await self._put_all(self._values, set())
        self._registered.set()
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), granted.TTL / 3 * self._registry._rng.uniform(0.8, 1.0))
            if self._changed.is_set():
                self._changed.clear()
                keys = await self._put_all(self._values, keys)
                self._registered.set()
            asked = time.monotonic()
            self._lease_ends = asked + granted.TTL + granted.TTL / 3
            try:
                ttl_s = await self._keep_alive(granted.TTL / 3)
                if ttl_s and not await self._has_keys(keys):
                    keys = await self._put_all(self._values, keys)
            except (grpc.RpcError, TimeoutError) as error:
                self._registry.rotate(error)
                ttl_s = None
            if ttl_s == 0 or (ttl_s is None and time.monotonic() >= expires):
                return
            if ttl_s:
                expires = asked + ttl_s

    async def _put_all(self, values: Mapping[str, bytes], old_keys: set[str]) -> set[str]:
        puts = [
            pb.RequestOp(request_put=pb.PutRequest(key=key.encode(), value=value, lease=self._lease_id))
            for key, value in values.items()
        ]
        gone = [
            pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key.encode()))
            for key in old_keys - values.keys()
        ]
        await self._registry.call(wire.TXN, pb.TxnRequest(success=puts + gone))
        return set(values)

    async def _has_keys(self, keys: set[str]) -> bool:
        """Whether the keys hang on our lease: somebody may have deleted them."""
        request = pb.LeaseTimeToLiveRequest(ID=self._lease_id, keys=True)
        answer = await self._registry.call(wire.LEASE_TIME_TO_LIVE, request)
        return {key.decode() for key in answer.keys} >= keys

    async def _keep_alive(self, timeout_s: float) -> int:
        """Ask for another full time to live; 0 says that the lease is gone."""
        registry = self._registry
        call = wire.stream(registry.channel(), wire.LEASE_KEEP_ALIVE)(metadata=registry._metadata() + _LEADER)
        try:
            async with asyncio.timeout(timeout_s):
                await call.write(pb.LeaseKeepAliveRequest(ID=self._lease_id))
                response = await call.read()
                if response is grpc.aio.EOF:
                    raise TimeoutError("keep-alive stream ended")
                return int(response.TTL)
        finally:
            call.cancel()


def _read(name: str) -> bytes | None:
    return Path(name).read_bytes() if name else None


def describe(error: BaseException) -> str:
    """One line for a log."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__


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
