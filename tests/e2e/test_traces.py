"""One connected trace for each request, as an OTLP collector gets it: processes of our own, the standard variables."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from ..conftest import ROOT, Process
from ..etcd import free_port
from .test_up import CHAT, until

Start = Callable[..., Process]
SERVER, CLIENT = 2, 3

WORKER = """
import asyncio
from opentelemetry import trace
import dynamo_workers.tiny
from pathlib import Path
from dynamo_grpc import Worker

class Slow(Worker):
    model_path = Path(dynamo_workers.tiny.__file__).parent / "model"
    model_name = "slow"

    async def generate(self, request, context):
        with trace.get_tracer("engine").start_as_current_span("engine.prefill"):
            pass
        for _ in range(200):
            yield 300
            await asyncio.sleep(0.02)
"""


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans that are exported to it."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        self.server = grpc.server(concurrent.futures.ThreadPoolExecutor(4))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            for scope in resource.scope_spans:
                for span in scope.spans:
                    values = {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}
                    self.spans.append(
                        {
                            "service": service,
                            "name": span.name,
                            "kind": span.kind,
                            "trace": span.trace_id.hex(),
                            "id": span.span_id.hex(),
                            "parent": span.parent_span_id.hex(),
                            "events": [event.name for event in span.events],
                            "status": span.status.code,
                            **values,
                        }
                    )
        return trace_service_pb2.ExportTraceServiceResponse()

    def of(self, trace_id: str, **wanted: Any) -> list[dict[str, Any]]:
        return [s for s in self.spans if s["trace"] == trace_id and wanted.items() <= s.items()]

    def one(self, trace_id: str, **wanted: Any) -> dict[str, Any]:
        until(lambda: self.of(trace_id, **wanted))
        (span,) = self.of(trace_id, **wanted)
        return span


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.stop(0)


@pytest.fixture
def env(collector: Collector) -> dict[str, str]:
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        "DYN_DISCOVERY_BACKEND": "static",
    }


def parent_header() -> tuple[str, str, dict[str, str]]:
    trace_id, span_id = os.urandom(16).hex(), os.urandom(8).hex()
    return trace_id, span_id, {"traceparent": f"00-{trace_id}-{span_id}-01"}


@pytest.mark.full
def test_a_request_and_the_engine_behind_it(
    cli: Start, collector: Collector, env: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(WORKER)
    ports = [free_port(), free_port()]
    workers = [cli("worker", str(tmp_path / "slow.py"), "--port", str(port), env=env) for port in ports]
    for worker in workers:
        worker.wait_for("worker ready")
    addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
    url = cli("frontend", "--http-port", "0", "--static", addresses, env=env).wait_for(r"ready at (http://\S+)")[1]
    until(lambda: len(httpx.get(f"{url}/health").json()["instances"]) == 2)
    body = {**CHAT, "model": "slow", "stream": True}

    # plain
    trace_id, span_id, headers = parent_header()
    response = httpx.post(f"{url}/v1/chat/completions", json={**body, "max_tokens": 3}, headers=headers, timeout=30)
    root = collector.one(trace_id, kind=SERVER, name="POST /v1/chat/completions")
    attempt = collector.one(trace_id, kind=CLIENT, name="dynamo_grpc.v1.Inference/Generate")
    served = collector.one(trace_id, kind=SERVER, name="dynamo_grpc.v1.Inference/Generate")
    engine = collector.one(trace_id, name="engine.prefill")
    assert [span["parent"] for span in (root, attempt, served, engine)] == [
        span_id, root["id"], attempt["id"], served["id"]
    ]  # fmt: skip
    assert [span["service"] for span in (root, served)] == ["dynamo-grpc-frontend", "dynamo-grpc-worker"]
    assert root["gen_ai.operation.name"] == "chat"
    assert root["gen_ai.request.model"] == "slow"
    assert root["gen_ai.usage.output_tokens"] == 3
    assert root["http.response.status_code"] == 200
    assert root["dynamo.request_id"] == served["dynamo.request_id"] == response.headers["x-request-id"]
    assert root["events"] == attempt["events"] == ["first_output"]
    assert attempt["dynamo.attempt"] == 1
    assert attempt["server.port"] in ports
    assert attempt["dynamo.instance_id"] == root["dynamo.instance_id"]

    # refused: no attempt
    trace_id, _, headers = parent_header()
    httpx.post(f"{url}/v1/chat/completions", json={**body, "top_p": 5}, headers=headers)
    root = collector.one(trace_id, name="POST /v1/chat/completions")
    assert (root["http.response.status_code"], root["error.type"], root["status"]) == (400, "invalid_request", 0)
    assert len(collector.of(trace_id)) == 1

    # cancelled in the middle
    trace_id, _, headers = parent_header()
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as stream:
        next(lines := stream.iter_lines())
        for line in lines:
            if '"content":"' in line:
                break
    root = collector.one(trace_id, kind=SERVER, name="POST /v1/chat/completions")
    attempt = collector.one(trace_id, kind=CLIENT)
    served = collector.one(trace_id, kind=SERVER, name="dynamo_grpc.v1.Inference/Generate")
    for span in (root, attempt, served):
        assert span["error.type"] == "cancelled", span
        assert "cancelled" in span["events"]
        assert span["status"] == 0

    # moved in the middle
    trace_id, _, headers = parent_header()
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=30) as stream:
        lines, killed = stream.iter_lines(), None
        for number, _ in enumerate(lines):
            if number == 20:
                running = [w for w in workers if runs(url, w, ports[workers.index(w)])]
                (killed,) = running
                os.kill(killed.pid, signal.SIGKILL)
    root = collector.one(trace_id, kind=SERVER, name="POST /v1/chat/completions")
    first, second = (collector.one(trace_id, **{"dynamo.attempt": number}) for number in (1, 2))
    assert root["dynamo.num_migrations"] == 1
    assert "migrated" in root["events"]
    assert first["parent"] == second["parent"] == root["id"]
    assert (first["error.type"], first["status"]) == ("instance_lost", 2)
    assert "error.type" not in second
    served = collector.one(trace_id, kind=SERVER, name="dynamo_grpc.v1.Inference/Generate")  # the first one's died
    assert served["parent"] == second["id"]


def runs(url: str, worker: Process, port: int) -> bool:
    """Whether the frontend's one request is at the worker."""
    instances = httpx.get(f"{url}/health").json()["instances"]
    worker_id = next(i["instance_id"] for i in instances if i["address"].endswith(f":{port}"))
    return f'worker_id="{worker_id}"}} 1.0' in httpx.get(f"{url}/metrics").text


