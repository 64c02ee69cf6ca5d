"""Calls to an etcd cluster: one channel for each member, moving on when one is no good, and tokens for users.

It knows etcd's methods and no more; what they are used for is `etcd` (watches) and `etcd_lease` (registrations).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

import grpc

from dynamo_grpc.errors import RegistryError
from dynamo_grpc.registry import etcd_pb2 as pb
from dynamo_grpc.registry import wire
from dynamo_grpc.registry.etcd_settings import EtcdSettings

_OPTIONS = (
    ("grpc.max_receive_message_length", -1),  # a page of model cards may be larger than gRPC's 4 MiB
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # keepalive_timeout_ms alone has no effect on a frozen server
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 2_000),  # also the time-out of a connection attempt
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
)
_CALL_S = 3.0
_PAGE = 1_000
#: What says that the request is no good; everything else may be the member (without a quorum, a learner …).
_ABOUT_THE_REQUEST = (
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
)
#: How etcd's versions say, beside UNAUTHENTICATED, that a token is not taken any more.
_STALE = ("revision of auth store is old", "auth: revision", "user name is empty", "invalid auth token")


class EtcdClient:
    """Calls to one cluster. Connections are made on first use.

    Args:
        rng: picks the member to begin with, so that a fleet spreads over all.
    """

    def __init__(self, settings: EtcdSettings, rng: random.Random) -> None:
        self.settings = settings
        self._channels: list[grpc.aio.Channel] = []
        self._current = rng.randrange(len(settings.endpoints))
        self._token = ""
        self._auth_lock = asyncio.Lock()

    async def call(self, method: wire.Method, request: Any, timeout_s: float = _CALL_S) -> Any:
        """One unary call, with a fresh token when the old one is no longer taken.

        Raises:
            grpc.aio.AioRpcError: as etcd answered.
        """
        token = await self._authenticate()
        try:
            return await self._call(method, request, timeout_s, token)
        except grpc.aio.AioRpcError as error:
            if not self.forget_if_stale(token, error):
                raise
        return await self._call(method, request, timeout_s, await self._authenticate())

    async def _call(self, method: wire.Method, request: Any, timeout_s: float, token: str) -> Any:
        place = self._current
        try:
            return await wire.unary(self._channel(), method)(request, timeout=timeout_s, metadata=_metadata(token))
        except grpc.aio.AioRpcError as error:
            self._leave(place, error)
            raise

    @contextlib.asynccontextmanager
    async def stream(self, method: wire.Method) -> AsyncIterator[Any]:
        """One streaming call, ended on leaving.

        Raises:
            grpc.aio.AioRpcError: as etcd answered; errors raised inside move on to the next member too.
        """
        token = await self._authenticate()
        place = self._current
        call = wire.stream(self._channel(), method)(metadata=_metadata(token) + wire.LEADER)
        try:
            yield call
        except (grpc.RpcError, RegistryError, TimeoutError) as error:
            self._leave(place, error)
            self.forget_if_stale(token, error)
            raise
        except asyncio.InvalidStateError as error:  # what grpc.aio raises for a write after the call's end
            self._leave(place, error)
            raise RegistryError(f"the stream ended: {await call.details()}") from error
        finally:
            call.cancel()

    async def read_all(self, prefix: bytes) -> tuple[pb.ResponseHeader, list[pb.KeyValue]]:
        """All keys below a prefix as of one revision, and the header that says which."""
        request = pb.RangeRequest(key=prefix, range_end=wire.prefix_end(prefix), limit=_PAGE)
        first = page = await self.call(wire.RANGE, request)
        found = list(page.kvs)
        while page.more:
            request.revision = first.header.revision
            request.key = page.kvs[-1].key + b"\0"
            page = await self.call(wire.RANGE, request)
            found += page.kvs
        return first.header, found

    async def status(self, endpoint: str) -> pb.StatusResponse:
        """What one member says of itself.

        Raises:
            grpc.aio.AioRpcError: it doesn't answer, or refuses.
        """
        with contextlib.suppress(grpc.aio.AioRpcError):  # older versions ask for no user here
            await self._authenticate()
        async with self._open(endpoint) as channel:
            ask = wire.unary(channel, wire.STATUS)
            answer: pb.StatusResponse = await ask(pb.StatusRequest(), timeout=_CALL_S, metadata=_metadata(self._token))
            return answer

    async def close(self) -> None:
        """Close the channels and with them all calls."""
        for channel in self._channels:
            await channel.close()
        self._channels.clear()

    def forget_if_stale(self, token: str, error: BaseException) -> bool:
        """Whether an error says that a token is not taken any more; then another one is got before the next call."""
        if not token:
            return False
        text = wire.describe(error)
        is_unauthenticated = isinstance(error, grpc.aio.AioRpcError) and (
            error.code() is grpc.StatusCode.UNAUTHENTICATED
        )
        if not (is_unauthenticated or any(said in text for said in _STALE)):
            return False
        if self._token == token:
            self._token = ""
        return True

    # -- members ------------------------------------------------------------------------------------------------------

    def _channel(self) -> grpc.aio.Channel:
        if not self._channels:
            self._channels = [self._open(endpoint) for endpoint in self.settings.endpoints]
        return self._channels[self._current]

    def _open(self, endpoint: str) -> grpc.aio.Channel:
        target = endpoint.rpartition("//")[2]
        credentials = self.settings.credentials()
        if credentials is None:
            return grpc.aio.insecure_channel(target, options=_OPTIONS)
        return grpc.aio.secure_channel(target, credentials, options=_OPTIONS)

    def _leave(self, place: int, error: BaseException) -> None:
        """Go on with the next member if `error` says that the one at `place` is no good; several may find that out."""
        if place == self._current and (
            not isinstance(error, grpc.aio.AioRpcError) or error.code() not in _ABOUT_THE_REQUEST
        ):
            self._current = (place + 1) % len(self.settings.endpoints)

    # -- users --------------------------------------------------------------------------------------------------------

    async def _authenticate(self) -> str:
        """The token to call with; empty when there is no user."""
        if not self.settings.username or self._token:
            return self._token
        async with self._auth_lock:
            if not self._token:
                request = pb.AuthenticateRequest(name=self.settings.username, password=self.settings.password)
                # without an old token: etcd 3.4 refuses it here too
                self._token = (await self._call(wire.AUTHENTICATE, request, _CALL_S, "")).token
            return self._token


def _metadata(token: str) -> tuple[tuple[str, str], ...]:
    return (("token", token),) if token else ()
