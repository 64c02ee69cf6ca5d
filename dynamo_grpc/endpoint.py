"""The way from a runtime to an endpoint: namespace, component, endpoint; and which model an endpoint serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_grpc.cards import ModelInput, ModelType, load_model
from dynamo_grpc.client import Client
from dynamo_grpc.names import EndpointName, check_part
from dynamo_grpc.routing import RouterMode

if TYPE_CHECKING:
    from dynamo_grpc.metrics import EndpointMetrics
    from dynamo_grpc.runtime import DistributedRuntime


class Namespace:
    """A namespace; its components are found by name."""

    def __init__(self, runtime: DistributedRuntime, name: str) -> None:
        self._runtime, self.name = runtime, name

    def component(self, name: str) -> Component:
        """A component of the namespace."""
        return Component(self._runtime, self.name, check_part("component", name))


class Component:
    """A component; its endpoints are found by name."""

    def __init__(self, runtime: DistributedRuntime, namespace: str, name: str) -> None:
        self._runtime, self._namespace, self.name = runtime, namespace, name

    def endpoint(self, name: str) -> Endpoint:
        """An endpoint of the component."""
        return Endpoint(self._runtime, EndpointName(self._namespace, self.name, name))


class Endpoint:
    """An endpoint: serve it, or make a client of it."""

    def __init__(self, runtime: DistributedRuntime, name: EndpointName) -> None:
        self.runtime, self.name = runtime, name

    @property
    def metrics(self) -> EndpointMetrics:
        """The endpoint's metrics at the system port: add your own before or while it is served."""
        return self.runtime.server.metrics_of(str(self.name))

    async def serve_endpoint(
        self,
        handler: Callable[..., Any],
        graceful_shutdown: bool = True,
        metrics_labels: Sequence[tuple[str, str]] | None = None,
        health_check_payload: Any = None,
        *,
        max_concurrent: int | None = None,
        max_queued: int | None = None,
        load: Callable[[], Mapping[str, int]] | None = None,
    ) -> None:
        """Serve the endpoint; returns after shutdown, when its requests have ended.

        Args:
            handler: `(request)` or `(request, context)`; an async generator, or a coroutine that returns one value.
                After `register_model` for this endpoint it gets a dict of the fields that were set and yields token ids
                or dicts.
            graceful_shutdown: when the worker leaves, its requests run on, for `DYN_WORKER_GRACEFUL_SHUTDOWN_TIMEOUT`
                seconds at most (30); with False they are handed over at once, and go on at other workers.
            metrics_labels: pairs that stand with the instance in the registry, and as labels at its metrics.
            health_check_payload: a request that must give an output before the endpoint becomes ready; with
                DYN_HEALTH_CHECK_ENABLED also whenever nobody has asked for DYN_CANARY_WAIT_TIME seconds (10).
            max_concurrent: so many requests run at once; the others wait for their turn, by priority.
            max_queued: so many wait (16), beyond that they are refused with RESOURCE_EXHAUSTED and when to come back.
            load: what the engine says of itself when somebody watches its load: num_used_blocks, num_total_blocks,
                num_prefill_tokens.

        Raises:
            ConfigurationError: the handler can't be one, or the port is taken.
        """
        await self.runtime.serve(
            self.name,
            handler,
            graceful_shutdown=graceful_shutdown,
            labels=dict(metrics_labels or ()),
            health_check_payload=health_check_payload,
            max_concurrent=max_concurrent,
            max_queued=max_queued,
            load=load,
        )

    async def client(self, router_mode: RouterMode | None = None) -> Client:
        """A client that watches the endpoint's instances; it lives as long as the runtime."""
        runtime = self.runtime
        client = Client(
            self.name, runtime.registry, runtime.connections, runtime.delivery, router_mode or RouterMode.RoundRobin
        )
        runtime._clients.append(client)
        return client

    def __str__(self) -> str:
        return str(self.name)


async def register_model(
    model_input: ModelInput,
    model_type: ModelType,
    endpoint: Endpoint,
    model_path: str | Path | None,
    model_name: str | None = None,
    **options: Any,
) -> None:
    """Say which model an endpoint serves; call it before `serve_endpoint`.

    Args:
        options: as `load_model` takes them: context_length, kv_cache_block_size, migration_limit, capabilities,
            runtime_config, user_data, chat_template, aliases.

    Raises:
        ConfigurationError: the model folder is missing or incomplete.
    """
    model = load_model(model_path, model_name or "", model_input=model_input, model_type=model_type, **options)
    endpoint.runtime.set_model(endpoint.name, model)


register_llm = register_model
