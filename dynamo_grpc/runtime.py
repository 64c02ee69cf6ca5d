"""The runtime of a process: registry, connections, server, and the way from a name to an endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from google.protobuf import timestamp_pb2

from dynamo_grpc.admission import MAX_QUEUED, Admission
from dynamo_grpc.canary import Canary
from dynamo_grpc.cards import Model
from dynamo_grpc.client import Client
from dynamo_grpc.closing import AsyncClosing
from dynamo_grpc.connections import Connections
from dynamo_grpc.control import Load
from dynamo_grpc.delivery import Delivery
from dynamo_grpc.discovery import open_registry
from dynamo_grpc.endpoint import Endpoint, Namespace
from dynamo_grpc.errors import ConfigurationError
from dynamo_grpc.handlers import Handler
from dynamo_grpc.lifecycle import State
from dynamo_grpc.names import INSTANCES, EndpointName, check_part
from dynamo_grpc.records import InstanceRecord, decode_instance, holding, refusal, to_entries
from dynamo_grpc.registry import Registration, Registry, View
from dynamo_grpc.server import Served, Server, advertised_address
from dynamo_grpc.telemetry import flush, is_recording
from dynamo_grpc.v1 import model_card_pb2
from dynamo_grpc.version import __version__

logger = logging.getLogger(__name__)

_R = TypeVar("_R")


class DistributedRuntime(AsyncClosing):
    """What a process has of the mesh. Nothing is opened before it is used; `aclose` (or `async with`) closes it.

    Args:
        event_loop: for callers used to Dynamo; the running loop is used.
        discovery_backend: `etcd`, `static` or `memory`; by default `DYN_DISCOVERY_BACKEND`, or etcd.
        request_plane: for callers used to Dynamo; requests travel by gRPC.
        registry: a registry object in place of a backend's name.
        host: address to listen on, default `DYN_HOST` or loopback.
        port: port to listen on, default `DYN_PORT` or a free one.
        advertise: HOST[:PORT] that others use, default `DYN_ADVERTISE` or where we listen.
        delivery: whether outputs come in shared frames where the worker can, default `DYN_DELIVERY` or yes.
    """

    def __init__(
        self,
        event_loop: asyncio.AbstractEventLoop | None = None,
        discovery_backend: str | None = None,
        request_plane: str | bool | None = None,
        *,
        registry: Registry | None = None,
        host: str | None = None,
        port: int | None = None,
        advertise: str | None = None,
        delivery: bool | None = None,
    ) -> None:
        if request_plane is True:
            raise ConfigurationError(
                "is_static=True is not supported: name the workers with discovery_backend='static' and DYN_STATIC"
            )
        if isinstance(request_plane, str) and request_plane != "grpc":
            raise ConfigurationError(f"request_plane={request_plane!r} is not supported: requests travel by gRPC alone")
        self._registry = registry
        self._backend = discovery_backend or ""
        self.connections = Connections(has_lanes=delivery)
        self.delivery = Delivery(self.connections)
        self.server = Server(
            host if host is not None else os.environ.get("DYN_HOST", "127.0.0.1"),
            port if port is not None else int(_number("DYN_PORT", 0)),
        )
        self.server.on_drain = self._on_drain
        self._advertise = advertise if advertise is not None else os.environ.get("DYN_ADVERTISE", "")
        self.instance_id = secrets.randbits(63) | 1
        self.drain_limit_s = _number("DYN_WORKER_GRACEFUL_SHUTDOWN_TIMEOUT", 30)
        self._models: dict[EndpointName, Model] = {}
        self._clients: list[Client] = []
        self._shutdown = asyncio.Event()
        self._start_lock = asyncio.Lock()
        self._registrations: set[Registration] = set()
        self._num_serving = 0
        self._is_drained = asyncio.Event()

    # -- names --------------------------------------------------------------------------------------------------------

    def namespace(self, name: str) -> Namespace:
        """A namespace of the mesh."""
        return Namespace(self, check_part("namespace", name))

    def endpoint(self, name: str) -> Endpoint:
        """An endpoint by its full name, `namespace.component.endpoint`, with or without `dyn://`."""
        return Endpoint(self, EndpointName.parse(name))

    @property
    def registry(self) -> Registry:
        """The registry; made on first use."""
        if self._registry is None:
            self._registry = open_registry(self._backend)
        self.server.registry = self._registry
        return self._registry

    # -- life ---------------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """Begin to end: endpoints leave the registry, finish what runs, and `serve_endpoint` returns."""
        self.server.is_leaving = True
        self._shutdown.set()

    @property
    def is_shutting_down(self) -> bool:
        """Whether `shutdown` was called."""
        return self._shutdown.is_set()

    @property
    def is_serving(self) -> bool:
        """Whether any endpoint is served."""
        return self._num_serving > 0

    def enter_serving(self) -> None:
        """One more endpoint is served: signals then begin a shutdown and cancel nothing."""
        self._num_serving += 1

    def leave_serving(self) -> None:
        """One fewer is."""
        self._num_serving -= 1

    async def wait_for_shutdown(self) -> None:
        """Return when `shutdown` was called."""
        await self._shutdown.wait()

    def _on_drain(self, limit_s: float | None) -> None:
        if limit_s is not None:
            self.drain_limit_s = limit_s
        self.shutdown()

    async def start_server(self) -> None:
        """Bind the port, if that hasn't been done."""
        async with self._start_lock:
            if not self.server.is_started:
                await self.server.start()

    async def orphan(self) -> None:
        """Do nothing for what is registered any more, as if the process were gone."""
        for registration in self._registrations:
            await registration.orphan()

    async def aclose(self) -> None:
        """Close everything. Requests that run are cancelled."""
        self.shutdown()
        for registration in tuple(self._registrations):
            await registration.close()
        await self.server.stop()
        for client in self._clients:
            await client.close()
        self._clients.clear()
        await self.delivery.close()
        await self.connections.close()
        if self._registry is not None:
            await self._registry.close()
        if is_recording():
            await asyncio.to_thread(flush)  # signals may end the process before the SDK's own exit handler

    # -- serving ------------------------------------------------------------------------------------------------------

    def set_model(self, name: EndpointName, model: Model) -> None:
        """The endpoint `name` serves this model."""
        self._models[name] = model

    async def serve(
        self,
        name: EndpointName,
        handler: Callable[..., Any],
        *,
        graceful_shutdown: bool = True,
        labels: Mapping[str, str] | None = None,
        health_check_payload: Any = None,
        gives_dicts: bool = True,
        max_concurrent: int | None = None,
        max_queued: int | None = None,
        load: Callable[[], Load] | None = None,
        on_ready: Callable[[Served], None] | None = None,
    ) -> None:
        """Serve an endpoint until shutdown; see `Endpoint.serve_endpoint`."""
        normal = Handler(handler)
        model = self._models.get(name)
        self.enter_serving()
        try:
            await self.start_server()
            served = Served(
                instance=self._instance(name, model, labels or {}),
                handler=normal,
                card=model.card if model else None,
                files=model.files if model else {},
                gives_dicts=gives_dicts,
                is_graceful=graceful_shutdown,
                load=load,
                metrics=self.server.metrics_of(str(name)),
            )
            served.admission = self._admission(served, max_concurrent, max_queued)
            if str(name) in self.server.served:
                raise ConfigurationError(f"endpoint {name} is served already in this process")
            self.server.served[str(name)] = served
            await self._serve_until_shutdown(name, served, health_check_payload, on_ready)
        finally:
            self.leave_serving()

    @staticmethod
    def _admission(served: Served, max_concurrent: int | None, max_queued: int | None) -> Admission:
        """What may run and wait.

        Raises:
            ConfigurationError: that can't be.
        """
        if max_concurrent is not None and max_concurrent < 1:
            raise ConfigurationError(f"max_concurrent={max_concurrent} should be 1 or more, or None for no limit")
        if max_queued is not None and (max_concurrent is None or max_queued < 0):
            raise ConfigurationError(f"max_queued={max_queued} should be 0 or more, beside max_concurrent")
        where = f"worker {served.instance.address} ({served.name})"
        return Admission(max_concurrent, MAX_QUEUED if max_queued is None else max_queued, lambda: where)

    def _instance(self, name: EndpointName, model: Model | None, labels: Mapping[str, str]) -> model_card_pb2.Instance:
        registered_at = timestamp_pb2.Timestamp()
        registered_at.GetCurrentTime()
        return model_card_pb2.Instance(
            namespace=name.namespace,
            component=name.component,
            endpoint=name.endpoint,
            instance_id=self.instance_id,
            address=advertised_address(self._advertise, self.server.host, self.server.port),
            epoch=1,
            registered_at=registered_at,
            kind=model_card_pb2.ENDPOINT_KIND_MODEL if model else model_card_pb2.ENDPOINT_KIND_GENERIC,
            model=model.card.name if model else "",
            card_checksum=model.card.checksum if model else "",
            version=__version__,
            labels=labels,
        )

    async def _serve_until_shutdown(
        self, name: EndpointName, served: Served, payload: Any, on_ready: Callable[[Served], None] | None
    ) -> None:
        async with contextlib.AsyncExitStack() as stack:
            canary = Canary.from_environment(served, payload) if payload is not None else None
            if canary is not None and not await self.or_shutdown(canary.wait_healthy()):
                return
            registration = await self.registry.register(to_entries(served.instance, served.card), served.renew)
            self._registrations.add(registration)
            stack.push_async_callback(self._leave, name, registration)
            if served.card:
                instances = View.start(self.registry, f"{INSTANCES}{name.namespace}/", decode_instance)
                stack.push_async_callback(instances.close)
                tasks = await stack.enter_async_context(asyncio.TaskGroup())
                instances.subscribe(lambda _: self._check_card(served, instances, tasks))
            if await self.or_shutdown(registration.wait_registered()):
                served.is_ready = True
                self.server.lifecycle.move(State.READY)
                if served.card:
                    await self.or_shutdown(instances.wait_ready())  # whose card holds is known from here on
                await self.server.update_health()
                if not served.refused_because:
                    logger.info("endpoint %s is ready at %s", name, served.instance.address)
                if on_ready:
                    on_ready(served)
                if canary is not None:
                    stack.callback(asyncio.ensure_future(canary.run(self.server.update_health)).cancel)
                await self._shutdown.wait()
                logger.info("endpoint %s leaves; %d requests run", name, len(self.server.requests))
        await self._drain()

    async def _leave(self, name: EndpointName, registration: Registration) -> None:
        """However serving an endpoint ends: it is not listed any more, and others don't wait for it."""
        if not self._shutdown.is_set():  # before it leaves the registry: who asks then is not told that it serves
            self.server.served.pop(str(name), None)
        await registration.close()
        self._registrations.discard(registration)

    async def or_shutdown(self, work: Awaitable[None]) -> bool:
        """Whether `work` was done before the shutdown."""
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(self._shutdown.wait())
        try:
            await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
            return task.done()
        finally:
            task.cancel()
            stop.cancel()

    def _check_card(self, served: Served, instances: View[InstanceRecord], tasks: asyncio.TaskGroup) -> None:
        """Refuse to serve while another card holds for the model's name."""
        same = (r for r in instances.records.values() if r.instance.model == served.instance.model)
        reason = refusal(served.instance, holding(same))
        if reason == served.refused_because:
            return
        served.refused_because = reason
        if reason:
            logger.error("refused, waiting without traffic: %s", reason)
        else:
            logger.info("no longer refused: the model card of %r holds now", served.instance.model)
        if not self._shutdown.is_set():
            tasks.create_task(self.server.update_health())

    async def _drain(self) -> None:
        """Once for all endpoints of the process: each calls it when it has left the registry."""
        if self._registrations:
            await self._is_drained.wait()
            return
        limit_s = self.drain_limit_s
        if self.server.requests:
            logger.info("draining: %d requests may run on, for %g s at most", len(self.server.requests), limit_s)
        await self.server.drain(limit_s)
        await self.server.stop()
        logger.info("stopped")
        self._is_drained.set()


def _number(name: str, default: float) -> float:
    text = os.environ.get(name) or str(default)
    try:
        return float(text)
    except ValueError:
        raise ConfigurationError(f"{name}={text!r} must be a number") from None
