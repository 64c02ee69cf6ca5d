"""What is measured: figures against what was asked, labels, a worker's own, all workers at one address, back ends."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import dynamo_workers.tiny as tiny
import pytest
from dynamo_frontend import polling
from dynamo_frontend.federation import merge, wrong_line
from dynamo_frontend.metrics import GAP_S, OTHER, Gaps, Metrics
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dynamo_grpc import ConfigurationError, Context, Worker
from dynamo_grpc.metrics import EndpointMetrics
from dynamo_grpc.testing import Mesh
from dynamo_grpc.v1 import inference_pb2

from ..conftest import ROOT, eventually, metric
from .front import CHAT, FOLDER, Front, front_of, serve_beside

LABELS = {"dynamo_namespace": "dynamo", "model": "tiny", "endpoint": "chat_completions"}


async def page(front: Front, path: str = "/metrics") -> str:
    response = await front.http.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    return response.text


async def test_figures_are_what_was_asked(front: Front) -> None:
    answers = [(await front.post({**CHAT, "max_tokens": 7, "stream": stream})) for stream in (False, True, True)]
    usage = answers[0].json()["usage"]
    await front.error({**CHAT, "top_p": 7}, 400)
    await front.error({**CHAT, "model": "nobody"}, 404)
    text = await page(front)

    def of(name: str, **more: str) -> float:
        return metric(text, f"dynamo_frontend_{name}", **LABELS, **more)

    assert of("requests_total", status="success", request_type="stream") == 2
    assert of("requests_total", status="success", request_type="unary") == 1
    assert of("requests_total", status="error", error_type="validation") == 1
    assert metric(text, "dynamo_frontend_requests_total", model="", error_type="not_found") == 1
    assert of("requests_started_total") == 4
    assert of("output_tokens_total") == of("output_sequence_tokens_sum") == 21
    assert of("input_tokens_total") == of("input_sequence_tokens_sum") == 3 * usage["prompt_tokens"]
    assert of("time_to_first_token_seconds_count") == of("request_duration_seconds_count") - 1 == 3
    assert of("inter_token_latency_seconds_count") == 3 * 6
    for stage, count in (("preprocess", 3), ("route", 3), ("first_output", 3)):
        assert of("stage_duration_seconds_count", stage=stage) == count
    spent = sum(of("stage_duration_seconds_sum", stage=stage) for stage in ("preprocess", "route", "first_output"))
    assert spent == pytest.approx(of("time_to_first_token_seconds_sum"), abs=1e-6)
    assert of("time_to_first_token_seconds_sum") + of("inter_token_latency_seconds_sum") <= of(
        "request_duration_seconds_sum"
    )
    assert of("inflight_requests") == of("queued_requests") == 0
    model = {"dynamo_namespace": "dynamo", "model": "tiny"}
    assert metric(text, "dynamo_frontend_model_workers", **model) == 1
    assert metric(text, "dynamo_frontend_model_ready", **model) == 1
    assert metric(text, "dynamo_frontend_model_context_length", **model) == 8192
    assert metric(text, "dynamo_frontend_tokenizer_cache_hits_total", model="tiny") > 0
    assert metric(text, "dynamo_frontend_tokenize_seconds_count", model="tiny") == 4


async def test_what_waits_and_what_leaves_is_counted(mesh: Mesh, front: Front) -> None:
    class Waiting(Worker):
        model_path = FOLDER
        model_name = "waiting"

        async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> AsyncIterator[int]:
            await asyncio.sleep(3600)
            yield 1

    await serve_beside(mesh, front, Waiting())
    asking = asyncio.ensure_future(front.post({**CHAT, "model": "waiting"}))

    async def value(name: str) -> float:
        labels = {} if name.startswith("worker_") else {"model": "waiting"}
        return metric(await page(front), f"dynamo_frontend_{name}", **labels)

    async with asyncio.timeout(5):
        while await value("queued_requests") != 1 or await value("worker_inflight_requests") != 1:
            await asyncio.sleep(0.01)
        asking.cancel()
        while await value("model_cancellation_total") != 1:
            await asyncio.sleep(0.01)
    assert await value("queued_requests") == await value("inflight_requests") == 0
    assert await value("requests_total") == 1


class Own(Worker):
    """Adds metrics of its own, and its engine's."""

    model_path = FOLDER
    model_name = "own"

    async def start(self) -> None:
        self.steps = self.metrics.counter("steps", "Steps of the engine, by kind.", ["kind"])
        self.metrics.gauge("free_slots", "Slots that are free.").set_function(lambda: 5)
        self.sizes = self.metrics.histogram("batch_size", "Requests in a step.", buckets=(1, 2, 4))
        engine = CollectorRegistry()
        Counter("engine:tokens", "Tokens of the engine.", registry=engine).inc(3)
        self.metrics.attach(engine)

    def load(self) -> dict[str, int]:
        return {"num_total_blocks": 10, "num_used_blocks": 4}

    async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> AsyncIterator[int]:
        for _ in range(3):
            self.steps.labels("decode").inc()
            self.sizes.observe(2)
            yield 300
        if request.priority == 7:
            raise ValueError("seven")


