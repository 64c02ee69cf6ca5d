"""A registry server in process that speaks the part of etcd's API that we use: KV, Txn, leases, watch, status.

For development and tests: in memory, one member, loopback only. What it doesn't implement it refuses with a clear
status. Workers and clients talk to it with the very same code as to etcd; only the endpoint differs. Tests can let it
go through what happens to a real one: `compact`, `expire`, `forget`, `stall`.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import grpc

from dynamo_grpc.errors import ConfigurationError
from dynamo_grpc.registry import etcd_pb2 as pb
from dynamo_grpc.registry import wire
from dynamo_grpc.registry.embedded_watch import Watch
from dynamo_grpc.registry.store import Store, StoreError

VERSION = "3.5.0-embedded"
_TICK_S = 0.1


class EmbeddedRegistry:
    """The server. `async with EmbeddedRegistry(port=2379) as server: server.endpoint`.

    Args:
        port: TCP port on 127.0.0.1; 0 takes a free one.
        clock: monotonic seconds, for leases.
    """

    def __init__(self, port: int = 2379, clock: Callable[[], float] = time.monotonic) -> None:
        self.port = port
        self._clock = clock
        self._cluster_id = secrets.randbits(63)  # another one after a restart: watchers must notice an empty store
        self._watches: set[Watch] = set()
        self._calls: set[asyncio.Queue[pb.WatchResponse | None]] = set()
        self._answers = asyncio.Event()
        self._answers.set()
        self.store = Store(self._publish)
        self._server: grpc.aio.Server | None = None
        self._expiry: asyncio.Task[None] | None = None

    @property
    def endpoint(self) -> str:
        """Where clients connect: host:port."""
        return f"127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        server = grpc.aio.server(
            options=(("grpc.so_reuseport", 0), ("grpc.http2.min_ping_interval_without_data_ms", 5_000))
        )
        server.add_generic_rpc_handlers(tuple(self._handlers()))
        try:
            self.port = server.add_insecure_port(self.endpoint)
        except RuntimeError as error:
            raise ConfigurationError(
                f"port {self.port} for the registry is taken: stop what listens there, or choose another port"
            ) from error
        await server.start()
        self._server = server
        self._expiry = asyncio.get_running_loop().create_task(self._expire(), name="lease expiry")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        assert self._expiry is not None
        self._expiry.cancel()
        await asyncio.gather(self._expiry, return_exceptions=True)
        await self._server.stop(None)

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            await self._answers.wait()
            self.store.expire(self._clock())

    # -- what can happen to a real one --------------------------------------------------------------------------------

    def compact(self) -> None:
        """Forget the history: watches can't begin before now."""
        self.store.compact(self.store.revision)

    def expire(self) -> None:
        """End all leases, as if nobody had kept them alive."""
        self.store.expire(math.inf)

    def forget(self, *, keeps_id: bool = False) -> None:
        """Lose everything, as a server that comes back on an empty disk; watches break.

        Args:
            keeps_id: the cluster id stays the same, as it does when etcd is started with the same flags.
        """
        self.store.clear()
        self._watches.clear()
        if not keeps_id:
            self._cluster_id = secrets.randbits(63)
        for responses in self._calls:
            responses.put_nowait(None)

    def stall(self) -> None:
        """Answer nothing until `resume`, as a process that is stopped; leases go on ending, and end then."""
        self._answers.clear()

    def resume(self) -> None:
        """Answer again."""
        self._answers.set()

    def header(self) -> pb.ResponseHeader:
        """The header of a response now."""
        return pb.ResponseHeader(cluster_id=self._cluster_id, member_id=1, revision=self.store.revision, raft_term=1)

    # -- methods ----------------------------------------------------------------------------------------------------

    def _handlers(self) -> list[grpc.GenericRpcHandler]:
        answers: dict[wire.Method, Callable[[Any], Any]] = {
            wire.RANGE: self.store.range,
            wire.PUT: self.store.put,
            wire.DELETE_RANGE: self.store.delete,
            wire.TXN: self.store.txn,
            wire.COMPACT: self._compact,
            wire.LEASE_GRANT: self._grant,
            wire.LEASE_REVOKE: self._revoke,
            wire.LEASE_TIME_TO_LIVE: self._time_to_live,
            wire.LEASE_LEASES: self._leases,
            wire.STATUS: lambda _: pb.StatusResponse(
                version=VERSION, leader=1, raftIndex=self.store.revision, raftTerm=1
            ),
        }
        services: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = {}
        for method, answer in answers.items():
            services.setdefault(method.service, {})[method.name] = grpc.unary_unary_rpc_method_handler(
                self._unary(answer),
                request_deserializer=method.request.FromString,
                response_serializer=method.response.SerializeToString,
            )
        for method, behaviour in ((wire.WATCH, self._watch), (wire.LEASE_KEEP_ALIVE, self._keep_alive)):
            services.setdefault(method.service, {})[method.name] = grpc.stream_stream_rpc_method_handler(
                behaviour,
                request_deserializer=method.request.FromString,
                response_serializer=method.response.SerializeToString,
            )
        own = [grpc.method_handlers_generic_handler(name, methods) for name, methods in services.items()]
        return [*own, _Refusing()]

    def _unary(self, answer: Callable[[Any], Any]) -> Callable[..., Any]:
        async def behaviour(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            await self._answers.wait()
            try:
                response = answer(request)
            except StoreError as error:
                await context.abort(error.code, error.message)
            response.header.CopyFrom(self.header())
            return response

        return behaviour

    def _compact(self, request: pb.CompactionRequest) -> pb.CompactionResponse:
        self.store.compact(request.revision)
        return pb.CompactionResponse()

    def _grant(self, request: pb.LeaseGrantRequest) -> pb.LeaseGrantResponse:
        lease = self.store.grant(request.ID or secrets.randbits(62) | 1, request.TTL, self._clock())
        return pb.LeaseGrantResponse(ID=lease.id, TTL=lease.ttl_s)

    def _revoke(self, request: pb.LeaseRevokeRequest) -> pb.LeaseRevokeResponse:
        self.store.revoke(request.ID)
        return pb.LeaseRevokeResponse()

    def _time_to_live(self, request: pb.LeaseTimeToLiveRequest) -> pb.LeaseTimeToLiveResponse:
        if request.ID not in self.store.leases:
            return pb.LeaseTimeToLiveResponse(ID=request.ID, TTL=-1)
        lease = self.store.leases[request.ID]
        left = max(0, int(lease.expires - self._clock()))
        keys = sorted(lease.keys) if request.keys else ()
        return pb.LeaseTimeToLiveResponse(ID=lease.id, TTL=left, grantedTTL=lease.ttl_s, keys=keys)

    def _leases(self, _: pb.LeaseLeasesRequest) -> pb.LeaseLeasesResponse:
        return pb.LeaseLeasesResponse(leases=[pb.LeaseStatus(ID=lease_id) for lease_id in self.store.leases])

    async def _keep_alive(self, requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        async for request in requests:
            await self._answers.wait()
            ttl_s = self.store.keep_alive(request.ID, self._clock())
            await context.write(pb.LeaseKeepAliveResponse(header=self.header(), ID=request.ID, TTL=ttl_s))

    # -- watch ------------------------------------------------------------------------------------------------------

    def _publish(self, events: list[pb.Event]) -> None:
        for watch in tuple(self._watches):
            watch.offer(events)

    async def _watch(self, requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """One Watch call: several watches, one queue of responses, written in order."""
        responses: asyncio.Queue[pb.WatchResponse | None] = asyncio.Queue()
        self._calls.add(responses)
        watches: dict[int, Watch] = {}

        async def read() -> None:
            async for request in requests:
                await self._answers.wait()
                match request.WhichOneof("request_union"):
                    case "create_request":
                        self._create(request.create_request, watches, responses)
                    case "cancel_request":
                        watch_id = request.cancel_request.watch_id
                        if watch := watches.pop(watch_id, None):
                            self._watches.discard(watch)
                        responses.put_nowait(pb.WatchResponse(header=self.header(), watch_id=watch_id, canceled=True))
                    case "progress_request":
                        responses.put_nowait(pb.WatchResponse(header=self.header(), watch_id=-1))

        reader = asyncio.get_running_loop().create_task(read(), name="watch requests")
        try:
            while True:
                response = await responses.get()
                await self._answers.wait()
                if response is None:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "the registry was started anew")
                await context.write(response)
                if any(watch.is_lagging for watch in watches.values()):
                    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the watcher does not read")
        finally:
            reader.cancel()
            self._calls.discard(responses)
            self._watches -= set(watches.values())

    def _create(
        self,
        request: pb.WatchCreateRequest,
        watches: dict[int, Watch],
        responses: asyncio.Queue[pb.WatchResponse | None],
    ) -> None:
        watch_id = request.watch_id or max(watches, default=-1) + 1
        if watch_id in watches:
            reason = "etcdserver: mvcc: duplicate watch ID provided on the WatchStream"
            responses.put_nowait(
                pb.WatchResponse(header=self.header(), watch_id=-1, created=True, canceled=True, cancel_reason=reason)
            )
            return
        responses.put_nowait(pb.WatchResponse(header=self.header(), watch_id=watch_id, created=True))
        if 0 < request.start_revision <= self.store.compacted:
            compacted = pb.WatchResponse(
                header=self.header(),
                watch_id=watch_id,
                canceled=True,
                compact_revision=self.store.compacted + 1,
                cancel_reason="etcdserver: mvcc: required revision has been compacted",
            )
            responses.put_nowait(compacted)
            return
        watch = watches[watch_id] = Watch(watch_id, request, self.header, responses)
        if request.start_revision:
            watch.offer(self.store.since(request.start_revision))
        self._watches.add(watch)


class _Refusing(grpc.GenericRpcHandler):
    """Says what is missing: gRPC's own answer names neither the method nor who lacks it."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        method = handler_call_details.method

        async def refuse(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            text = f"the embedded registry has no {method}: it is for development, use etcd for the rest of its API"
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, text)

        return grpc.unary_unary_rpc_method_handler(refuse)
