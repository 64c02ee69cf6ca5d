"""What an operator looks at: running requests, failed ones, why a request goes where, logs."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynamo_grpc import ConfigurationError, Context, Worker
from dynamo_grpc.logs import parse_levels
from dynamo_grpc.testing import Mesh
from dynamo_grpc.v1 import inference_pb2

from ..conftest import eventually
from .front import CHAT, FOLDER, Front, front_of


class Paced(Worker):
    """Waits, streams three tokens, and waits again."""

    model_path = FOLDER
    model_name = "paced"
    max_concurrent = 2
    max_queued = 0

    def __init__(self) -> None:
        self.begin, self.end = asyncio.Event(), asyncio.Event()

    async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> AsyncIterator[int]:
        await self.begin.wait()
        for _ in range(3):
            yield 300
        await self.end.wait()


async def told(front: Front) -> Any:
    return (await front.http.get("/debug/requests")).json()


async def test_running_requests_and_the_last_that_failed(mesh: Mesh) -> None:
    worker = Paced()
    await mesh.serve_worker(worker)
    async with front_of(mesh) as front:
        await eventually(front.frontend.catalog.ready)
        body = {**CHAT, "model": "paced", "stream": True}
        asking = asyncio.ensure_future(front.post(body, headers={"x-request-id": "r1"}))

        async def phase(wanted: str) -> dict[str, Any]:
            async with asyncio.timeout(10):
                while not [row for row in (await told(front))["requests"] if row["phase"] == wanted]:
                    await asyncio.sleep(0.01)
            return dict((await told(front))["requests"][0])

        row = await phase("waiting for its first output")
        where = (await front.http.get("/health")).json()["instances"][0]["instance_id"]
        assert (row["id"], row["model"], row["tokens"], row["instance"]) == ("r1", "paced", 0, where)
        assert row["prompt_tokens"] > 5
        worker.begin.set()
        await phase("streaming")
        async with asyncio.timeout(10):
            while (row := (await told(front))["requests"][0])["tokens"] < 3:
                await asyncio.sleep(0.01)
        assert row["tokens"] == 3
        live = front.frontend.catalog.ready()[0].instances.all()[0]
        assert row["instance"] == f"{live.instance_id:016x}"
        worker.end.set()
        assert (await asking).status_code == 200
        await front.error({**CHAT, "model": "nobody"}, 404, headers={"x-request-id": "r2"})
        state = await told(front)
        assert state["num_running"] == len(state["requests"]) == 0
        assert [(e["id"], e["status"], e["error_type"]) for e in state["errors"]] == [("r2", 404, "model_not_found")]
    async with front_of(mesh, has_admin_api=False) as front:
        assert (await front.http.get("/debug/requests")).status_code == 404


async def test_why_a_request_goes_where(mesh: Mesh) -> None:
    workers = [Paced() for _ in range(3)]
    runtimes = [await mesh.serve_worker(worker) for worker in workers]
    async with front_of(mesh) as front:
        await eventually(front.frontend.catalog.ready)
        model = front.frontend.catalog.ready()[0]
        await eventually(lambda: len(model.instances.routable()) == 3)

        async def explained() -> Any:
            return (await front.post({"model": "paced"}, "/debug/route")).json()

        for _ in range(4):  # what it says is what then happens
            said = await explained()
            assert [row["left_out_because"] for row in said["workers"]] == [None] * 3
            assert sorted(row["score"] for row in said["workers"]) == [0, 1, 2]
            (chosen,) = said["chosen"]
            asking = asyncio.ensure_future(front.post({**CHAT, "model": "paced"}))
            await eventually(lambda: sum(w.num_inflight for w in model.instances.all()))
            live = model.instances.get(int(chosen, 16))
            assert live is not None
            assert live.num_inflight == 1
            asking.cancel()
            await eventually(lambda: not sum(w.num_inflight for w in model.instances.all()))
        for worker in workers:
            worker.begin.set()
            worker.end.set()
        for stream in (False, True):
            said = await explained()
            body = {**CHAT, "model": "paced", "max_tokens": 2, "stream": stream}
            answer = await front.post(body, headers={"x-explain-route": "1"})
            route = json.loads(answer.headers["x-route"])
            assert [route["instance"]] == route["chosen"] == said["chosen"]
            assert "x-route" not in (await front.post(body)).headers
        await mesh.lose(runtimes[0])
        await eventually(lambda: len(model.instances.routable()) == 2)
        reasons = {row["instance_id"]: row["left_out_because"] for row in (await explained())["workers"]}
        assert reasons[f"{runtimes[0].instance_id:016x}"] == "its connection is down"
        assert (await front.error({"model": "nobody"}, 404, "/debug/route"))["param"] == "model"


def test_levels_by_module() -> None:
    assert parse_levels("") == {"": logging.INFO}
    assert parse_levels("warn, dynamo_grpc::registry=debug,grpc=error") == {
        "": logging.WARNING,
        "dynamo_grpc.registry": logging.DEBUG,
        "grpc": logging.ERROR,
    }
    with pytest.raises(ConfigurationError, match="did you mean 'debug'"):
        parse_levels("debgu")


LOGGING = """
import logging
from dynamo_grpc import configure_dynamo_logging
configure_dynamo_logging("svc", "w1")
logging.getLogger("a.b").debug("quiet")
logging.getLogger("c.d").debug("loud", extra={"request_id": "r1", "tokens": 5, "none": None})
logging.getLogger("c").info("%s and more", "text", extra={"event": "named"})
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("c").exception("failed")
"""


def test_lines_as_json() -> None:
    env = {**os.environ, "DYN_LOGGING_JSONL": "1", "DYN_LOG": "info,c=debug"}
    done = subprocess.run([sys.executable, "-c", LOGGING], capture_output=True, text=True, check=True, env=env)
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert [event["message"] for event in events] == ["loud", "named", "failed"]
    first = events[0]
    assert (first["level"], first["target"], first["service"], first["worker_id"]) == ("DEBUG", "c.d", "svc", "w1")
    assert (first["request_id"], first["tokens"]) == ("r1", 5)
    assert first["time"].endswith("Z")
    assert "none" not in first
    assert "ZeroDivisionError" in events[2]["exception"]


def test_what_clients_say_is_in_one_line() -> None:
    script = """
