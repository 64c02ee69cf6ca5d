"""Register a grpc.aio server that is not ours: a plain servicer of the generated classes is routed like any worker."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc

from dynamo_grpc import health
from dynamo_grpc.cards import load_model
from dynamo_grpc.control import ControlServicer
from dynamo_grpc.entry import stop_signals
from dynamo_grpc.errors import UnsupportedError
from dynamo_grpc.handlers import Handler
from dynamo_grpc.lifecycle import State
from dynamo_grpc.names import EndpointName
from dynamo_grpc.records import to_entries
from dynamo_grpc.runtime import DistributedRuntime
from dynamo_grpc.server import Served, Server
from dynamo_grpc.services import CONTROL, INFERENCE
from dynamo_grpc.status import abort
from dynamo_grpc.v1 import control_pb2_grpc


@contextlib.asynccontextmanager
async def register_server(
    server: grpc.aio.Server,
    port: int,
    model_path: str | Path | None,
    *,
    endpoint: str = "dynamo.backend.generate",
    host: str = "127.0.0.1",
    advertise: str = "",
    count_requests: Callable[[], int] | None = None,
    **model: Any,
) -> AsyncIterator[DistributedRuntime]:
    """Start a server that has an `InferenceServicer`, with health, reflection and Control added, and register it.

    Args:
        server: made with `dynamo_grpc.server.SERVER_OPTIONS` or options of your own, not started.
        port: what `add_insecure_port` gave.
        model_path: the model's folder, as for a Worker.
        count_requests: how many requests run now: what `ps` and `Control.Describe` tell.
        model: as `dynamo_grpc.cards.load_model` takes them: model_name, model_type, capabilities …

    Yields:
        the runtime: wait for its shutdown, which SIGTERM and SIGINT begin. The server is in the registry while inside,
        and drained at the end.
    """
    name = EndpointName.parse(endpoint)
    loaded = load_model(model_path, **model)
    async with (
        DistributedRuntime(host=host, port=port, advertise=advertise) as runtime,
        contextlib.AsyncExitStack() as stack,
    ):
        own = Server(host, port)
        own.on_drain, own.registry = runtime.server.on_drain, runtime.registry
        runtime.set_model(name, loaded)
        served = Served(runtime._instance(name, loaded, {}), Handler(_unused), loaded.card, loaded.files)
        own.served[str(name)] = served
        control_pb2_grpc.add_ControlServicer_to_server(_Control(own, count_requests), server)  # type: ignore[abstract]
        servicer = health.add_health(server)
        health.add_reflection(server, [INFERENCE, CONTROL])
        await servicer.set("", health.NOT_SERVING)
        await server.start()
        registration = await runtime.registry.register(to_entries(served.instance, loaded.card), served.renew)
        stack.callback(runtime.leave_serving)
        runtime.enter_serving()
        task = asyncio.current_task()
        assert task is not None
        stack.enter_context(stop_signals(runtime, task))
        try:
            if await runtime.or_shutdown(registration.wait_registered()):
                own.lifecycle.move(State.READY)
                for service in ("", INFERENCE, f"model/{loaded.card.name}"):
                    await servicer.set(service, health.SERVING)
            yield runtime
        finally:
            own.is_leaving = True
            await registration.close()
            await servicer.enter_graceful_shutdown()
            await server.stop(runtime.drain_limit_s)


class _Control(ControlServicer):
    def __init__(self, server: Server, count_requests: Callable[[], int] | None) -> None:
        super().__init__(server)
        self._count_requests = count_requests

    async def Describe(self, request: Any, context: Any) -> Any:
        response = await super().Describe(request, context)
        if self._count_requests is not None:
            response.num_requests = self._count_requests()
        return response

    async def Stop(self, request: Any, context: Any) -> Any:
        # the servicer's requests are its own: who asks cancels the call instead
        await abort(context, UnsupportedError("this worker ends requests by cancel alone"))


async def _unused(request: Any) -> None:
    """The servicer of the given server answers, not a handler of ours."""