async def test_all_workers_at_one_address(mesh: Mesh) -> None:
    async with front_of(mesh) as front:
        runtimes = [await mesh.serve_worker(Own()) for _ in range(2)]
        await mesh.serve_worker(tiny.Tiny())
        await eventually(lambda: len(front.frontend.catalog.ready()) == 2)
        await eventually(lambda: sum(len(m.instances.routable()) for m in front.frontend.catalog.ready()) == 3)
        for _ in range(4):
            assert (await front.post({**CHAT, "model": "own"})).status_code == 200
        await front.error({**CHAT, "model": "own", "priority": 7}, 400)
        plain, text = await page(front), await page(front, "/metrics?workers=1")
    assert "dynamo_component_steps" not in plain
    lines = text.splitlines()
    heads = [line for line in lines if line.startswith("# TYPE ")]
    assert len(heads) == len({line.split()[2] for line in heads}), "a family stands twice"
    ids = {f"{runtime.instance_id:016x}" for runtime in runtimes}
    who = {"dynamo_namespace": "dynamo", "dynamo_component": "backend", "dynamo_endpoint": "generate", "model": "own"}

    def of(name: str, **more: str) -> float:
        return metric(text, name, **{**who, **more})

    assert of("dynamo_component_steps_total", kind="decode") == 15
    assert all(of("dynamo_component_free_slots", worker_id=worker) == 5 for worker in ids)
    assert of("dynamo_component_batch_size_bucket", le="2.0") == 15
    assert all(of("engine:tokens_total", worker_id=worker) == 3 for worker in ids)
    assert of("dynamo_component_requests_total") == 5
    assert of("dynamo_component_errors_total", error_type="invalid_request") == 1
    assert of("dynamo_component_output_tokens_total") == 15
    assert of("dynamo_component_time_to_first_output_seconds_count") == 5
    assert of("dynamo_component_used_blocks") == 8
    assert metric(text, "dynamo_component_requests_total", model="tiny") == 0
    assert metric(text, "dynamo_frontend_requests_total", model="own", status="success") == 4


async def test_cancels_and_waits_are_counted_at_the_worker(mesh: Mesh) -> None:
    async def slow(request: Any) -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(3600)

    runtime = await mesh.serve("demo.backend.generate", slow, max_concurrent=1)
    client, metrics = await mesh.client("demo.backend.generate"), runtime.server.metrics
    assert metrics is not None
    contexts = [Context(), Context()]
    streams = [await client.generate(None, context=context) for context in contexts]
    await anext(streams[0])
    await eventually(lambda: metric(metrics.text(), "dynamo_component_queued_requests") == 1)
    for context in contexts:
        context.kill()
    await eventually(lambda: metric(metrics.text(), "dynamo_component_cancellation_total") == 2)
    assert metric(metrics.text(), "dynamo_component_inflight_requests") == 0
    assert metric(metrics.text(), "dynamo_component_errors_total") == -1


