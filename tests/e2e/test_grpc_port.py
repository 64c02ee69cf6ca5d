"""The frontend's gRPC port as a command has it: which port, what happens at the end, several processes."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import grpc
import httpx
import pytest

from dynamo_grpc.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

from ..conftest import Process
from ..etcd import free_port
from .test_up import CHAT, until

Start = Callable[..., Process]


@pytest.fixture
def worker(cli: Start) -> str:
    return cli("worker", "tiny", "--discovery-backend", "static").wait_for(r"worker ready at (\S+)")[1]


def ask(max_tokens: int = 8) -> inference_pb2.PreprocessedRequest:
    stop = inference_pb2.StopConditions(max_tokens=max_tokens, ignore_eos=True)
    return inference_pb2.PreprocessedRequest(text="The sea", stop_conditions=stop)


def generate(address: str, max_tokens: int = 8) -> int:
    """How many tokens came."""
    with grpc.insecure_channel(address) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        answer = stub.GenerateOnce(ask(max_tokens), timeout=20, wait_for_ready=True)
    return len(answer.choices[0].token_ids)


def test_which_port(cli: Start, worker: str) -> None:
    port = free_port()
    front = cli("frontend", "--http-port", "0", "--grpc-port", str(port), "--static", worker)
    assert front.wait_for(r"gRPC at (\S+);")[1] == f"127.0.0.1:{port}"
    front.wait_for("model 'tiny' is ready")
    assert generate(f"127.0.0.1:{port}") == 8
    taken = cli("frontend", "--http-port", "0", "--grpc-port", str(port), "--static", worker)
    assert taken.wait() == 1
    assert f"can't listen on 127.0.0.1:{port} for gRPC" in taken.output
    off = cli("frontend", "--http-port", "0", "--grpc-port", "off", "--static", worker)
    assert "gRPC" not in off.wait_for(r"frontend ready at .*")[0]
    wrong = cli("frontend", "--grpc-port", "on")
    assert wrong.wait() == 2


def test_the_usual_port_is_taken_by_somebody_else(cli: Start, worker: str) -> None:
    """Nobody asked for it: HTTP is served, and the log says what is missing."""
    with contextlib.suppress(OSError), socket.socket() as other:
        with contextlib.suppress(OSError):  # or it is taken already
            other.bind(("127.0.0.1", 8001))
            other.listen()
        front = cli("frontend", "--http-port", "0", "--static", worker)
        url = front.wait_for(r"frontend ready at (http://\S+)")[1]
        assert "no port for gRPC clients" in front.output
        assert "--grpc-port chooses another one" in front.output
        until(lambda: httpx.get(f"{url}/health").status_code == 200)


def test_it_ends_when_what_runs_has_ended(cli: Start, worker: str) -> None:
    front = cli("frontend", "--http-port", "0", "--grpc-port", "0", "--static", worker, "--shutdown-timeout-s", "20")
    address = front.wait_for(r"gRPC at (\S+);")[1]
    front.wait_for("model 'tiny' is ready")
    with grpc.insecure_channel(address) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        call = stub.Generate(ask(1500))
        outputs = [next(call)]
        front.signal(signal.SIGTERM)

        def refused() -> bool:
            try:
                stub.GenerateOnce(ask(), timeout=5)
            except grpc.RpcError as error:
                return error.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
            return False

        until(refused)
        outputs += list(call)
    assert sum(len(choice.token_ids) for output in outputs for choice in output.choices) == 1500
    assert front.wait() == -signal.SIGTERM  # as uvicorn has it


def test_it_ends_at_its_limit(cli: Start, worker: str) -> None:
    front = cli("frontend", "--http-port", "0", "--grpc-port", "0", "--static", worker, "--shutdown-timeout-s", "1")
    address = front.wait_for(r"gRPC at (\S+);")[1]
    front.wait_for("model 'tiny' is ready")
    with grpc.insecure_channel(address) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        call = stub.Generate(ask(8_000))
        next(call)
        front.signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError, match="the frontend is shutting down"):
            list(call)
    assert front.wait() == -signal.SIGTERM  # as uvicorn has it


def test_processes_share_it(cli: Start, worker: str) -> None:
    front = cli("frontend", "--http-port", "0", "--grpc-port", "0", "--processes", "2", "--static", worker)
    ready = front.wait_for(r"ready at (http://\S+) \(gRPC at (\S+);.*2 processes\)")
    url, address = ready[1], ready[2]
    until(lambda: httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "max_tokens": 3}).status_code == 200)

    def described() -> int:
        with grpc.insecure_channel(address) as channel:
            stub: Any = control_pb2_grpc.ControlStub(channel)
            return len(stub.Describe(control_pb2.DescribeRequest(), timeout=10, wait_for_ready=True).cards)

    until(lambda: [described() for _ in range(10)] == [1] * 10)
    counts: list[int] = []
    threads = [threading.Thread(target=lambda: counts.append(generate(address))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [8] * 16
    refused = cli("frontend", "--processes", "2", "--grpc-admin-port", "0", "--static", worker)
    assert refused.wait() == 2
