"""The base class of workers: load, generate, close; everything else is the library's."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dynamo_grpc.admin import open_admin_port
from dynamo_grpc.cards import Model, ModelInput, ModelType, load_model, read_template
from dynamo_grpc.context import Context
from dynamo_grpc.entry import check_not_importing, stop_signals
from dynamo_grpc.names import EndpointName
from dynamo_grpc.runtime import DistributedRuntime
from dynamo_grpc.server import Served
from dynamo_grpc.system import open_system_server

if TYPE_CHECKING:
    from dynamo_grpc.metrics import EndpointMetrics
    from dynamo_grpc.testing.faults import Faults

logger = logging.getLogger(__name__)


class Worker(ABC):
    """A model's worker. Subclass it, implement `generate`, and `run` it.

    The class attributes are defaults; flags and DYN_* variables win over them.

    Attributes:
        model_path: folder with tokenizer, template and configuration, relative to the file of the class; None for a
            worker without a tokenizer.
        model_name: name that clients ask for; the folder's name by default.
        model_input: what `generate` gets: token ids, or text and messages.
        model_type: what the model can be asked for.
        capabilities: optional abilities of `generate` (see `dynamo_grpc.cards.CAPABILITIES`); requests that need others
            are refused.
        max_concurrent: so many requests run at once; the others wait for their turn, by priority.
        max_queued: so many wait (16); beyond that they are refused with RESOURCE_EXHAUSTED and when to come back.
        graceful_shutdown: when the worker leaves, its requests run on up to the limit; with False they are handed over
            at once, and go on at other workers.
        health_check_payload: a request that must give an output before the worker becomes ready, and later when idle
            (DYN_HEALTH_CHECK_ENABLED).
        folder: of the model, as flags or `model_path` have it; None if there is none.
        metrics: of its endpoint, told at the system port: `self.metrics.counter(name, text)` in `start` adds one.
    """

    model_path: ClassVar[str | Path | None] = None
    model_name: ClassVar[str] = ""
    model_input: ClassVar[ModelInput] = ModelInput.Tokens
    model_type: ClassVar[ModelType] = ModelType.Chat | ModelType.Completions
    capabilities: ClassVar[Iterable[str]] = ()
    context_length: ClassVar[int | None] = None
    kv_cache_block_size: ClassVar[int | None] = None
    migration_limit: ClassVar[int | None] = None
    max_concurrent: ClassVar[int | None] = None
    max_queued: ClassVar[int | None] = None
    graceful_shutdown: ClassVar[bool] = True
    health_check_payload: ClassVar[Any] = None
    runtime_config: ClassVar[Mapping[str, Any]] = {}
    namespace: ClassVar[str] = "dynamo"
    component: ClassVar[str] = "backend"
    endpoint: ClassVar[str] = "generate"
    folder: Path | None = None
    metrics: EndpointMetrics

    async def start(self) -> None:  # noqa: B027 - may be left out
        """Load the model; the worker is ready after it."""

    @abstractmethod
    def generate(self, request: Any, context: Context) -> AsyncIterator[Any] | Awaitable[Any]:
        """Answer one request: an async generator of ints, lists of ints, text, ChoiceDeltas or GenerateResponses.

        The request is a PreprocessedRequest; everything that it left unset is filled in from the model card. Finish and
        usage may be left out: the library adds them, and enforces max_tokens, stop ids, min_tokens and ignore_eos.

        A model of type `ModelType.Embedding` is given EmbedRequests, and gives a vector for each of `request.inputs`:
        lists of numbers or an array with a row for each, returned or yielded; or an EmbedResponse.
        """

    def load(self) -> Mapping[str, int]:
        """What the engine says of itself when somebody watches its load; any of WatchLoadResponse's num_used_blocks,
        num_total_blocks and num_prefill_tokens. Frontends leave out workers that are busy by them (`/busy_threshold`).
        """
        return {}

    async def close(self) -> None:  # noqa: B027 - may be left out
        """Free engine resources and temporary files; called once, after the last request."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What flags say; None means the class's own value."""

    host: str = "127.0.0.1"
    port: int = 0
    advertise: str = ""
    namespace: str | None = None
    component: str | None = None
    model_path: str | Path | None = None
    model_name: str | None = None
    chat_template: str | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    system_port: int | None = None
    grpc_admin_port: int | None = None
    max_concurrent: int | None = None
    max_queued: int | None = None
    inject_faults: str = ""


