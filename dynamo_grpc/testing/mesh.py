"""A mesh inside one process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dynamo_grpc.cards import Model
from dynamo_grpc.client import Client
from dynamo_grpc.names import EndpointName
from dynamo_grpc.registry.base import Registry
from dynamo_grpc.registry.memory import MemoryRegistry
from dynamo_grpc.routing import RouterMode
from dynamo_grpc.runtime import DistributedRuntime
from dynamo_grpc.server import Served
from dynamo_grpc.worker import Worker, WorkerSettings, folder_of, model_of, serve_options


class Mesh:
    """Serve handlers and workers, and call them, over real gRPC on free ports.

    Example:
        async with Mesh() as mesh:
            await mesh.serve("demo.backend.generate", my_handler)
            client = await mesh.client("demo.backend.generate")
            async for item in await client.generate("hello"):
                ...

    Args:
        registry: shared by all; memory by default.
        delivery: whether outputs come in shared frames.
    """

    def __init__(self, registry: Registry | None = None, *, delivery: bool = True) -> None:
        self.registry = registry or MemoryRegistry()
        self._delivery = delivery
        self._runtimes: list[DistributedRuntime] = []
        self._tasks: dict[DistributedRuntime, asyncio.Task[None]] = {}

    def runtime(self) -> DistributedRuntime:
        """A runtime of its own, as if it were another process."""
        runtime = DistributedRuntime(
            registry=self.registry, host="127.0.0.1", port=0, advertise="", delivery=self._delivery
        )
        self._runtimes.append(runtime)
        return runtime

    async def serve(
        self, name: str, handler: Callable[..., Any], model: Model | None = None, **options: Any
    ) -> DistributedRuntime:
        """Serve a handler by an instance of its own; returns its runtime when it is ready.

        Args:
            model: the model that the endpoint serves, if it serves one.
            options: as `DistributedRuntime.serve` takes them: max_concurrent, graceful_shutdown …
        """
        return await self._serve(self.runtime(), name, handler, model, options)

    async def _serve(
        self,
        runtime: DistributedRuntime,
        name: str,
        handler: Callable[..., Any],
        model: Model | None,
        options: dict[str, Any],
    ) -> DistributedRuntime:
        endpoint = EndpointName.parse(name)
        if model is not None:
            runtime.set_model(endpoint, model)
        ready: asyncio.Future[Served] = asyncio.get_running_loop().create_future()
        task = asyncio.get_running_loop().create_task(
            runtime.serve(endpoint, handler, **options, on_ready=ready.set_result)
        )
        self._tasks[runtime] = task
        await asyncio.wait((ready, task), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        return runtime

    async def serve_worker(
        self, worker: Worker, model_path: str | Path | None = None, model_name: str | None = None
    ) -> DistributedRuntime:
        """Start a Worker and serve it by an instance of its own; returns its runtime when it is ready."""
        cls = type(worker)
        name = f"{cls.namespace}.{cls.component}.{cls.endpoint}"
        settings = WorkerSettings(model_path=model_path, model_name=model_name)
        model, runtime, worker.folder = model_of(cls, settings), self.runtime(), folder_of(cls, settings)
        worker.metrics = runtime.server.metrics_of(name)
        await worker.start()
        return await self._serve(runtime, name, worker.generate, model, serve_options(worker))

    async def client(self, name: str, router_mode: RouterMode = RouterMode.RoundRobin) -> Client:
        """A client with a runtime of its own, when it sees an instance."""
        client = await self.runtime().endpoint(name).client(router_mode)
        await client.wait_for_instances(10.0)
        if self._delivery:
            lanes = [live.connection.lane for live in client._instances.routable()]
            async with asyncio.timeout(10.0):
                while not all(lane is None or lane.has_answered for lane in lanes):  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
        return client

    async def stop(self, runtime: DistributedRuntime) -> None:
        """Let an instance leave as on SIGTERM: it drains first."""
        runtime.shutdown()
        await self._tasks.pop(runtime)

    async def lose(self, runtime: DistributedRuntime) -> None:
        """Let an instance go as if it were killed: its connections break, nobody keeps its registration alive."""
        await runtime.orphan()
        await runtime.server.stop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for runtime in reversed(self._runtimes):
            await runtime.aclose()
        await self.registry.close()
