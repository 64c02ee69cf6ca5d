"""The frontend's gRPC port: the Inference service that workers speak, for clients of any language, without a registry.

A request is routed, moved, cancelled, limited, counted and logged as one over HTTP is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence

import grpc
from opentelemetry import trace

from dynamo_frontend.answer import LOOK_S, STALL_S
from dynamo_frontend.catalog import Catalog, Model
from dynamo_frontend.metrics import Metrics
from dynamo_frontend.record import Record, shown_name
from dynamo_frontend.serving import Serving, told_of
from dynamo_frontend.settings import FrontendSettings
from dynamo_grpc import (
    Context,
    DeadlineError,
    DrainingError,
    EngineShutdown,
    MeshError,
    ModelNotFoundError,
    RequestCancelledError,
    RouterMode,
    SlowReaderError,
    health,
)
from dynamo_grpc.errors import names
from dynamo_grpc.orca import LoadMeter, add_open_rca
from dynamo_grpc.requests import Requests, Running
from dynamo_grpc.server import SERVER_OPTIONS, bind
from dynamo_grpc.services import INFERENCE

#: How long what was sent last may take to leave.
_STOP_S = 1.0
#: A connection whose time is over may finish its streams for so long.
_AGE_GRACE_S = 3600.0

Work = Callable[[Record, Model], Awaitable[None]]


class Ingress:
    """The server.

    Args:
        add_services: adds the services to the server; gives their names.

    Attributes:
        port: that it listens on.
        requests: those that run.
        num_streams: calls that carry requests, and are none themselves.
    """

    def __init__(
        self,
        settings: FrontendSettings,
        metrics: Metrics,
        serving: Serving,
        catalog: Callable[[], Catalog],
        add_services: Callable[[grpc.aio.Server, Ingress], Sequence[str]],
    ) -> None:
        self._settings, self._metrics, self._serving, self.catalog = settings, metrics, serving, catalog
        self._add_services = add_services
        self._meter = LoadMeter(self._load)
        self.requests = Requests(lambda _: self._refusal(), self._tell_empty, self._meter)
        self.is_draining = False
        self.port = 0
        self._empty, self._is_hurried = asyncio.Event(), False
        self.num_streams = 0
        self._held: dict[Running, list[tuple[Record, contextlib.ExitStack]]] = {}
        self._server: grpc.aio.Server | None = None
        self._health: health.HealthServicer | None = None
        self._watching: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._told_models: set[str] = set()

    async def start(self) -> None:
        """Bind the port, and answer.

        Raises:
            ConfigurationError: the port is taken.
        """
        settings = self._settings
        assert settings.grpc_port is not None
        own = {
            "grpc.so_reuseport": int(settings.shares_grpc_port),
            "grpc.max_receive_message_length": settings.max_body_bytes,
        }
        if settings.grpc_max_connection_age_s:  # clients behind a balancer look for others now and then
            own["grpc.max_connection_age_ms"] = int(settings.grpc_max_connection_age_s * 1000)
            own["grpc.max_connection_age_grace_ms"] = int(_AGE_GRACE_S * 1000)
        server = grpc.aio.server(options=tuple((dict(SERVER_OPTIONS) | own).items()))
        services = self._add_services(server, self)
        self._health = health.add_health(server)
        add_open_rca(server, self._meter)
        health.add_reflection(server, list(services))
        self.port = bind(server, settings.grpc_host, settings.grpc_port)
        await self._update_health()
        await server.start()
        self._server = server
        self._watching = asyncio.get_running_loop().create_task(self._watch(), name="health of the gRPC port")

    async def _watch(self) -> None:
        while True:
            await self.catalog().wait_changed()
            await self._update_health()

    async def _update_health(self) -> None:
        """Say what can be asked: the process, each model."""
        assert self._health is not None
        ready = set() if self.is_draining else {f"model/{model.card.name}" for model in self.catalog().ready()}
        states = dict.fromkeys(self._told_models, False) | {"": bool(ready), INFERENCE: bool(ready)}
        self._told_models = ready
        for name, serves in (states | dict.fromkeys(ready, True)).items():
            await self._health.set(name, health.SERVING if serves else health.NOT_SERVING)

    async def say_draining(self) -> None:
        """Health says that it is about to end; requests are still taken."""
        self.is_draining = True
        if self._health is not None:
            await self._update_health()

    async def stop(self, limit_s: float) -> None:
        """Take no more requests, let those that run finish within the (first) limit, and end."""
        if self._stopping is None:
            self._stopping = asyncio.get_running_loop().create_task(self._stop(limit_s), name="end of the gRPC port")
        await asyncio.shield(self._stopping)

    async def _stop(self, limit_s: float) -> None:
        server = self._server
        if server is None:
            return
        if self._watching is not None:
            self._watching.cancel()
        await self.say_draining()  # what comes from here on is refused, and told where to go
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while self._held and not self._is_hurried:  # a stream on which nothing runs holds nobody up
                    self._empty.clear()
                    await self._empty.wait()
        for running in self.requests:
            running.end(EngineShutdown("the frontend is shutting down: send the request again"))
        await server.stop(_STOP_S)

    def _load(self) -> tuple[dict[str, float], float | None]:
        num = max(self._serving.num_running, len(self.requests) - self.num_streams)
        return {"num_running": num}, num / limit if (limit := self._settings.max_requests) else None

    @property
    def router_mode(self) -> RouterMode:
        """How requests are spread."""
        return self._settings.router_mode

    @contextlib.contextmanager
    def stall_watch(self, running: Running, num_sent: Callable[[], int]) -> Iterator[None]:
        """End a call whose client takes nothing for STALL_S, while inside."""
        loop = asyncio.get_running_loop()
        seen, since = -1, loop.time()
        timer: asyncio.TimerHandle

        def look() -> None:
            nonlocal timer, seen, since
            if not running.sender.is_writing or num_sent() != seen:
                seen, since = num_sent(), loop.time()
            elif loop.time() - since >= STALL_S:
                self._give_up(running, SlowReaderError(f"the client took nothing for {STALL_S:.0f} s"))
            timer = loop.call_later(LOOK_S, look)

        timer = loop.call_later(LOOK_S, look)
        try:
            yield
        finally:
            timer.cancel()

    async def _tell_empty(self) -> None:
        self._empty.set()

    def hurry(self) -> None:
        """Don't wait for what runs."""
        self._is_hurried = True
        self._empty.set()

    def _refusal(self) -> MeshError | None:
        return _leaving() if self._stopping is not None else None

    async def account(
        self,
        running: Running,
        label: str,
        model: str,
        work: Work,
        *,
        is_stream: bool = False,
        context: Context | None = None,
    ) -> None:
        """Do one request's work: its model is found, there is room, and how it ended is written down.

        Args:
            context: the request's, if it isn't the call's: several may come by one call.
        """
        context = context or running.context
        if refused := self._refusal():  # one of a stream that was open before
            raise refused
        record = Record(self._metrics, context.id(), label, shown_name(model), is_stream=is_stream)
        record.span = trace.get_current_span()
        self._serving.book.add(record)
        held = contextlib.ExitStack()
        held.callback(record.end)
        self._held.setdefault(running, []).append((record, held))
        try:
            held.enter_context(self._serving.room())
            await work(record, await self._serving.find(record, self._name(model)))
        except asyncio.CancelledError:
            is_late = context.remaining_s() == 0.0
            ended = DeadlineError if is_late else RequestCancelledError
            record.fail(running.ended_by or ended("the client's call has ended"))
            raise
        except Exception as error:
            told = told_of(error, context.id())
            record.fail(told)
            raise told from error
        finally:
            held.close()
            self._held[running].remove((record, held))
            if not self._held[running]:
                del self._held[running]
                self._empty.set()

    def _give_up(self, running: Running, error: MeshError) -> None:
        """End a call whose client takes nothing. Its write may hang for as long as the client is there; its places are
        free now, and its workers.
        """
        running.end(error)
        for record, held in self._held.get(running, ()):
            record.fail(error)
            held.close()

    def _name(self, name: str) -> str:
        """Of the model that is meant: the only one, if none is named."""
        known = sorted(model.card.name for model in self.catalog().all())
        if name or not known:
            return name
        if len(known) > 1:
            raise ModelNotFoundError(f"several models, none named: there is {names(known)}", param="model")
        return known[0]


def _leaving() -> DrainingError:
    return DrainingError("the frontend is shutting down: send the request again")