def test_names_that_can_not_be_added() -> None:
    metrics = EndpointMetrics()
    metrics.counter("things", "Things.")
    for name, labels in (
        ("things", ()), ("things_total", ()), ("requests", ()), ("a b", ()), ("fine", ("worker_id",)),
        ("fine", ("a-b",)), ("used_blocks", ()), ("refused_requests_total", ()), ("inflight_requests", ()),
    ):  # fmt: skip
        with pytest.raises(ConfigurationError):
            metrics.gauge(name, "x", labels)


def test_gaps_are_what_observing_each_would_be() -> None:
    metrics, other = Metrics(), Metrics()
    series, observed = metrics.of("ns", "m", "e"), other.of("ns", "m", "e")
    gaps = Gaps()
    for gap_s, num in ((0.02, 1), (0.3, 3), (GAP_S[4], 1), (99.0, 1)):
        gaps.add(gap_s, num)
        for _ in range(num):
            observed.gaps.observe(gap_s / num)
    series.add_gaps(gaps)
    for le in (*map(str, GAP_S), "+Inf"):
        name = "dynamo_frontend_inter_token_latency_seconds_bucket"
        limit = le if "." in le or le == "+Inf" else f"{le}.0"
        assert metric(metrics.text(), name, le=limit) == metric(other.text(), name, le=limit) >= 0
    name = "dynamo_frontend_inter_token_latency_seconds_sum"
    assert metric(metrics.text(), name) == pytest.approx(metric(other.text(), name))


def test_many_models_share_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo_frontend.metrics.MAX_MODELS", 20)
    metrics = Metrics()
    for number in range(120):
        metrics.of(f"ns{number}", f"m{number}", "completions").started.inc()
    text = metrics.text().decode()
    assert metric(text, "dynamo_frontend_requests_started_total", model="m0") == 1
    assert metric(text, "dynamo_frontend_requests_started_total", model=OTHER) == 100
    size = len(text)
    for number in range(120, 220):
        metrics.of(f"ns{number}", f"m{number}", "completions").started.inc()
        metrics.of(f"ns{number}", "m0", "completions").started.inc()  # in many namespaces
    assert len(metrics.text()) < size * 1.001
    assert metric(metrics.text().decode(), "dynamo_frontend_requests_started_total", model=OTHER) == 300


async def test_models_that_are_gone_are_told(mesh: Mesh) -> None:
    runtime = await mesh.serve_worker(tiny.Tiny())
    async with front_of(mesh, instance_wait_s=0.05) as front:
        await eventually(front.frontend.catalog.ready)
        await mesh.stop(runtime)
        await eventually(lambda: not front.frontend.catalog.all())
        await front.error(CHAT, 503)
        text = await page(front)
        who = {"model": "tiny", "dynamo_namespace": "dynamo"}
        assert metric(text, "dynamo_frontend_model_workers", **who) == 0
        assert metric(text, "dynamo_frontend_model_ready", **who) == 0
        assert metric(text, "dynamo_frontend_requests_total", error_type="unavailable", **who) == 1
        assert metric(text, "dynamo_frontend_inflight_requests", **who) == 0


async def test_choices_are_not_faster_than_one(mesh: Mesh, front: Front) -> None:
    class Paced(Worker):
        model_path = FOLDER
        model_name = "paced"
        capabilities = ("n",)

        async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> Any:
            for _ in range(5):
                await asyncio.sleep(0.05)
                for index in range(request.sampling_options.n or 1):
                    yield inference_pb2.ChoiceDelta(index=index, token_ids=[300])

    await serve_beside(mesh, front, Paced())
    await front.post({**CHAT, "model": "paced", "n": 4, "stream": True})
    name = "dynamo_frontend_inter_token_latency_seconds"
    text = await page(front)
    assert metric(text, f"{name}_count", model="paced") >= 16
    assert metric(text, f"{name}_sum", model="paced") / metric(text, f"{name}_count", model="paced") > 0.03


