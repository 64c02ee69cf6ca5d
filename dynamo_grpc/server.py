"""The gRPC server of a worker: Inference, Endpoint and Control over its endpoints, and the standard services."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from dynamo_grpc import health
from dynamo_grpc.admission import Admission
from dynamo_grpc.connections import KEEPALIVE_OPTIONS, MAX_MESSAGE_BYTES
from dynamo_grpc.control import ControlServicer, Load
from dynamo_grpc.errors import (
    ConfigurationError,
    DrainingError,
    EndpointNotFoundError,
    MeshError,
    ModelNotFoundError,
    NotReadyError,
    WrongInstanceError,
    names,
)
from dynamo_grpc.handlers import Handler
from dynamo_grpc.lifecycle import Lifecycle, State
from dynamo_grpc.metadata import INSTANCE_ID
from dynamo_grpc.names import nearest
from dynamo_grpc.orca import LoadMeter, add_open_rca
from dynamo_grpc.records import endpoint_of, to_entries
from dynamo_grpc.registry import Registry
from dynamo_grpc.requests import Requests
from dynamo_grpc.services import CONTROL, ENDPOINT, INFERENCE, EndpointServicer, InferenceServicer, handler_in
from dynamo_grpc.v1 import (
    control_pb2_grpc,
    endpoint_pb2_grpc,
    inference_pb2_grpc,
    model_card_pb2,
)
from dynamo_grpc.watchdog import Watchdog

if TYPE_CHECKING:
    from dynamo_grpc.metrics import EndpointMetrics, ServerMetrics

logger = logging.getLogger(__name__)

#: How long what was sent last may take to leave.
_STOP_S = 1.0
#: How long handlers may take to end that were handed over.
_HAND_OVER_S = 2.0

SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second worker on the port is an error, not a thief of streams
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # else pings end a stream that is silent for 30 s
    ("grpc.keepalive_permit_without_calls", 1),
    *KEEPALIVE_OPTIONS,  # a client that is frozen, or whose host is gone, holds no turn
)


@dataclass(slots=True)
class Served:
    """An endpoint of this process.

    Attributes:
        gives_dicts: the handler takes and yields dicts (functions) rather than messages (Worker subclasses).
        files: of the model card, by hash.
        is_graceful: when the worker leaves, its requests may run on to the limit; else they are handed over at once.
        load: what its engine says of itself.
        metrics: where its figures go.
        refused_because: another model card holds.
        sick_because: its health check fails.
    """

    instance: model_card_pb2.Instance
    handler: Handler
    card: model_card_pb2.ModelCard | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    gives_dicts: bool = True
    is_graceful: bool = True
    admission: Admission = field(default_factory=Admission)
    load: Callable[[], Load] | None = None
    refused_because: str = ""
    sick_because: str = ""
    is_ready: bool = False
    metrics: EndpointMetrics | None = None

    @property
    def why_not(self) -> str:
        """Why it serves nothing, in a sentence; empty when it does."""
        return self.refused_because or (f"its health check fails: {self.sick_because}" if self.sick_because else "")

    def renew(self) -> dict[str, bytes]:
        """What is registered after the lease was lost: the same instance in a new epoch."""
        self.instance.epoch += 1
        self.instance.registered_at.GetCurrentTime()
        return to_entries(self.instance, self.card)

    @property
    def name(self) -> str:
        """Its full name."""
        return endpoint_of(self.instance)


class Server:
    """The server of one process.

    Args:
        host: address to listen on.
        port: 0 takes a free one.

    Attributes:
        registry: where its endpoints are registered; it is only told of, not used.
        is_leaving: it is about to leave the registry, or has left; requests may still be taken.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.host, self.port = host, port
        self.registry: Registry | None = None
        self.is_leaving = False
        self.lifecycle = Lifecycle()
        self.served: dict[str, Served] = {}
        self.meter = LoadMeter(self._load)
        self.requests = Requests(self._refuse, self.notify, self.meter)
        self.changed = asyncio.Condition()
        self.metrics: ServerMetrics | None = None
        self._endpoint_metrics: dict[str, EndpointMetrics] = {}
        self.on_drain: Callable[[float | None], None] | None = None
        self._server: grpc.aio.Server | None = None
        self._health: health.HealthServicer | None = None
        self._watchdog: Watchdog | None = None
        self._extra: list[tuple[Callable[[grpc.aio.Server], None], tuple[str, ...]]] = []

    def metrics_of(self, endpoint: str) -> EndpointMetrics:
        """The metrics of an endpoint, by its full name; it need not be served yet."""
        from dynamo_grpc.metrics import EndpointMetrics

        if endpoint not in self._endpoint_metrics:
            self._endpoint_metrics[endpoint] = EndpointMetrics()
        return self._endpoint_metrics[endpoint]

    @property
    def is_started(self) -> bool:
        """Whether the port is bound."""
        return self._server is not None

    def add_servicer(self, add: Callable[[grpc.aio.Server], None], *services: str) -> None:
        """Serve a service of your own protos too.

        Args:
            add: `lambda server: add_MyServicer_to_server(MyServicer(), server)`.
            services: full names, for reflection.
        """
        if self.is_started:
            raise ConfigurationError("add a servicer before the first endpoint is served")
        self._extra.append((add, services))

    async def start(self) -> None:
        """Bind the port and answer; everything is NOT_SERVING until an endpoint is ready.

        Raises:
            ConfigurationError: the port is taken.
        """
        from dynamo_grpc.metrics import ServerMetrics  # clients don't need it

        self.metrics = ServerMetrics(self)
        server = grpc.aio.server(options=SERVER_OPTIONS)
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(self), server)  # type: ignore[abstract]
        endpoint_pb2_grpc.add_EndpointServicer_to_server(EndpointServicer(self), server)
        control_pb2_grpc.add_ControlServicer_to_server(ControlServicer(self), server)  # type: ignore[abstract]
        self._health = health.add_health(server)
        add_open_rca(server, self.meter)
        for add, _ in self._extra:
            add(server)
        own = [name for _, services in self._extra for name in services]
        health.add_reflection(server, [INFERENCE, ENDPOINT, CONTROL, *own])
        self.port = bind(server, self.host, self.port)
        await self.update_health()
        await server.start()
        self._server = server
        self._watchdog = Watchdog(lambda: len(self.requests) > 0, handler_in)

    async def update_health(self) -> None:
        """Say what serves: the process, each service, each model."""
        assert self._health is not None
        is_ready = self.lifecycle.state is State.READY
        states = {"": is_ready, INFERENCE: False, ENDPOINT: False}
        for served in self.served.values():
            serves = is_ready and served.is_ready and not served.why_not
            service = INFERENCE if served.card else ENDPOINT
            states[service] = states[service] or serves
            if served.card:
                states[f"model/{served.card.name}"] = serves
        if self.served and all(served.why_not for served in self.served.values()):
            states[""] = False
        for name, serves in states.items():
            await self._health.set(name, health.SERVING if serves else health.NOT_SERVING)
        await self.notify()

    def _load(self) -> tuple[dict[str, float], float | None]:
        """What runs and waits, and how full the fullest endpoint is, if it has a limit."""
        waiting = sum(served.admission.num_waiting for served in self.served.values())
        counts = Counter(running.served.name for running in self.requests if running.served is not None)
        fullness = [
            counts[name] / served.admission.max_concurrent
            for name, served in self.served.items()
            if served.admission.max_concurrent
        ]
        named: dict[str, float] = {"num_running": max(0, len(self.requests) - waiting), "num_waiting": waiting}
        return named, max(fullness, default=None)

    async def notify(self) -> None:
        """Tell those who wait for a change of load or state."""
        async with self.changed:
            self.changed.notify_all()

    async def drain(self, limit_s: float) -> None:
        """Refuse new requests, and give the running ones at most `limit_s`; then hand over what is left.

        Those that still wait for their turn, and those of endpoints that aren't graceful, are handed over at once.
        """
        self.lifecycle.move(State.DRAINING)
        if self._server is None:
            return
        for served in self.served.values():
            served.admission.close(_draining())
        await self.update_health()
        self.requests.hand_over(lambda r: r.served is None or not r.served.is_graceful, "this worker leaves")
        if not await self._wait_idle(limit_s):
            num = self.requests.hand_over(lambda _: True, f"this worker leaves, and its {limit_s:g} s are over")
            logger.warning("%d requests still ran after %g s and are handed over", num, limit_s)
        await self._wait_idle(_HAND_OVER_S)

    async def _wait_idle(self, limit_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s), self.changed:
                await self.changed.wait_for(lambda: not self.requests)
        return not self.requests

    async def stop(self) -> None:
        """Close the port and end all calls."""
        self.lifecycle.move(State.STOPPED)
        server, self._server = self._server, None
        if self._watchdog is not None:
            self._watchdog.close()
        if server is not None:
            for lane in self.requests.lanes.values():
                lane.finish()
            await server.stop(_STOP_S if not self.requests else None)

    # -- finding what a request is for --------------------------------------------------------------------------------

    def model(self, name: str) -> Served:
        """Who serves the model `name` (the only one if it is empty).

        Raises:
            ModelNotFoundError: names those there are.
        """
        models = [served for served in self.served.values() if served.card]
        if not name and len(models) == 1:
            return models[0]
        for served in models:
            if served.card and name in (served.card.name, *served.card.aliases):
                return served
        known = sorted(served.card.name for served in models if served.card)
        said = f"no model {name!r}" if name else "several models, none named"
        raise ModelNotFoundError(f"{said} at this worker: it serves {names(known)}", param="model")

    def endpoint(self, name: str) -> Served:
        """Who serves the endpoint `name` (the only one if it is empty).

        Raises:
            EndpointNotFoundError: names the nearest.
        """
        if not name and len(self.served) == 1:
            return next(iter(self.served.values()))
        if served := self.served.get(name.removeprefix("dyn://")):
            return served
        hint = nearest(name, self.served)
        raise EndpointNotFoundError(
            f"no endpoint {name!r} at this worker: it serves {names(sorted(self.served))}"
            + (f" (did you mean {hint!r}?)" if hint else ""),
            param="endpoint",
        )

    def _refuse(self, metadata: Mapping[str, str]) -> MeshError | None:
        """Why a request is not taken now, if it isn't."""
        wanted_instance = metadata.get(INSTANCE_ID)
        if self.lifecycle.state in (State.DRAINING, State.STOPPED):
            return _draining()
        if self.lifecycle.state is State.STARTING and not self.served:
            return NotReadyError("this worker is starting: try another instance")
        ours = {f"{served.instance.instance_id:016x}" for served in self.served.values()}
        if wanted_instance and wanted_instance not in ours:
            return WrongInstanceError(f"instance {wanted_instance} is gone, another process has its address")
        return None