import logging
from dynamo_grpc import configure_dynamo_logging
configure_dynamo_logging()
logging.getLogger("c").warning("said %s", "a\\nb\\x1b[2J\\u2028c\\x85d é", extra={"request_id": "r"})
"""
    for as_json in ("", "1"):
        env = {**os.environ, "DYN_LOGGING_JSONL": as_json, "DYN_LOG": ""}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
        assert len(done.stderr.splitlines()) == 1
        assert "\x1b" not in done.stderr
        assert "d é" in done.stderr


ODD = """
import logging, math
from dynamo_grpc import configure_dynamo_logging
configure_dynamo_logging(level="error")
loop = {}
loop["self"] = loop
log = logging.getLogger("x")
log.error("number", extra={"request_id": 123})
log.error("keys", extra={"field": {(1, 2): 3}})
log.error("loop", extra={"field": loop})
log.error("nan", extra={"field": math.nan, "level": "mine"})
logging.getLogger("grpc").info("quiet")
"""


@pytest.mark.parametrize("as_json", ["0", "1"])
def test_no_line_is_lost(as_json: str) -> None:
    env = {**os.environ, "DYN_LOGGING_JSONL": as_json}
    done = subprocess.run([sys.executable, "-c", ODD], capture_output=True, text=True, check=True, env=env)
    lines = done.stderr.splitlines()
    assert [next(word for word in ("number", "keys", "loop", "nan") if word in line) for line in lines] == [
        "number", "keys", "loop", "nan"
    ]  # fmt: skip
    if as_json == "1":
        assert [json.loads(line)["level"] for line in lines] == ["ERROR"] * 4
        assert json.loads(lines[3])["field_level"] == "mine"


async def test_a_client_writes_no_lines_of_its_own(front: Front, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dynamo_frontend.requests"):
        await front.error({**CHAT, "model": "x\n2026 INFO forged\u2028 status=200"}, 404)
    (record,) = (record for record in caplog.records if record.name == "dynamo_frontend.requests")
    assert len(record.getMessage().splitlines()) == 1


async def test_a_deadline_is_one_however_early_a_timer_is(mesh: Mesh) -> None:
    await mesh.serve_worker(worker := Paced())
    worker.begin.set()
    async with front_of(mesh) as front:
        await eventually(front.frontend.catalog.ready)
        for _ in range(10):
            body = {**CHAT, "model": "paced"}
            assert (await front.post(body, headers={"x-request-timeout": "20ms"})).status_code in (503, 504)


async def test_a_line_for_each_request(front: Front, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dynamo_frontend.requests"):
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        text = "a secret of mine"
        messages = [{"role": "user", "content": text}]
        answer = await front.post(
            {**CHAT, "messages": messages, "max_tokens": 3}, headers={"x-request-id": "r1", "traceparent": trace}
        )
        await front.error({**CHAT, "top_p": 5}, 400, headers={"x-request-id": "r2"})
    first, second = (record for record in caplog.records if record.name == "dynamo_frontend.requests")
    assert answer.headers["x-request-id"] == first.request_id == "r1"  # type: ignore[attr-defined]
    fields = vars(first)
    assert (fields["event"], fields["model"], fields["status"], fields["finish"]) == (
        "request ended", "tiny", 200, "length"
    )  # fmt: skip
    assert (fields["output_tokens"], fields["num_migrations"], fields["is_stream"]) == (3, 0, False)
    assert fields["total_ms"] >= fields["ttft_ms"] > 0
    assert "trace=0af7651916cd43dd8448eb211c80319c" in first.getMessage()
    assert (vars(second)["status"], vars(second)["error_type"]) == (400, "validation")
    assert text not in caplog.text


DUMPED = """
import asyncio, os, signal, sys
from dynamo_grpc import configure_dynamo_logging, dump

async def main():
    configure_dynamo_logging()
    dump.install(lambda: ["r1 waits", "r2 streams"])
    waiting = asyncio.create_task(asyncio.sleep(60), name="x")
    await asyncio.sleep(0)
    os.kill(os.getpid(), signal.SIGUSR1)
    await asyncio.sleep(0.2)
    waiting.cancel()
    print("lives")

asyncio.run(main())
"""


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no SIGUSR1")
def test_a_signal_shows_what_a_process_does() -> None:
    done = subprocess.run([sys.executable, "-c", DUMPED], capture_output=True, text=True, timeout=30)
    assert done.stdout == "lives\n"
    assert "2 requests run:\n  r1 waits\n  r2 streams" in done.stderr
    assert "2 tasks, by where they are" in done.stderr
    assert "Current thread" in done.stderr