async def test_what_can_not_be_told_is_left_out(mesh: Mesh, caplog: pytest.LogCaptureFixture) -> None:
    class Odd(Own):
        async def start(self) -> None:
            self.metrics.gauge("broken", "No engine yet.").set_function(lambda: 1 / 0)
            self.metrics.gauge("jobs_created", "Jobs that were made.").set(4)
            self.seen = self.metrics.counter("seen", "By what it says.", ["text"])
            self.seen.labels("a\u2028b\x85c").inc()
            registry = CollectorRegistry()
            loras = Counter("engine_loras", "By adapter.", ["model"], registry=registry)
            for number, name in enumerate(("a", "b"), start=1):
                loras.labels(name).inc(number)
            self.metrics.attach(registry)
            self.steps, self.sizes = self.seen, self.metrics.histogram("sizes", "Sizes.")

        def load(self) -> dict[str, int]:
            return {"num_total_blocks": None}  # type: ignore[dict-item]

    runtime = await mesh.serve_worker(Odd())
    metrics = runtime.server.metrics
    assert metrics is not None
    for _ in range(2):
        text = metrics.text().decode()
    assert metric(text, "dynamo_component_jobs_created") == 4
    assert metric(text, "dynamo_component_broken") == -1
    assert sum("dynamo_component_broken can't be told" in r.message for r in caplog.records) == 1
    assert [metric(text, "engine_loras_total", exported_model=n, model="own") for n in "ab"] == [1, 2]
    merged = merge([text, text.replace("worker_id", "other_id"), "foreign 3\n# TYPE f gauge\nf 1\n"])
    assert "a\u2028b\x85c" in merged
    assert metric(merged, "foreign") == 3
    ids = {"worker_id": f"{runtime.instance_id:016x}"}
    assert metric(text, "dynamo_component_registry_up", **ids) == 1


async def test_endpoints_without_a_model_are_told_too(mesh: Mesh) -> None:
    async def handler(request: Any) -> Any:
        return request

    await mesh.serve("plain.backend.echo", handler)
    client = await mesh.client("plain.backend.echo")
    assert [item async for item in await client.generate(1, annotated=False)] == [1]
    async with front_of(mesh) as front:
        await eventually(lambda: front.frontend.catalog.is_connected)
        text = await page(front, "/metrics?workers=1")
        assert metric(text, "dynamo_component_requests_total", dynamo_namespace="plain", model="") == 1


@pytest.mark.parametrize(
    "line",
    [
        "# TYPE a",
        "# TYPE a sundial",
        "foo{bar 1",
        "foo",
        "foo one",
        'foo{a="b} 1',
        "foo 1 2 3",
        "fo-o 1",
        'f{le="\\"} 1',
    ],
)
def test_a_page_that_can_not_be_read(line: str) -> None:
    assert wrong_line(f"# HELP a b\n{line}\na 1\n") == line


def test_pages_that_can_be_read() -> None:
    registry = CollectorRegistry()
    Counter("a", 'With "quotes" \\ and \n lines.', ["who", "b"], registry=registry).labels('x"\\\n\u2028', "").inc(
        1e300
    )
    Histogram("h", "", registry=registry).observe(0.5)
    Gauge("g", "", registry=registry).set(float("nan"))
    Info("i", "", registry=registry).info({"version": "1"})
    assert wrong_line(generate_latest(registry).decode()) is None
    assert wrong_line('\n# a comment\nx{a="b",} +Inf 1700000000000\ny -1.5e-7\nz .5\n') is None
    assert "characters" in str(wrong_line("x" * 5_000_000))


async def test_a_worker_whose_page_is_wrong_hides_nobody(mesh: Mesh, caplog: pytest.LogCaptureFixture) -> None:
    good = await mesh.serve_worker(tiny.Tiny())
    bad = await mesh.serve_worker(tiny.Tiny())
    assert bad.server.metrics is not None
    bad.server.metrics.text = lambda: b"# TYPE a\n"  # type: ignore[method-assign]
    async with front_of(mesh) as front:
        await eventually(front.frontend.catalog.ready)
        await eventually(lambda: len(front.frontend.catalog.ready()[0].instances.routable()) == 2)
        for _ in range(2):
            text = await page(front, "/metrics?workers=1")
            assert list(text_string_to_metric_families(text))
            assert f'worker_id="{good.instance_id:016x}"' in text
    assert (
        metric(
            front.frontend.metrics.text().decode(), "dynamo_frontend_worker_metrics_errors_total", error_type="format"
        )
        == 2
    )
    assert sum("doesn't tell its metrics" in record.message for record in caplog.records) == 1


