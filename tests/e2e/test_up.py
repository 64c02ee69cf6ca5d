"""The whole mesh as processes: `up`, signals, kill -9, start order."""

import asyncio
import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from ..conftest import Process
from ..etcd import free_port

Start = Callable[..., Process]
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Tell me about the sea"}], "seed": 1}


class Up:
    """A running `dynamo-grpc up`."""

    def __init__(self, cli: Start, *args: str, workers: int = 1, **kwargs: Any) -> None:
        self.http, self.registry, self.port = free_port(), free_port(), free_ports(workers)
        self.url = f"http://127.0.0.1:{self.http}"
        ports = ("--http-port", str(self.http), "--registry-port", str(self.registry), "--port", str(self.port))
        self.process = cli("up", "--workers", str(workers), *ports, *args, **kwargs)

    def wait_ready(self, workers: int = 1) -> None:
        self.process.wait_for(rf"(?s)(worker ready at.*){{{workers}}}", 60)
        self.process.wait_for("all ready", 60)

    def worker_pid(self, port: int) -> int:
        return next(pid for pid, command in children(self.process.pid) if f"--port {port}" in command)


def free_ports(count: int) -> int:
    """The first of `count` free ports in a row."""
    while True:
        first = free_port()
        try:
            for sock in [socket.create_server(("127.0.0.1", first + i)) for i in range(count)]:
                sock.close()
        except OSError:
            continue
        return first


