"""The contract from outside: buf, grpcurl, buf curl, etcdctl's neighbours."""

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ..conftest import ROOT, Process
from ..etcd import free_port

pytestmark = pytest.mark.full
Start = Callable[..., Process]
Tool = Callable[[str], str]
PROTO = "protos/dynamo_grpc/v1/inference.proto"


def buf(tool: Tool, *args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tool("buf"), *args], cwd=cwd, capture_output=True, text=True)


def test_buf_lint_passes(tool: Tool) -> None:
    done = buf(tool, "lint")
    assert done.returncode == 0, done.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    return tmp_path


def breaking(tool: Tool, folder: Path) -> subprocess.CompletedProcess[str]:
    return buf(tool, "breaking", "--against", "protos/baseline.binpb", cwd=folder)


def test_nothing_breaks_the_baseline(tool: Tool, copy: Path) -> None:
    done = breaking(tool, copy)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("optional float temperature = 3;", "optional double temperature = 3;", "temperature"),
        ("optional float top_p = 4;", "optional float top_p = 14;", "4"),
        ("optional uint32 max_tokens = 1;", "optional uint32 max_new_tokens = 1;", "max_new_tokens"),
        ("FINISH_REASON_LENGTH = 2;", "FINISH_REASON_LENGTH = 12;", "2"),
        ("rpc Embed(EmbedRequest) returns (EmbedResponse);", "", "Embed"),
    ],
    ids=["type", "number", "name", "enum", "rpc"],
)
def test_a_breaking_change_is_caught(tool: Tool, copy: Path, old: str, new: str, said: str) -> None:
    path = copy / PROTO
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    done = breaking(tool, copy)
    assert done.returncode != 0
    assert said in done.stdout


def test_an_uncommented_field_is_caught(tool: Tool, copy: Path) -> None:
    path = copy / PROTO
    path.write_text(
        re.sub(
            r"\n  // Divides the logits; 0 always.*\n  optional float temperature = 3",
            "\n  optional float temperature = 3",
            path.read_text(),
            count=1,
        )
    )
    assert "COMMENT" in buf(tool, "lint", cwd=copy).stdout or "comment" in buf(tool, "lint", cwd=copy).stdout


# -- grpcurl, without any proto file ------------------------------------------------------------------------------------


@pytest.fixture
def worker(cli: Start) -> tuple[str, Process]:
    registry = free_port()
    env = {"ETCD_ENDPOINTS": f"127.0.0.1:{registry}"}
    cli("registry", "--port", str(registry)).wait_for("ready")
    process = cli("worker", "tiny", "--log-level", "debug", env=env)
    return process.wait_for(r"worker ready at (\S+)")[1], process


def curl(tool: Tool, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tool("grpcurl"), "-plaintext", *args], capture_output=True, text=True, timeout=60)


def messages(text: str) -> list[dict[str, object]]:
    decoder, found, at = json.JSONDecoder(), [], 0
    while at < len(text.rstrip()):
        value, end = decoder.raw_decode(text, at)
        found.append(value)
        at = end + len(text[end:]) - len(text[end:].lstrip())
    return found


def test_list_and_describe(tool: Tool, worker: tuple[str, Process]) -> None:
    address, _ = worker
    assert curl(tool, address, "list").stdout.split() == [
        "dynamo_grpc.v1.Control",
        "dynamo_grpc.v1.Endpoint",
        "dynamo_grpc.v1.Inference",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    ]
    for name in ("", "dynamo_grpc.v1.SamplingOptions", "grpc.reflection.v1.ServerReflection"):
        described = curl(tool, address, "describe", *([name] if name else []))
        assert described.returncode == 0, described.stderr
    assert "optional float temperature = 3" in curl(tool, address, "describe", "dynamo_grpc.v1.SamplingOptions").stdout
    listed = subprocess.run(
        [tool("buf"), "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--list-methods", f"http://{address}"],
        capture_output=True,
        text=True,
    )
    assert "dynamo_grpc.v1.Inference/Generate" in listed.stdout, listed.stderr