def test_pages_are_put_together() -> None:
    def made(kind: str, value: int) -> str:
        registry = CollectorRegistry()
        Counter("both", "In both.", ["who"], registry=registry).labels(kind).inc(value)
        Counter(f"only_{kind}", "In one.", registry=registry)
        return generate_latest(registry).decode()

    text = merge(
        [made("a", 1), "", made("b", 2), "# HELP both_total In both.\n# TYPE both_total gauge\nboth_total 9\n"]
    )
    assert text.count("# TYPE both_total ") == 1
    assert [metric(text, "both_total", who=who) for who in "ab"] == [1, 2]
    assert "both_total 9" not in text
    assert metric(text, "only_a_total") == metric(text, "only_b_total") == 0


# -- custom back ends ---------------------------------------------------------------------------------------------------


class Backend:
    """Says what it is told to."""

    def __init__(self, says: Any) -> None:
        self.says = says

    async def generate(self, request: str) -> AsyncIterator[Any]:
        assert request == ""
        if self.says is None:
            await asyncio.sleep(3600)
        yield self.says


def stats(usage: float, ts: float, **more: Any) -> dict[str, Any]:
    metrics = {"gauges": {"kv_cache_usage_perc": usage}, **more}
    return {"schema_version": 1, "worker_id": "w", "backend": "vllm", "ts": ts, "metrics": metrics}


