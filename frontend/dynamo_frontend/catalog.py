"""The models that can be asked for now: who serves them, and what is needed to prepare requests for them.

It watches the registry; a model's files come from its workers, by hash, so no disk and no hub is shared. Each model
comes up by itself: one that is slow or broken keeps no other one waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, NamedTuple

from prometheus_client.core import Metric

from dynamo_frontend.busy import BusyWatch, Thresholds
from dynamo_frontend.media import Media, MediaLimits
from dynamo_frontend.metrics import Metrics, PreparingSeries, gauges
from dynamo_frontend.preparation import Preparation, fetch_file, prepare
from dynamo_grpc import (
    ModelNotFoundError,
    NoInstancesError,
    RegistryError,
    RouterMode,
    UnsupportedError,
)
from dynamo_grpc.changes import Changes
from dynamo_grpc.connections import Connection
from dynamo_grpc.errors import names
from dynamo_grpc.instances import InstanceSet, ask_whether_it_serves
from dynamo_grpc.migration import MIGRATION_LIMIT
from dynamo_grpc.names import INSTANCES, MODELS, nearest
from dynamo_grpc.records import InstanceRecord, decode_card, decode_instance, holding_everywhere
from dynamo_grpc.registry import Registry, View
from dynamo_grpc.router import Router
from dynamo_grpc.runtime import DistributedRuntime
from dynamo_grpc.v1 import model_card_pb2

logger = logging.getLogger(__name__)

_RETRY_S = 1.0
_SETTLE_S = 0.01
_MAX_KNOWN = 1_000
#: For so long metrics tell a model that nobody serves any more: it may be missed, or have been taken down.
_GONE_S = 3600.0
_MAX_RESTING = 32
#: So many workers have series of their own.
_MAX_WORKERS = 1_000


class Model:
    """A model and its instances.

    Attributes:
        namespace: where it is served (the first of several).
    """

    def __init__(self, card: model_card_pb2.ModelCard, instances: InstanceSet, router: Router) -> None:
        self.card, self.instances, self.router = card, instances, router
        self.busy = BusyWatch(instances)
        self.created = int(time.time())
        self.namespace = ""
        self.preparation: Preparation | None = None
        self.series: PreparingSeries | None = None
        self.loading: asyncio.Task[None] | None = None
        self.media: Media | None = None

    @property
    def is_ready(self) -> bool:
        """Whether it can be asked now."""
        return self.preparation is not None and bool(self.instances.routable())

    def check_type(self, wanted: model_card_pb2.ModelType, what: str) -> None:
        """Refuse what the model is not for."""
        if wanted not in self.card.model_types:
            served = names([model_card_pb2.ModelType.Name(kind)[11:].lower() for kind in self.card.model_types])
            text = f"model {self.card.name!r} does not serve {what}: it is for {served}"
            raise UnsupportedError(text, param="model")

    async def close(self) -> None:
        """Let go of its instances."""
        if self.loading:
            self.loading.cancel()
            await asyncio.gather(self.loading, return_exceptions=True)
        await self.busy.close()
        self.instances.close()


class Catalog:
    """All models by name and alias.

    Args:
        namespace: only models of this namespace; empty means all.
        instance_wait_s: how long a request for a known model waits for an instance.
        migration_limit: how often a request goes on elsewhere after its first output; a model's card wins.
        first_output_s: how long a worker may take to its first output; None is without limit.
        output_gap_s: the same between outputs.
        thresholds: when a worker is busy, for models that nobody set others for.
        metrics: where preparing requests is measured.
        media: what a chat may have of it.
    """

    def __init__(
        self,
        runtime: DistributedRuntime,
        router_mode: RouterMode,
        namespace: str = "",
        instance_wait_s: float = 10.0,
        migration_limit: int = MIGRATION_LIMIT,
        first_output_s: float | None = None,
        output_gap_s: float | None = None,
        thresholds: Thresholds | None = None,
        metrics: Metrics | None = None,
        media: MediaLimits | None = None,
    ) -> None:
        self._metrics = metrics or Metrics()
        self._media = Media(media or MediaLimits())
        self._runtime, self.router_mode, self._instance_wait_s = runtime, router_mode, instance_wait_s
        self._migration_limit = migration_limit
        self._limits_s = (first_output_s, output_gap_s)
        self._thresholds = thresholds or Thresholds()
        self._thresholds_by_name: dict[str, Thresholds] = {}
        suffix = f"{namespace}/" if namespace else ""
        ask = ask_whether_it_serves(runtime.connections)
        self._instances = View.start(runtime.registry, INSTANCES + suffix, decode_instance, ask)
        self._cards = View.start(runtime.registry, MODELS + suffix, decode_card)
        self._cards_by_checksum: dict[tuple[str, str], model_card_pb2.ModelCard] = {}
        self._models: dict[str, Model] = {}
        self._resting: dict[tuple[str, str], Model] = {}
        self._gone: dict[str, _Gone] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._changes = Changes()
        self._pending: asyncio.TimerHandle | None = None
        self._is_connected = False
        self._cards.subscribe(self._on_change)
        self._instances.subscribe(self._on_change)
        runtime.connections.subscribe(self._changes.tell)

    @property
    def is_connected(self) -> bool:
        """Whether the registry has answered, and the models in it are known."""
        return self._is_connected

    @property
    def registry(self) -> Registry:
        """Where the models are found."""
        return self._runtime.registry

    def ready(self) -> list[Model]:
        """The models that can be asked now, by name."""
        return sorted((m for m in self._models.values() if m.is_ready), key=lambda m: m.card.name)

    def all(self) -> Sequence[Model]:
        """All models that the registry lists."""
        return list(self._models.values())

    async def wait_changed(self) -> None:
        """Return at the next change of what can be asked."""
        await self._changes.wait()

    def set_thresholds(self, model: Model, thresholds: Thresholds) -> None:
        """When a worker of the model is busy, also if the model goes and comes back."""
        self._thresholds_by_name[model.card.name] = thresholds
        model.busy.set(thresholds)

    def known(self, name: str) -> tuple[str, str] | None:
        """Namespace and name of a model that is known, whether somebody serves it now or not."""
        if (model := self.lookup(name)) is not None:
            return model.namespace, model.card.name
        return (self._gone[name].namespace, name) if name in self._gone else None

    @contextlib.contextmanager
    def connections(self) -> Iterator[list[Connection]]:
        """To all workers, those that serve no model too, each once; for as long as it is inside."""
        pool = self._runtime.connections
        addresses = sorted({record.instance.address for record in self._instances.records.values()})
        acquired = [pool.acquire(address) for address in addresses]
        try:
            yield acquired
        finally:
            for connection in acquired:
                pool.release(connection)

    def families(self) -> Iterator[Metric]:
        """The models and their workers, for Prometheus."""
        models = [m for m in self._models.values() if self._metrics.label(m.card.name) == m.card.name]
        since = time.monotonic() - _GONE_S
        left = [(n, g.namespace) for n, g in self._gone.items() if g.at_s > since]
        gone = [((namespace, name), 0.0) for name, namespace in left if self._metrics.label(name) == name]
        labels = ("dynamo_namespace", "model")

        def of(name: str, text: str, value: Callable[[Model], float], more: Sequence[Any] = ()) -> Metric:
            return gauges(name, text, labels, [*(((m.namespace, m.card.name), value(m)) for m in models), *more])

        yield of("model_ready", "1 if the model can be asked now, else 0.", lambda m: float(m.is_ready), gone)
        text = "Workers of the model that answer now; 0 also when the registry lists none any more."
        yield of("model_workers", text, lambda m: len(m.instances.routable()), gone)
        yield of("model_context_length", "Tokens that prompt and answer may have together; 0 is not known.",
                 lambda m: m.card.context_length)  # fmt: skip
        yield of("model_kv_cache_block_size", "Tokens in a block of the KV cache; 0 is not known.",
                 lambda m: m.card.kv_cache_block_size)  # fmt: skip
        yield of("model_migration_limit", "How often an answer goes on at another worker.",
                 lambda m: m.router.migration_limit)  # fmt: skip
        workers = {f"{w.instance_id:016x}": w.num_inflight for m in models for w in m.instances.routable()}
        yield gauges(
            "worker_inflight_requests",
            "Requests of this process that run at the worker now, for all of its models.",
            ("worker_id",),
            [((worker,), num) for worker, num in list(workers.items())[:_MAX_WORKERS]],
        )

    async def find(self, name: str) -> Model:
        """The model called `name`, when it can be asked; a known one is waited for.

        Raises:
            ModelNotFoundError: there is none; names those there are.
            NoInstancesError: it is known, and nobody serves it.
            RegistryError: the registry has not answered yet.
        """
        if (model := self.lookup(name)) is not None and model.is_ready:
            return model
        wait_s = self._instance_wait_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while True:
                    model = self.lookup(name)
                    if model is not None and model.is_ready:
                        return model
                    gone_s = time.monotonic() - self._gone[name].at_s if name in self._gone else math.inf
                    if model is None and self.is_connected and gone_s > wait_s:
                        break  # unknown, or gone for longer than anybody would wait
                    await self._changes.wait()
        if name in self._gone or self.lookup(name) is not None:
            text = f"model {name!r} is known, but no worker serves it now: {self._why_nobody(name)}"
            raise NoInstancesError(text, retry_after_s=1.0)
        if not self.is_connected:
            problem = self.registry.problem or self.registry.description
            raise RegistryError(f"no model is known, the registry has not answered yet: {problem}", retry_after_s=1.0)
        known = [m.card.name for m in self.ready()]
        hint = nearest(name, known)
        raise ModelNotFoundError(
            f"there is no model {name!r}; there is {names(known)}" + (f" (did you mean {hint!r}?)" if hint else ""),
            param="model",
        )

    def _why_nobody(self, name: str) -> str:
        if (model := self.lookup(name)) is None:
            return f"its last instance left {time.monotonic() - self._gone[name].at_s:.0f} s ago"
        listed = [live.instance.address for live in model.instances.all()]
        if model.instances.routable():
            return "its files could not be prepared yet, the frontend's log says why"
        return f"of {len(listed)} listed none answers, at {names(listed, 3)}"

    def lookup(self, name: str) -> Model | None:
        """The model of a name or alias, ready or not; None if the registry lists none."""
        return self._models.get(name) or next((m for m in self._models.values() if name in m.card.aliases), None)

    def _on_change(self, _: Set[str]) -> None:
        """Look at the models when the changes that come together are in: a fleet that registers is a thousand."""
        if self._pending is None:
            self._pending = asyncio.get_running_loop().call_later(_SETTLE_S, self._reconcile)

    def _reconcile(self) -> None:
        """Compare our models with those whose cards hold."""
        self._pending = None
        self._is_connected = self._instances.is_ready and self._cards.is_ready
        held = holding_everywhere(self._instances.records.values())
        cards = self._known_cards()
        for name in [n for n, m in self._models.items() if not _holds(held.get(n), m.card)]:
            logger.info("model %r is gone", name)
            self._gone[name] = _Gone(time.monotonic(), self._models[name].namespace)
            while len(self._gone) > _MAX_KNOWN:
                del self._gone[next(iter(self._gone))]
            self._rest(self._models.pop(name))
        for name in held.keys() - self._models.keys():
            if card := cards.get((name, held[name].instance.card_checksum)):  # else it comes later
                self._gone.pop(name, None)
                model = self._models[name] = self._resting.pop((name, card.checksum), None) or self._open(card)
                model.namespace = held[name].instance.namespace
                model.busy.set(self._thresholds_by_name.get(name, self._thresholds))
        self._changes.tell()

    def _rest(self, model: Model) -> None:
        """Keep a model that nobody serves: its workers may come back, and requests that run may go on there."""
        self._resting[model.card.name, model.card.checksum] = model
        while len(self._resting) > _MAX_RESTING:
            oldest = self._resting.pop(next(iter(self._resting)))
            task = asyncio.get_running_loop().create_task(oldest.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _known_cards(self) -> dict[tuple[str, str], model_card_pb2.ModelCard]:
        """The cards by name and checksum; those that the registry lost are known while an instance has them."""
        wanted = {(r.instance.model, r.instance.card_checksum) for r in self._instances.records.values()}
        kept = {key: card for key, card in self._cards_by_checksum.items() if key in wanted}
        listed = {(card.name, card.checksum): card for card in self._cards.records.values()}
        self._cards_by_checksum = kept | listed
        return self._cards_by_checksum

    def _open(self, card: model_card_pb2.ModelCard) -> Model:
        def accepts(instance: model_card_pb2.Instance) -> bool:
            return instance.model == card.name and instance.card_checksum == card.checksum

        instances = InstanceSet(self._instances, self._runtime.connections, accepts)
        limit = card.migration_limit if card.HasField("migration_limit") else self._migration_limit
        router = Router(
            instances,
            self._runtime.delivery,
            f"model {card.name!r}",
            wait_s=self._instance_wait_s,
            migration_limit=limit,
            first_output_s=self._limits_s[0],
            output_gap_s=self._limits_s[1],
        )
        model = Model(card, instances, router)
        model.media = self._media
        model.loading = asyncio.get_running_loop().create_task(self._load(model), name=f"load {card.name}")
        return model

    async def _load(self, model: Model) -> None:
        """Fetch the files and prepare; tried again until it works or the model is gone."""
        told = ""
        while model.preparation is None:
            try:
                files = await self._fetch(model)
                model.preparation = await asyncio.to_thread(prepare, model.card, files)
            except Exception as error:  # whatever it is, another worker or a better file may come
                if (text := f"{type(error).__name__}: {error}") != told:
                    told = text
                    logger.warning("model %r is not ready: %s", model.card.name, text)
                await asyncio.sleep(_RETRY_S)
        model.series = self._metrics.preparing(model.card.name)
        if model.preparation.tokenizer is not None:
            model.preparation.tokenizer.on_look_up = model.series.looked_up
        self._changes.tell()
        logger.info("model %r is ready", model.card.name)

    async def _fetch(self, model: Model) -> dict[str, bytes]:
        """The model's files by name, from any of its workers."""
        if model.card.model_input == model_card_pb2.MODEL_INPUT_TEXT:
            return {}
        async with asyncio.timeout(30.0):
            while not model.instances.routable():
                await self._changes.wait()
        live = model.router.choose(RouterMode.Random, None, frozenset())
        connection = self._runtime.connections.acquire(live.instance.address)
        try:
            return {file.name: await fetch_file(connection, file) for file in model.card.files}
        finally:
            self._runtime.connections.release(connection)

    async def close(self) -> None:
        """Stop watching."""
        if self._pending is not None:
            self._pending.cancel()
        self._runtime.connections.unsubscribe(self._changes.tell)
        await self._cards.close()
        models = (*self._models.values(), *self._resting.values())
        await asyncio.gather(*(model.close() for model in models), *self._closing)
        await self._instances.close()


class _Gone(NamedTuple):
    """When a model's last instance left, and where it was served."""

    at_s: float
    namespace: str


def _holds(record: InstanceRecord | None, card: model_card_pb2.ModelCard) -> bool:
    return record is not None and record.instance.card_checksum == card.checksum
