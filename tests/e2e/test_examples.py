"""The examples, as a user runs them: real processes, the embedded registry."""

import json
import signal
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dynamo_workers.tiny
import pytest
from tokenizers import Tokenizer

from ..conftest import ROOT, Process
from ..etcd import free_port
from .test_up import until

MODEL = str(Path(dynamo_workers.tiny.__file__).parent / "model")

Start = Callable[..., Process]


@pytest.fixture
def env(cli: Start) -> dict[str, str]:
    port = free_port()
    cli("registry", "--port", str(port)).wait_for("registry ready")
    return {"ETCD_ENDPOINTS": f"127.0.0.1:{port}", "HELLO_DELAY_S": "0.05"}


@pytest.fixture
def example(start: Start, env: dict[str, str]) -> Start:
    return lambda path, *args: start(sys.executable, str(ROOT / "examples" / path), *args, env=env)


def ask(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/{path}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=20) as answer:
        choice: dict[str, Any] = json.load(answer)["choices"][0]
    return choice


def chat(port: int, model: str, text: str) -> str:
    body = {"model": model, "max_tokens": 20, "messages": [{"role": "user", "content": text}]}
    return str(ask(port, "chat/completions", body)["message"]["content"])


def test_hello_world_survives_a_restart_of_its_server(example: Start) -> None:
    client = example("hello_world/client.py")
    server = example("hello_world/server.py")
    client.wait_for("Hello star!")
    server.signal(signal.SIGKILL)
    server.wait()
    client.wait_for("trying again in")
    seen = len(client.output)
    example("hello_world/server.py")
    client.wait_for(rf"(?s)\A.{{{seen}}}.*Hello star!")
    client.signal(signal.SIGTERM)
    assert client.wait() == 0


@pytest.mark.parametrize("way", ["direct", "through the proxy"])
@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_stop_reaches_the_server(example: Start, way: str, end: str) -> None:
    server = example("cancellation/server.py")
    if way != "direct":
        example("cancellation/middle_server.py").wait_for("serving")
    arguments = [*(["--middle"] if way != "direct" else []), *(["--kill"] if end == "kill" else [])]
    client = example("cancellation/client.py", *arguments)
    assert client.wait() == 0, client.output
    assert client.output == "got 0\ngot 1\ngot 2\nstopped\n"
    if end == "stop":
        assert int(server.wait_for(r"stopped at (\d+)")[1]) <= 5
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert "sending 6" not in server.output


def test_a_worker_subclass(example: Start, cli: Start, env: dict[str, str]) -> None:
    worker = example("worker/shout.py")
    worker.wait_for(r"worker ready at .*model shout")
    frontend = cli("frontend", "--http-port", "0", env=env)
    port = int(frontend.wait_for(r"ready at http://127\.0\.0\.1:(\d+)")[1])
    frontend.wait_for("model 'shout' is ready")
    assert chat(port, "shout", "tell me more") == "TELL ME MORE "
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    other = cli("worker", str(ROOT / "examples" / "worker" / "shout.py"), "--model-name", "louder", env=env)
    other.wait_for("model louder")


def test_plain_functions_and_a_plain_servicer(example: Start, cli: Start, env: dict[str, str]) -> None:
    backend = example("plain_endpoint/backend.py")
    servicer = example("plain_servicer/server.py")
    frontend = cli("frontend", "--http-port", "0", env=env)
    port = int(frontend.wait_for(r"ready at http://127\.0\.0\.1:(\d+)")[1])
    frontend.wait_for("model 'backwards' is ready")
    frontend.wait_for("model 'countdown' is ready")
    tokenizer = Tokenizer.from_file(f"{MODEL}/tokenizer.json")
    expected = tokenizer.decode(tokenizer.encode("one two three").ids[::-1])
    assert ask(port, "completions", {"model": "backwards", "prompt": "one two three"})["text"] == expected
    assert "three two" in chat(port, "backwards", "one two three")
    assert chat(port, "countdown", "hello sea").startswith("hello sea")
    rows = cli("ps", "--json", env=env)
    assert rows.wait() == 0
    states = {row["model"]: row["state"] for row in map(json.loads, rows.output.splitlines())}
    assert states == {"backwards": "ready", "countdown": "ready"}
    for process in (backend, servicer):
        process.signal(signal.SIGTERM)
        assert process.wait() == 0, process.output


def test_the_figures_of_a_custom_back_end(cli: Start, example: Start, start: Start, env: dict[str, str]) -> None:
    def shown(frontend: Process, *more: str) -> bool:
        url = frontend.wait_for(r"ready at (http://\S+)")[1]
        with urllib.request.urlopen(f"{url}/metrics", timeout=20) as answer:
            text = answer.read().decode()
        figures = ("kv_cache_usage_perc", "gpu_utilization_perc", "active_requests", "backend_requests_total")
        return all(f"dynamo_component_{name}{{" in text for name in figures)

    polled = ("--http-port", "0", "--custom-backend-metrics-polling-interval", "0.2")
    example("nim/backend.py")
    by_registry = cli("frontend", *polled, env=env)
    until(lambda: shown(by_registry))
    port = free_port()
    backend = str(ROOT / "examples" / "nim" / "backend.py")
    start(sys.executable, backend, "--port", str(port), env={"DYN_DISCOVERY_BACKEND": "static"})
    static = cli("frontend", *polled, "--static", f"127.0.0.1:{port}")
    until(lambda: shown(static))


def test_tools(example: Start, start: Start, cli: Start, env: dict[str, str]) -> None:
    port = free_port()
    example("tools/worker.py").wait_for("worker ready")
    cli("frontend", "--http-port", str(port), env=env).wait_for("weather")
    client = start(
        sys.executable, str(ROOT / "examples" / "tools" / "client.py"), f"http://127.0.0.1:{port}/v1", "weather"
    )
    assert client.wait() == 0
    page = (ROOT / "docs" / "tools.md").read_text()
    assert client.output.strip().splitlines()[-2:] == page.partition("weather\n")[2].partition("\n```")[0].splitlines()


def test_pictures(example: Start, cli: Start, env: dict[str, str]) -> None:
    port = free_port()
    example("pictures/worker.py").wait_for("worker ready")
    cli("frontend", "--http-port", str(port), env=env).wait_for("pictures")
    url = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    answer = ask(port, "chat/completions", {"model": "pictures", "messages": messages})
    assert answer["message"]["content"] == "GIF, 1 x 1\n"