async def test_the_figures_of_all_instances_of_a_back_end(mesh: Mesh, caplog: pytest.LogCaptureFixture) -> None:
    histogram = {"buckets": {"0.1": 3, "1": 4}, "sum": 1.5, "count": 5}
    first = Backend(json.dumps(stats(0.5, 1, counters={"done": 7}, histograms={"step_seconds": histogram})))
    second = Backend(stats(0.25, 1))  # a value does as well as a string
    name = "nim.backend.runtime_stats"
    runtimes = [await mesh.serve(name, backend.generate) for backend in (first, second)]
    settings = {"backend_metrics_endpoint": name, "backend_metrics_interval_s": 0.2}
    async with front_of(mesh, **settings) as front:

        async def value(name: str, **labels: str) -> float:
            return metric(await page(front), f"dynamo_component_{name}", **labels)

        async def until(name: str, wanted: float, **labels: str) -> None:
            async with asyncio.timeout(10):
                while await value(name, **labels) != wanted:
                    await asyncio.sleep(0.02)

        ids = [f"{runtime.instance_id:016x}" for runtime in runtimes]
        await until("kv_cache_usage_perc", 0.5, worker_id=ids[0], backend="vllm", backend_worker_id="w")
        await until("kv_cache_usage_perc", 0.25, worker_id=ids[1], dynamo_namespace="nim")
        assert await value("done_total", worker_id=ids[0]) == 7
        assert [await value("step_seconds_bucket", le=le) for le in ("0.1", "1.0", "+Inf")] == [3, 4, 5]
        first.says = stats(0.75, 2)
        second.says = None  # hangs
        await until("kv_cache_usage_perc", 0.75, worker_id=ids[0])
        await until("kv_cache_usage_perc", -1, worker_id=ids[1])  # stale
        error = "dynamo_frontend_custom_backend_errors_total"
        assert metric(await page(front), error, dynamo_endpoint="runtime_stats", error_type="timeout") >= 1
        await until("kv_cache_usage_perc", -1, worker_id=ids[0])  # it answers, and its ts stands still
        first.says = stats(0.8, 3)
        await until("kv_cache_usage_perc", 0.8, worker_id=ids[0])
        await mesh.lose(runtimes[0])
        await until("kv_cache_usage_perc", -1)  # gone with its instance
    told = [record.message for record in caplog.records if "gave no figures within" in record.message]
    assert len(told) == len(set(told)), "the log has it more than once"


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("{", "no JSON"),
        ("[]", "a list, not an object"),
        ({"schema_version": 2, "metrics": {}}, "schema_version is 2"),
        ({"schema_version": 1}, "no object `metrics`"),
        (stats(0.5, 1, gauges={"a b": 1}), "can't be the name"),
        (stats(0.5, 1, gauges={"a": "much"}), "no number"),
        (stats(0.5, 1, gauges={"a": 10**400}), "a is too large"),
        (stats(0.5, 1, counters={"x": 1, "x_total": 2}), "x is told twice"),
        (stats(0.5, 1, gauges={"x_total": 1}, counters={"x": 1}), "x is told twice"),
        (stats(0.5, 1, gauges={"h_count": 1}, histograms={"h": {"buckets": {}, "sum": 1, "count": 1}}), "told twice"),
        (stats(0.5, 1, gauges=[1]), "metrics.gauges is no object"),
        (stats(0.5, 1, gauges={f"g{n}": 1 for n in range(2000)}), "at most 1000"),
        (stats(0.5, 1, histograms={"h": {"buckets": {"x": 1}, "sum": 1, "count": 1}}), "no number"),
        (stats(0.5, 1, histograms={"h": {"buckets": {"1": 3, "2": 2}, "sum": 1, "count": 3}}), "not cumulative"),
        (stats(0.5, 1, histograms={"h": {"buckets": {}}}), "no number"),
        (None, "without an answer"),
        (stats(0.5, 1, gauges={"requests_total": 1}), "what the metrics of all workers are called"),
        (stats(0.5, 1, counters={"requests": 1}), "what the metrics of all workers are called"),
        (stats(0.5, 1, gauges={"uptime_seconds": 1}), "what the metrics of all workers are called"),
        (stats(0.5, 1, gauges={"g" * 201: 1}), "can't be the name"),
        (stats(0.5, 1, histograms={"h": {"buckets": {"nan": 1}, "sum": 1, "count": 1}}), "no number"),
        (
            stats(0.5, 1, histograms={"h": {"buckets": {str(n): 1 for n in range(2000)}, "sum": 1, "count": 1}}),
            "samples",
        ),
        ('"' + "x" * 1_100_000 + '"', "characters: at most"),
    ],
)
def test_figures_that_can_not_be_used(said: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        polling._read(said)


async def test_bad_figures_are_counted_and_told_once(mesh: Mesh, caplog: pytest.LogCaptureFixture) -> None:
    backend = Backend("{")
    await mesh.serve("nim.backend.runtime_stats", backend.generate)
    settings = {"backend_metrics_endpoint": "nim.backend.runtime_stats", "backend_metrics_interval_s": 0.05}
    with caplog.at_level(logging.WARNING, "dynamo_frontend.polling"):
        async with front_of(mesh, **settings) as front, asyncio.timeout(10):
            name = "dynamo_frontend_custom_backend_errors_total"
            while metric(await page(front), name, error_type="format") < 3:
                await asyncio.sleep(0.02)
            backend.says = stats(0.5, 1)  # well again, and then wrong in two ways
            while (text := await page(front)) and "dynamo_component_kv_cache_usage_perc" not in text:
                await asyncio.sleep(0.02)
            for says in ("{", "[]"):
                backend.says, before = says, metric(await page(front), name, error_type="format")
                while metric(await page(front), name, error_type="format") < before + 2:
                    await asyncio.sleep(0.02)
    said = [record.message for record in caplog.records if "can't be used" in record.message]
    assert [("no JSON" in text, "a list" in text) for text in said] == [(True, False), (False, True)]


def test_the_page_of_metrics_is_what_there_is() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools" / "metrics_page.py", "--check"], timeout=60)
    assert done.returncode == 0, "run python tools/metrics_page.py"
