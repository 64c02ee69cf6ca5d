"""The conformance kit: a right worker passes, and each of many wrong ones fails just the rule that it breaks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from click.testing import CliRunner
from grpc_health.v1 import health_pb2_grpc

from dynamo_grpc.cli.conformance import conformance
from dynamo_grpc.conformance import RULES, Report, judge
from dynamo_grpc.testing import Mesh
from dynamo_grpc.v1 import control_pb2_grpc, inference_pb2_grpc

from .conformance_workers import Right, RightText, RightVectors, Wrong
from .wrong_workers import WRONG


@asynccontextmanager
async def serving(mesh: Mesh, wrong: type[Wrong]) -> AsyncIterator[str]:
    """The wrong worker's address."""
    runtime = await mesh.serve_worker(wrong.base())
    servicer, server = wrong(f"127.0.0.1:{runtime.server.port}"), grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call,unused-ignore]
    control_pb2_grpc.add_ControlServicer_to_server(servicer, server)  # type: ignore[no-untyped-call,unused-ignore]
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        for task in servicer.kept:
            task.cancel()
        await asyncio.gather(*servicer.kept, return_exceptions=True)
        await server.stop(None)
        await servicer.channel.close()


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo_grpc.conformance.answers._NUM_STREAMS", 100)
    monkeypatch.setattr("dynamo_grpc.conformance.lifecycle._LEAST_S", 0.1)
    monkeypatch.setattr("dynamo_grpc.conformance.lifecycle._DEADLINE_S", 0.1)
    monkeypatch.setattr("dynamo_grpc.conformance.lifecycle._QUIET_S", 0.05)
    monkeypatch.setattr("dynamo_grpc.conformance.lifecycle.CALL_S", 10.0)
    monkeypatch.setattr("dynamo_grpc.conformance.lifecycle._DRAIN_S", 1.0)
    monkeypatch.setattr("dynamo_grpc.conformance.target._MOST_TOKENS", 2_000)


def failed(report: Report) -> dict[str, str]:
    return {verdict.rule: verdict.came for verdict in report.failed}


async def test_right_workers_pass(mesh: Mesh) -> None:
    passed: set[str] = set()
    for worker in (Right, RightText, RightVectors):
        runtime = await mesh.serve_worker(worker())
        report = await judge(f"127.0.0.1:{runtime.server.port}", drains=worker is not RightVectors)
        assert failed(report) == {}
        passed |= {verdict.rule for verdict in report.verdicts if verdict.outcome == "passed"}
    assert passed == {rule.name for rule in RULES}


async def test_one_that_passes_on_passes(mesh: Mesh) -> None:
    async with serving(mesh, Wrong) as address:
        report = await judge(address, drains=True)
        assert failed(report) == {}
        assert [v.rule for v in report.verdicts if v.outcome == "skipped"] == ["unicode", "embed", "embed-nothing"]


def test_there_is_a_wrong_worker_for_each_rule() -> None:
    assert set(WRONG) == {rule.name for rule in RULES}


@pytest.mark.full
@pytest.mark.parametrize("rule", WRONG)
async def test_a_wrong_worker_fails_just_its_rule(mesh: Mesh, rule: str) -> None:
    async with serving(mesh, WRONG[rule]) as address:
        report = await judge(address, drains=rule == "drain")
        assert set(failed(report)) == {rule}, failed(report)


async def test_as_a_command(mesh: Mesh, tmp_path: Any) -> None:
    runtime = await mesh.serve_worker(Right())
    address = f"127.0.0.1:{runtime.server.port}"

    async def run(*args: str) -> Any:
        return await asyncio.to_thread(CliRunner().invoke, conformance, [*args])

    done = await run(address, "--rule", "order", "--rule", "unicode")
    assert done.exit_code == 0, done.output
    assert "order" in done.output
    assert "1 passed, 0 failed, 1 skipped" in done.output
    async with serving(mesh, WRONG["order"]) as wrong:
        done = await run(wrong, "--rule", "order")
        assert done.exit_code == 1
        assert "came:   the outputs had the numbers 0, 2, 1" in done.output
        done = await run(wrong, "--rule", "order", "--json")
        report = json.loads(done.output)
        assert (report["failed"], report["rules"][0]["outcome"], done.exit_code) == (1, "failed", 1)
    for args, text in (
        ((address, "--model", "nope"), "serves no model 'nope': it serves ['right']"),
        (("127.0.0.1:1",), "nobody answers gRPC at 127.0.0.1:1"),
        ((address, "--rule", "nope"), "no rule 'nope'"),
        ((), "give HOST:PORT"),
    ):
        done = await run(*args)
        assert done.exit_code, done.output
        assert text in done.output