def test_generate(tool: Tool, worker: tuple[str, Process]) -> None:
    address, _ = worker
    body = '{"model":"tiny","token_ids":[5,6,7],"stop_conditions":{"max_tokens":8}}'
    done = curl(tool, "-d", body, address, "dynamo_grpc.v1.Inference/Generate")
    assert done.returncode == 0, done.stderr
    assert len(messages(done.stdout)) == 8
    minimal = curl(tool, "-d", '{"token_ids":[5]}', address, "dynamo_grpc.v1.Inference/GenerateOnce")
    (answer,) = messages(minimal.stdout)
    assert answer["choices"][0]["finish"]["reason"] == "FINISH_REASON_STOP"  # type: ignore[index]
    assert (
        len(
            answer["choices"][0]["token_ids"]
            if "token_ids" in answer["choices"][0]
            else answer["choices"][0]["tokenIds"]
        )
        >= 64
    )  # type: ignore[index]


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        ('{"model":"nope","token_ids":[5]}', "NotFound", "it serves 'tiny'"),
        ("{}", "InvalidArgument", "the prompt is empty"),
        ('{"token_ids":[99999]}', "InvalidArgument", "ids go from 0 to"),
        ('{"token_ids":[5],"sampling_options":{"temperature":-1}}', "InvalidArgument", "temperature is -1"),
        ('{"token_ids":[5],"sampling_options":{"top_p":2}}', "InvalidArgument", "top_p is 2"),
        ('{"token_ids":[5],"stop_conditions":{"stop":["x"]}}', "Unimplemented", "stop_conditions.stop"),
        ('{"text":"hi"}', "Unimplemented", "takes token_ids"),
        ('{"token_ids":[5],"mdc_sum":"x"}', "FailedPrecondition", "model card x"),
        ('{"token_ids":[5],"sampling_options":{"use_beam_search":true}}', "Unimplemented", "use_beam_search"),
    ],
)
def test_bad_input(tool: Tool, worker: tuple[str, Process], body: str, code: str, text: str) -> None:
    done = curl(tool, "-d", body, worker[0], "dynamo_grpc.v1.Inference/Generate")
    assert f"Code: {code}" in done.stderr
    assert text in done.stderr
    assert "ErrorInfo" in done.stderr
    if code == "InvalidArgument":
        assert "google.rpc.BadRequest" in done.stderr


def test_what_json_can_not_be_is_refused_by_the_tool(tool: Tool, worker: tuple[str, Process]) -> None:
    done = curl(
        tool,
        "-d",
        '{"token_ids":[5],"stop_conditions":{"max_tokens":-1}}',
        worker[0],
        "dynamo_grpc.v1.Inference/Generate",
    )
    assert done.returncode != 0


