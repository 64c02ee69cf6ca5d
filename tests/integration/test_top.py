"""`dynamo-grpc top`: figures from what a frontend tells, and the screen by its keys."""

from __future__ import annotations

import asyncio
import math

import pytest
from click.testing import CliRunner
from dynamo_frontend import top
from dynamo_frontend.figures import History, Moment, percentile, read_metrics
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from textual.widgets import DataTable, Static

from dynamo_grpc.testing import Mesh

from ..conftest import eventually
from .front import CHAT, Front, front_of

PAGE = """
# TYPE dynamo_frontend_model_workers gauge
dynamo_frontend_model_workers{model="m",dynamo_namespace="ns"} 2
# TYPE dynamo_frontend_requests counter
dynamo_frontend_requests_total{model="m",status="success"} %d
dynamo_frontend_requests_total{model="m",status="error"} %d
# TYPE dynamo_component_requests counter
dynamo_component_requests_total{worker_id="a1"} %d
# TYPE dynamo_component_inflight_requests gauge
dynamo_component_inflight_requests{worker_id="a1"} 3
"""
HEALTH = {
    "instances": [
        {"instance_id": "a1", "address": "h:1", "model": "m", "is_listed": True},
        {"instance_id": "b2", "address": "h:2", "model": "m", "is_listed": False},
    ]
}


def moment(at_s: float, good: int, bad: int, worker: int) -> Moment:
    return Moment(at_s, read_metrics(PAGE % (good, bad, worker)), HEALTH, {})


def test_rates_are_of_the_window() -> None:
    history = History()
    for at_s, good, bad, worker in ((0, 0, 0, 0), (5, 100, 0, 50), (10, 150, 10, 100), (20, 250, 10, 5)):
        history.add(moment(at_s, good, bad, worker))
    assert [m.at_s for m in history.moments] == [10, 20]
    (model,) = history.models()
    assert (model.name, model.num_workers, model.requests_per_s, model.errors_per_s) == ("m", 2, 10.0, 0.0)
    first, second = history.workers()
    assert (first.num_running, first.requests_per_s) == (3, 0.5), "it began again: what it counted is since then"
    assert (second.state, second.num_running, second.blocks) == ("kept", None, None)
    assert all(math.isnan(value) for value in model.ttft_s)


def test_percentiles_are_prometheus_own() -> None:
    registry = CollectorRegistry()
    histogram = Histogram("x", "x", buckets=(1, 2, 4), registry=registry)
    for value in (0.5, 1.5, 1.6, 3.0):
        histogram.observe(value)
    samples = read_metrics(generate_latest(registry).decode())
    counts = {float(dict(labels)["le"]): value for (name, labels), value in samples.items() if name == "x_bucket"}
    assert percentile(counts, 0.5) == 1.5
    assert percentile(counts, 0.25) == 1.0
    assert percentile({1.0: 0, math.inf: 5}, 0.5) == 0.0 or percentile({1.0: 0, math.inf: 5}, 0.5) == 1.0
    assert math.isnan(percentile({}, 0.5))


def cells(app: top.Top, table: str) -> list[list[str]]:
    shown = app.query_one(f"#{table}", DataTable)
    return [[str(cell) for cell in shown.get_row_at(row)] for row in range(shown.row_count)]


async def test_the_screen(mesh: Mesh, front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    drained: list[str] = []

    async def drain(address: str) -> str:
        drained.append(address)
        return f"{address} drains"

    monkeypatch.setattr(top, "drain", drain)
    app = top.Top(front.url, 0.05)
    async with app.run_test(size=(150, 40)) as pilot:
        await pilot.press("s", "d", "slash", "escape")  # before there is anything to show
        await eventually(lambda: cells(app, "workers"))
        for stream in (False, True):
            await front.post({**CHAT, "max_tokens": 5, "stream": stream})
        await front.error({**CHAT, "model": "[nobody]"}, 404)
        await eventually(lambda: cells(app, "errors"))
        (model,) = cells(app, "models")
        assert model[:2] == ["tiny", "1"]
        await eventually(lambda: float(cells(app, "models")[0][4]) > 0)
        assert "there is no model '[nobody]'" in cells(app, "errors")[0][5]
        assert cells(app, "errors")[0][3] == "[nobody]"
        live = front.frontend.catalog.ready()[0].instances.all()[0]
        (worker,) = cells(app, "workers")
        assert worker[:4] == [f"{live.instance_id:016x}", live.instance.address, "tiny", "serves"]
        await pilot.press("d")
        assert not drained
        await pilot.press("escape", "d")
        assert not drained
        await pilot.press("d")
        await eventually(lambda: drained == [live.instance.address])
        await pilot.press("slash", "x", "x", "enter")
        assert cells(app, "workers") == cells(app, "models") == []
        await pilot.press("escape")
        assert len(cells(app, "workers")) == 1
        await pilot.press("q")


async def test_a_frontend_that_is_gone_is_said(mesh: Mesh) -> None:
    async with front_of(mesh) as front:
        url = front.url
    app = top.Top(url, 0.05)
    async with app.run_test() as pilot:
        await eventually(lambda: "no frontend answers" in str(app.query_one("#head", Static).render()))
        await pilot.press("q")
    wrong = await asyncio.to_thread(CliRunner().invoke, top.top, ["--frontend", "ftp://x"])
    assert "is no URL of a frontend" in wrong.output