def children(parent: int) -> list[tuple[int, str]]:
    """Processes below `parent`, with their commands."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent:
                command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found += [(int(path.name), command), *children(int(path.name))]
        except (OSError, ProcessLookupError):
            continue
    return found


def models(url: str) -> list[str]:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as answer:
        return [model["id"] for model in json.load(answer)["data"]]


def until(check: Callable[[], object], timeout_s: float = 20.0) -> float:
    """Wait until `check()` is true; gives how long that took, in seconds."""
    started = time.monotonic()
    while True:
        try:
            if check():
                return time.monotonic() - started
        except OSError:
            pass
        assert time.monotonic() - started < timeout_s, "it doesn't come true"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_up_shows_an_answer_and_leaves_nothing_behind(cli: Start, tmp_path: Path, number: int) -> None:
    (tmp_path / "tmp").mkdir()
    up = Up(cli, "--ask", "Tell me about the sea", env={"TMPDIR": str(tmp_path / "tmp")})
    up.wait_ready()
    up.process.wait_for("running until Ctrl-C")
    assert len(up.process.output.split("> Tell me about the sea")[1]) > 200
    family = [pid for pid, _ in children(up.process.pid)]
    assert len(family) >= 2
    assert list((tmp_path / "tmp").iterdir()) == []
    up.process.signal(number)
    assert up.process.wait() == 0, up.process.output
    assert [pid for pid in family if Path(f"/proc/{pid}").exists()] == []
    assert list((tmp_path / "tmp").iterdir()) == []
    assert "Traceback" not in up.process.output


def test_a_killed_supervisor_takes_its_parts_along(cli: Start) -> None:
    up = Up(cli)
    up.wait_ready()
    family = [pid for pid, _ in children(up.process.pid)]
    up.process.signal(signal.SIGKILL)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family))


def test_the_same_answer_by_every_way(cli: Start) -> None:
    up = Up(cli)
    up.wait_ready()
    client = openai.OpenAI(base_url=f"{up.url}/v1", api_key="none")
    whole = client.chat.completions.create(**CHAT, max_tokens=20)
    streamed = client.chat.completions.create(**CHAT, max_tokens=20, stream=True)
    text = whole.choices[0].message.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == text
    import dynamo_workers.tiny
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(dynamo_workers.tiny.__file__).parent / "model" / "tokenizer.json"))
    ids = tokenizer.encode("<|begin|><|user|>Tell me about the sea<|end|><|assistant|>").ids
    request = {"token_ids": ids, "sampling_options": {"seed": 1}, "stop_conditions": {"max_tokens": 20}}
    call = cli(
        "call", "dynamo.backend.generate", json.dumps(request), env={"ETCD_ENDPOINTS": f"127.0.0.1:{up.registry}"}
    )
    assert call.wait() == 0, call.output
    by_library = [token for line in call.output.splitlines() for token in json.loads(line)["token_ids"]]
    assert tokenizer.decode(by_library) == text

    async def by_stub() -> list[int]:
        import grpc

        from dynamo_grpc.v1 import inference_pb2, inference_pb2_grpc

        message = inference_pb2.PreprocessedRequest(
            token_ids=ids,
            sampling_options=inference_pb2.SamplingOptions(seed=1),
            stop_conditions=inference_pb2.StopConditions(max_tokens=20),
        )
        async with grpc.aio.insecure_channel(f"127.0.0.1:{up.port}") as channel:
            stream = inference_pb2_grpc.InferenceStub(channel).Generate(message)
            return [token async for response in stream for token in response.choices[0].token_ids]

    assert asyncio.run(by_stub()) == by_library


async def test_a_worker_killed_under_load_costs_no_request(cli: Start) -> None:
    up = Up(cli, workers=3)
    await asyncio.to_thread(up.wait_ready, 3)
    body = {**CHAT, "stream": True, "max_tokens": 60}
    failed_early, begun, done, lost = [], 0, 0, 0

    async def one(http: httpx.AsyncClient) -> None:
        nonlocal begun, done, lost
        async with http.stream("POST", f"{up.url}/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                failed_early.append((response.status_code, await response.aread()))
                return
            text = ""
            async for line in response.aiter_lines():
                text += line
            begun += 1
            if '"error"' in text:
                assert '"content":' in text.split('"error"')[0]
                lost += 1
            else:
                assert text.endswith("data: [DONE]")
                done += 1

    async def loop(http: httpx.AsyncClient, until_s: float) -> None:
        while time.monotonic() < until_s:
            await one(http)

    async with httpx.AsyncClient(timeout=30, limits=httpx.Limits(max_connections=50)) as http:
        end = time.monotonic() + 4.0
        tasks = [asyncio.ensure_future(loop(http, end)) for _ in range(24)]
        await asyncio.sleep(1.5)
        os.kill(up.worker_pid(up.port), signal.SIGKILL)
        await asyncio.gather(*tasks)
    assert failed_early == []
    assert done > 30
    assert lost == 0  # those that streamed from the killed worker at that moment went on elsewhere
    up.process.wait_for("worker 1 ended \\(SIGKILL\\), starting it again")
    until(lambda: up.process.output.count(f"worker ready at 127.0.0.1:{up.port} ") == 2)


def test_three_workers_share_the_load(cli: Start) -> None:
    up = Up(cli, workers=3)
    up.wait_ready(3)
    client = openai.OpenAI(base_url=f"{up.url}/v1", api_key="none")
    for _ in range(9):
        client.chat.completions.create(**CHAT, max_tokens=1)
    up.process.wait_for(r"(?s)(finish=length.*){9}")
    instances = [line.rsplit("instance=", 1)[1] for line in up.process.output.splitlines() if "finish=length" in line]
    assert sorted(instances.count(instance) for instance in set(instances)) == [3, 3, 3]


@pytest.mark.full
def test_start_order_does_not_matter(cli: Start) -> None:
    port, http = free_port(), free_port()
    env = {"ETCD_ENDPOINTS": f"127.0.0.1:{port}", "ETCD_LEASE_TTL": "3"}
    frontend = cli("frontend", "--http-port", str(http), "--instance-wait-s", "0.5", env=env)
    worker = cli("worker", "tiny", env=env)
    url = f"http://127.0.0.1:{http}"
    frontend.wait_for("frontend ready")
    worker.wait_for("registering failed, trying again")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{url}/v1/chat/completions", json.dumps(CHAT).encode(), timeout=5)
    assert caught.value.code == 503
    time.sleep(3.0)  # long enough for back-offs to grow
    registry = cli("registry", "--port", str(port))
    until(lambda: models(url) == ["tiny"])
    second = cli("worker", "echo", env=env)
    until(lambda: models(url) == ["echo", "tiny"])
    second.signal(signal.SIGTERM)
    assert second.wait() == 0
    assert until(lambda: models(url) == ["tiny"]) < 1.0
    worker.signal(signal.SIGKILL)
    worker.wait()
    assert until(lambda: models(url) == []) < 1.0  # by its broken connection, long before its lease is over
    ps = cli("ps", env=env)
    ps.wait()
    assert "unreachable" in ps.output
    time.sleep(4.0)  # the lease
    ps = cli("ps", env=env)
    ps.wait()
    assert ps.output.startswith("no instances are registered")
    registry.signal(signal.SIGTERM)
    assert registry.wait() == 0


def test_two_workers_with_different_cards(cli: Start, tmp_path: Path) -> None:
    import shutil

    import dynamo_workers.tiny

    folder = tmp_path / "model"
    shutil.copytree(Path(dynamo_workers.tiny.__file__).parent / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1000}))
    port = free_port()
    env = {"ETCD_ENDPOINTS": f"127.0.0.1:{port}"}
    cli("registry", "--port", str(port)).wait_for("ready")
    cli("worker", "tiny", env=env).wait_for("worker ready")
    second = cli("worker", "tiny", "--model-path", str(folder), env=env)
    refused = second.wait_for(
        r"refused, waiting without traffic: model 'tiny' is served with card (\w{16}), this worker has card (\w{16})"
    )
    assert refused[1] != refused[2]
    ps = cli("ps", env=env)
    ps.wait()
    assert "refused" in ps.output
    assert refused[1] in ps.output
    assert refused[2] in ps.output


def test_a_static_list_needs_no_registry(cli: Start, tmp_path: Path) -> None:
    port = free_port()
    cli("worker", "tiny", "--port", str(port), "--discovery-backend", "static").wait_for("worker ready")
    frontend = cli("frontend", "--http-port", "0", "--static", f"127.0.0.1:{port}")
    http = frontend.wait_for(r"ready at (http://\S+)")[1]
    until(lambda: models(http) == ["tiny"])
    ps = cli("ps", "--static", f"127.0.0.1:{port}")
    ps.wait()
    assert "tiny" in ps.output
    assert "ready" in ps.output


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (
            ["worker", "tinny"],
            "no worker 'tinny': there are 'echo', 'hello_world', 'minilm', 'openai', 'tiny', or give FILE.py or MODULE:CLASS (did you mean 'tiny'?)",
        ),
        (["worker", "nowhere.py"], "no file 'nowhere.py'"),
        (["worker", "json:loads"], "is no worker"),
        (["worker", "tiny", "--model-path", "/nowhere"], "is no folder"),
        (["worker", "tiny", "--host", "0.0.0.0"], "needs --advertise"),
        (["worker", "tiny", "--prot", "9"], "Did you mean"),
        (["worker", "tiny", "--advertise", "a:b"], "HOST:PORT"),
        (["frontend", "--static", "@/nowhere"], "no file '/nowhere'"),
        (["frontned"], "did you mean 'frontend'"),
        (["frontend", "--static", "nohost"], "HOST:PORT"),
        (["frontend", "--router-mode", "best"], "round-robin"),
        (["call", "a.b"], "three parts"),
        (["call", "a.b.c", "{"], "no JSON"),
        (["chat", "--url", "http://127.0.0.1:1"], "no frontend answers"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told(cli: Start, args: list[str], text: str) -> None:
    process = cli(*args, env={"ETCD_ENDPOINTS": "127.0.0.1:1"})
    assert process.wait() != 0
    assert text in " ".join(process.output.split())
    assert "Traceback" not in process.output


@pytest.mark.parametrize("which", ["http", "port", "registry"])
def test_a_taken_port_is_named(cli: Start, which: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        ports = {"http": free_port(), "port": free_port(), "registry": free_port(), which: number}
        process = cli(
            "up", "--http-port", str(ports["http"]), "--port", str(ports["port"]), "--registry-port", str(ports["registry"])
        )  # fmt: skip
        assert process.wait() == 1
        assert f"port {number}" in process.output
        assert "taken" in process.output
    if which == "port":
        with socket.create_server(("127.0.0.1", 0)) as taken:
            process = cli("worker", "tiny", "--port", str(taken.getsockname()[1]))
            assert process.wait() == 1
            assert "the port is taken" in process.output


def test_settings_by_environment(cli: Start) -> None:
    process = cli("worker", "tiny", env={"DYN_REQUEST_PLANE": "tcp"})
    assert process.wait() == 1
    assert "DYN_REQUEST_PLANE=tcp is not supported: requests travel by gRPC alone" in process.output
    process = cli("worker", "hello_world", env={"DYN_DISCOVERY_BACKEND": "file"})
    assert process.wait() == 1
    assert "dynamo-grpc registry" in process.output
    port = free_port()
    worker = cli(
        "worker",
        "tiny",
        env={"DYN_MODEL_NAME": "renamed", "DYN_SYSTEM_PORT": str(port), "ETCD_ENDPOINTS": "127.0.0.1:1"},
    )
    worker.wait_for("registering failed")
    assert urllib.request.urlopen(f"http://127.0.0.1:{port}/live", timeout=5).status == 200
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
    assert caught.value.code == 503
    assert json.load(caught.value)["endpoints"] == {"dynamo.backend.generate": "notready"}


def test_traces_go_from_http_into_the_worker(cli: Start) -> None:
    port, http = free_port(), free_port()
    env = {"ETCD_ENDPOINTS": f"127.0.0.1:{port}", "OTEL_TRACES_EXPORTER": "console", "OTEL_BSP_SCHEDULE_DELAY": "100"}
    cli("registry", "--port", str(port)).wait_for("ready")
    worker = cli("worker", "tiny", env=env)
    frontend = cli("frontend", "--http-port", str(http), env=env)
    frontend.wait_for("model 'tiny' is ready")
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
    body = json.dumps({**CHAT, "max_tokens": 2}).encode()
    urllib.request.urlopen(
        urllib.request.Request(f"http://127.0.0.1:{http}/v1/chat/completions", body, headers), timeout=20
    )
    worker.wait_for(rf'(?s)"name": "dynamo_grpc.v1.Inference/Generate".*"trace_id": "0x{trace_id}"')
    spans = {}
    for name in ("POST /v1/chat/completions", "dynamo_grpc.v1.Inference/Generate"):  # the request, and its attempt
        found = frontend.wait_for(
            rf'(?s)"name": "{name}".*?"trace_id": "0x{trace_id}".*?"span_id": "(0x\w+)".*?"parent_id": "(0x\w+)"'
        )
        spans[found[1]] = found[2]
    request, attempt = spans
    assert spans == {request: "0xb7ad6b7169203331", attempt: request}
    worker.wait_for(f'"parent_id": "{attempt}"')


def test_the_hello_world_worker(cli: Start) -> None:
    port = free_port()
    env = {"ETCD_ENDPOINTS": f"127.0.0.1:{port}", "HELLO_DELAY_S": "0.01"}
    cli("registry", "--port", str(port)).wait_for("ready")
    worker = cli("worker", "hello_world", env=env)
    call = cli("call", "hello_world.backend.generate", '"world,sun"', env=env)
    assert call.wait() == 0
    assert call.output == '"Hello world!"\n"Hello sun!"\n'
    wrong = cli("call", "hello_world.backend.genrate", "--wait-s", "0.5", env=env)
    assert wrong.wait() == 1
    assert "did you mean 'hello_world.backend.generate'" in " ".join(wrong.output.split())
    worker.signal(signal.SIGINT)
    assert worker.wait() == 0


def _no_ignored_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job inherits it ignored


def test_a_file_that_runs_its_worker_when_imported_is_refused(cli: Start, tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text("""
import asyncio
from dynamo_grpc import dynamo_worker