def test_a_deadline_and_a_cancel_stop_the_worker(tool: Tool, worker: tuple[str, Process]) -> None:
    address, process = worker
    endless = '{"token_ids":[5],"stop_conditions":{"ignore_eos":true,"max_tokens":8000}}'
    done = curl(tool, "-max-time", "1", "-d", endless, address, "dynamo_grpc.v1.Inference/Generate")
    assert "DeadlineExceeded" in done.stderr
    process.wait_for(r"(?s)(Inference/Generate ended after.*){1}", 5)
    running = subprocess.Popen(
        [tool("grpcurl"), "-plaintext", "-d", endless, address, "dynamo_grpc.v1.Inference/Generate"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    running.stdout.readline()
    running.terminate()  # its connection goes: the call is cancelled
    running.wait(10)
    running.stdout.close()
    process.wait_for(r"(?s)(Inference/Generate ended after.*){2}", 5)


@pytest.fixture
def frontend(cli: Start, worker: tuple[str, Process]) -> tuple[str, Process]:
    process = cli("frontend", "--http-port", "0", "--grpc-port", "0", "--static", worker[0])
    address = process.wait_for(r"gRPC at (\S+);")[1]
    process.wait_for("model 'tiny' is ready")
    return address, process


def test_the_same_at_the_frontend(tool: Tool, frontend: tuple[str, Process]) -> None:
    address, process = frontend
    assert curl(tool, address, "list").stdout.split() == [
        "dynamo_grpc.v1.Control",
        "dynamo_grpc.v1.Inference",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
        "inference.GRPCInferenceService",
    ]
    for name in ("", "dynamo_grpc.v1.PreprocessedRequest", "inference.ModelInferRequest"):
        described = curl(tool, address, "describe", *([name] if name else []))
        assert described.returncode == 0, described.stderr
    smallest = curl(tool, "-d", '{"text":"The sea"}', address, "dynamo_grpc.v1.Inference/GenerateOnce")
    (answer,) = messages(smallest.stdout)
    assert len(answer["choices"][0]["text"]) > 100  # type: ignore[index]
    endless = '{"token_ids":[5],"stop_conditions":{"ignore_eos":true,"max_tokens":8000}}'
    done = curl(tool, "-max-time", "1", "-d", endless, address, "dynamo_grpc.v1.Inference/Generate")
    assert "DeadlineExceeded" in done.stderr
    assert messages(done.stdout)
    process.wait_for("generate model=tiny status=504 error=deadline_exceeded")
    for body, code, text in (
        ('{"model":"nope","text":"x"}', "NotFound", "there is 'tiny'"),
        ("{}", "InvalidArgument", "the prompt is empty"),
        ('{"text":"x","sampling_options":{"top_p":2}}', "InvalidArgument", "top_p is 2"),
        ('{"text":"x","guided_decoding":{"regex":"a"}}', "Unimplemented", "guided_decoding"),
    ):
        failed = curl(tool, "-d", body, address, "dynamo_grpc.v1.Inference/Generate")
        assert f"Code: {code}" in failed.stderr
        assert text in failed.stderr
        assert "google.rpc.ErrorInfo" in failed.stderr


def test_channelz(tool: Tool, cli: Start) -> None:
    process = cli("worker", "tiny", "--grpc-admin-port", "0", env={"DYN_DISCOVERY_BACKEND": "static"})
    address = process.wait_for(r"worker ready at (\S+)")[1]
    port = process.wait_for(r"admin port (\d+): channelz")[1]
    assert "grpc.channelz.v1.Channelz" in curl(tool, f"127.0.0.1:{port}", "list").stdout
    assert curl(tool, "-d", '{"token_ids":[5]}', address, "dynamo_grpc.v1.Inference/GenerateOnce").returncode == 0
    (servers,) = messages(curl(tool, f"127.0.0.1:{port}", "grpc.channelz.v1.Channelz/GetServers").stdout)
    calls = [int(server["data"].get("calls_succeeded", "0")) for server in servers["server"]]  # type: ignore[attr-defined]
    assert sum(calls) >= 1


def test_health(tool: Tool, worker: tuple[str, Process]) -> None:
    address, process = worker
    service = "grpc.health.v1.Health"
    assert messages(curl(tool, address, f"{service}/Check").stdout) == [{"status": "SERVING"}]
    assert "SERVING" in curl(tool, "-d", '{"service":"model/tiny"}', address, f"{service}/Check").stdout
    assert "NotFound" in curl(tool, "-d", '{"service":"nope"}', address, f"{service}/Check").stderr
    (listed,) = messages(curl(tool, address, f"{service}/List").stdout)
    assert listed["statuses"]["model/tiny"] == {"status": "SERVING"}  # type: ignore[index]
    watching = subprocess.Popen(
        [tool("grpcurl"), "-plaintext", address, f"{service}/Watch"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    time.sleep(0.5)
    process.signal(signal.SIGTERM)
    out, _ = watching.communicate(timeout=10)
    assert [m["status"] for m in messages(out)] == ["SERVING", "NOT_SERVING"]