@pytest.mark.full
def test_a_call_through_a_proxy(start: Start, cli: Start, collector: Collector, env: dict[str, str]) -> None:
    registry = cli("registry", "--port", "0").wait_for(r"registry ready at (\S+)")[1]
    env = {**env, "ETCD_ENDPOINTS": registry, "DYN_DISCOVERY_BACKEND": "etcd"}
    folder = ROOT / "examples" / "cancellation"
    for name in ("server.py", "middle_server.py"):
        start(sys.executable, str(folder / name), env=env).wait_for("serving demo")
    call = cli("call", "demo.middle.generate", '"x"', "--wait-s", "20", env=env)
    call.wait_for(r"(?m)^3$")
    call.signal(signal.SIGINT)
    until(lambda: [span for span in collector.spans if span["kind"] == CLIENT])
    (attempt,) = (span for span in collector.spans if span["kind"] == CLIENT)
    trace_id = attempt["trace"]
    until(lambda: len(collector.of(trace_id, kind=SERVER)) == 2)
    outer, inner = sorted(collector.of(trace_id, kind=SERVER), key=lambda span: bool(span["parent"]))
    assert attempt["name"] == outer["name"] == inner["name"] == "dynamo_grpc.v1.Endpoint/Call"
    assert [outer["parent"], attempt["parent"], inner["parent"]] == ["", outer["id"], attempt["id"]]
    assert outer["dynamo.request_id"] == inner["dynamo.request_id"]