def authority(host: str, port: int) -> str:
    """Host and port as addresses have them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind(server: grpc.aio.Server, host: str, port: int) -> int:
    """Listen; gives the port.

    Raises:
        ConfigurationError: it is taken.
    """
    try:
        return server.add_insecure_port(authority(host, port))
    except RuntimeError as error:
        text = f"can't listen on {authority(host, port)}: the port is taken, or the host is not ours"
        raise ConfigurationError(text) from error


def _draining() -> DrainingError:
    return DrainingError("this worker is draining: try another instance")


def advertised_address(advertise: str, host: str, port: int) -> str:
    """The address that others reach this server at.

    Raises:
        ConfigurationError: it listens on all addresses and nobody said which one others should use.
    """
    if advertise:
        address = advertise if ":" in advertise else f"{advertise}:{port}"
        if not address.rpartition(":")[2].isdigit():
            raise ConfigurationError(f"--advertise {advertise} should be HOST or HOST:PORT")
        return address
    if host in ("0.0.0.0", "::"):  # noqa: S104
        pod_ip = os.environ.get("POD_IP", "")
        if not pod_ip:
            raise ConfigurationError(
                f"--host {host} needs --advertise HOST[:PORT]: which address do others reach it at?"
            )
        return f"{pod_ip}:{port}"
    return authority(host, port)