_PARSERS = ("tool_call_parser", "reasoning_parser")


def model_folder(cls: type[Worker]) -> Path | None:
    """The class's model folder, found from the file that the class is in."""
    if cls.model_path is None:
        return None
    path = Path(cls.model_path)
    return path if path.is_absolute() else Path(inspect.getfile(cls)).resolve().parent / path


def folder_of(cls: type[Worker], settings: WorkerSettings) -> Path | None:
    """The folder of the model that a class serves, as the settings have it."""
    return Path(settings.model_path) if settings.model_path else model_folder(cls)


def model_of(cls: type[Worker], settings: WorkerSettings = WorkerSettings()) -> Model:
    """The model that a class serves, as the settings have it."""
    parsers = {name: value for name in _PARSERS if (value := getattr(settings, name)) is not None}
    return load_model(
        folder_of(cls, settings),
        settings.model_name or cls.model_name,
        model_input=cls.model_input,
        model_type=cls.model_type,
        context_length=cls.context_length,
        kv_cache_block_size=cls.kv_cache_block_size,
        migration_limit=cls.migration_limit,
        capabilities=cls.capabilities,
        runtime_config={**cls.runtime_config, **parsers},
        chat_template=read_template(settings.chat_template) if settings.chat_template else None,
    )


async def serve_worker(
    cls: type[Worker], settings: WorkerSettings, on_ready: Callable[[Served], None] | None = None
) -> None:
    """Run a worker until SIGTERM or SIGINT: serve, drain, close.

    Raises:
        ConfigurationError: a setting is wrong; nothing is left behind.
    """
    faults = None
    if settings.inject_faults:
        from dynamo_grpc.testing.faults import Faults  # not for production

        faults = Faults.parse(settings.inject_faults)
        logger.warning("this worker injects faults: %s", settings.inject_faults)
    model = model_of(cls, settings)
    name = EndpointName(settings.namespace or cls.namespace, settings.component or cls.component, cls.endpoint)
    runtime = DistributedRuntime(host=settings.host, port=settings.port, advertise=settings.advertise)
    async with runtime, contextlib.AsyncExitStack() as stack:
        runtime.set_model(name, model)
        await runtime.start_server()  # health answers NOT_SERVING while the model loads
        port = stack.enter_context(open_system_server(runtime.server, settings.system_port))
        await stack.enter_async_context(open_admin_port(settings.grpc_admin_port))
        if port is not None:
            logger.info("system port %d: /live, /health and /metrics", port)
        worker = cls()
        worker.folder = folder_of(cls, settings)
        worker.metrics = runtime.server.metrics_of(str(name))
        task = asyncio.ensure_future(_start_and_serve(worker, runtime, name, settings, faults, on_ready))
        with stop_signals(runtime, task):
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                if not runtime.is_shutting_down:
                    raise
            finally:
                await worker.close()


async def _start_and_serve(
    worker: Worker,
    runtime: DistributedRuntime,
    name: EndpointName,
    settings: WorkerSettings,
    faults: Faults | None,
    on_ready: Callable[[Served], None] | None,
) -> None:
    await worker.start()
    handler = faults.wrap(worker.generate) if faults else worker.generate
    injecting = asyncio.ensure_future(faults.run(runtime)) if faults else None
    options = serve_options(worker)
    for key in ("max_concurrent", "max_queued"):
        if (value := getattr(settings, key)) is not None:
            options[key] = value
    try:
        await runtime.serve(name, handler, **options, on_ready=on_ready)
    finally:
        if injecting is not None:
            injecting.cancel()


def serve_options(worker: Worker) -> dict[str, Any]:
    """How a Worker is served, as `DistributedRuntime.serve` takes it."""
    return {
        "gives_dicts": False,
        "graceful_shutdown": worker.graceful_shutdown,
        "health_check_payload": worker.health_check_payload,
        "max_concurrent": worker.max_concurrent,
        "max_queued": worker.max_queued,
        "load": worker.load,
    }


def run(cls: type[Worker]) -> None:
    """Run a worker from its own file: the same as `dynamo-grpc worker FILE:CLASS`, with the same flags."""
    check_not_importing(cls.__name__)
    from dynamo_grpc.cli.worker import worker_command  # the command line is not needed to write a worker

    worker_command(cls).main(prog_name=Path(inspect.getfile(cls)).name)