@dynamo_worker()
async def main(runtime):
    pass

asyncio.run(main())
""")
    process = cli("worker", str(tmp_path / "plain.py"))
    assert process.wait() == 1
    assert "already runs main: put the line that runs it under" in " ".join(process.output.split())


def test_errors_can_be_found_in_the_workers_log(cli: Start, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("""
from dynamo_grpc import ModelInput, Worker

class Bad(Worker):
    model_name, model_input = "bad", ModelInput.Text

    async def generate(self, request, context):
        raise {"a": RuntimeError, "b": TypeError}[request.text]("it broke")
        yield
""")
    port = free_port()
    env = {"ETCD_ENDPOINTS": f"127.0.0.1:{port}"}
    cli("registry", "--port", str(port)).wait_for("ready")
    worker = cli("worker", str(tmp_path / "bad.py"), env=env)
    url = cli("frontend", "--http-port", "0", env=env).wait_for(r"ready at (http://\S+)")[1]
    until(lambda: models(url) == ["bad"])
    for prompt, status in (("a", 500), ("b", 400)):
        with httpx.Client(base_url=url) as http:
            answer = http.post(
                "/v1/completions", json={"model": "bad", "prompt": prompt}, headers={"x-request-id": f"id-{prompt}"}
            )
        assert answer.status_code == status
        message = answer.json()["error"]["message"]
        worker.wait_for(f"request id-{prompt} .*(?s:.*)Error: it broke")
        if status == 500:
            assert message.split("error id ")[1].rstrip(")") in worker.output
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert "stopped" in worker.output


def test_chat_in_the_terminal(cli: Start) -> None:
    """Ctrl-C stops an answer and not the chat."""
    import pty
    import select
    import subprocess
    import sys

    up = Up(cli)
    up.wait_ready()
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "dynamo_grpc", "chat", "--url", up.url]
    process = subprocess.Popen(
        command,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
        preexec_fn=_no_ignored_signals,
    )
    os.close(follower)
    seen = ""

    def read_until(text: str) -> None:
        nonlocal seen
        end = time.monotonic() + 20
        while text not in seen:
            assert time.monotonic() < end, seen
            if select.select([leader], [], [], 0.1)[0]:
                seen += os.read(leader, 10000).decode(errors="replace")

    try:
        read_until("\n> ")
        seen = ""
        os.write(leader, b"Tell me about bread\n")
        read_until("\n> ")
        assert len(seen) > 100
        seen = ""
        os.write(leader, b"Tell me about the sea\n")
        read_until("sea\r\n")
        process.send_signal(signal.SIGINT)
        read_until("> ")
        assert process.poll() is None
        os.write(leader, b"\x04")
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(leader)
