"""Clients and workers in other languages, built from the protos and run as their own READMEs say."""

from __future__ import annotations

import asyncio
import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import openai
import pytest

from dynamo_grpc.v1 import inference_pb2, inference_pb2_grpc

from ..conftest import ROOT, Process
from ..etcd import free_port
from .test_up import until

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
Start = Callable[..., Process]
Tool = Callable[[str], str]

#: Stubs for those that have no generator of their own.
BUF = ["buf", "generate", "../../../protos", "--path", "../../../protos/dynamo_grpc/v1"]
BUF_WITH_DETAILS = [*BUF, "--path", "../../../protos/google/rpc"]
NPM = ["npm", "ci", "--no-audit", "--no-fund"]
CLIENTS, WORKERS = ROOT / "examples" / "clients", ROOT / "examples" / "workers"
WIRE = ROOT / "tests" / "wire"
MODEL = ROOT / "workers" / "dynamo_workers" / "tiny" / "model"
#: What a language needs, and how its client is built and run, in its folder.
LANGUAGES: dict[str, tuple[list[str], list[list[str]], list[str]]] = {
    "go": (["go", "buf"], [BUF, ["go", "build", "-o", "client", "."]], ["./client"]),
    "node": (["npm", "node", "buf"], [NPM, BUF_WITH_DETAILS, ["npm", "run", "-s", "build"]], ["node", "dist/client.js"]),
    "java": (["mvn", "javac"], [["mvn", "-q", "-B", "package"]], ["java", "-jar", "target/client.jar"]),
    "rust": (["cargo"], [["cargo", "build", "-q", "--release", "--locked"]], ["target/release/client"]),
    "cpp": (
        ["cmake", "g++", "grpc_cpp_plugin"],
        [["cmake", "-S", ".", "-B", "build"], ["cmake", "--build", "build", "--parallel", "2"]],
        ["build/client"],
    ),
}  # fmt: skip


def build(tool: Tool, folder: Path, needed: list[str], commands: list[list[str]]) -> None:
    for name in needed:
        tool(name)
    _build(folder, tuple(tuple(command) for command in commands))


@functools.cache
def _build(folder: Path, commands: tuple[tuple[str, ...], ...]) -> None:
    path = f"{ROOT}/.tools/node_modules/.bin:{os.environ['PATH']}"
    for command in commands:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=500, env={**os.environ, "PATH": path}
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def say(command: list[str], folder: Path, *args: str) -> tuple[int, str]:
    done = subprocess.run([*command, *args], cwd=folder, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def python_says(*args: str) -> tuple[int, str]:
    return say([sys.executable, "client.py"], CLIENTS / "python", *args)


@pytest.fixture
def mesh(cli: Start) -> tuple[str, str]:
    """The addresses of a frontend's gRPC port, and of a worker."""
    env = {"DYN_DISCOVERY_BACKEND": "static"}
    worker = cli("worker", "tiny", env=env).wait_for(r"worker ready at (\S+)")[1]
    front = cli("frontend", "--http-port", "0", "--grpc-port", "0", "--static", worker)
    port = front.wait_for(r"gRPC at (\S+);")[1]
    front.wait_for("model 'tiny' is ready")
    return port, worker


def test_the_client_in_python(mesh: tuple[str, str]) -> None:
    """What the others are held to."""
    for address in mesh:
        code, said = python_says(address)
        assert code == 0
        lines = said.splitlines()
        assert lines[0] == "models: tiny"
        assert re.fullmatch(r"tokens:( \d+){8}", lines[1])
        assert lines[2] == "finished: FINISH_REASON_LENGTH, 3 prompt tokens, 8 generated"
        assert lines[3] == "cancelled after 3 outputs: CANCELLED"
        assert lines[4] == "deadline: DEADLINE_EXCEEDED"
        assert lines[5].startswith("error: NOT_FOUND MODEL_NOT_FOUND, field model: ")
    assert "text:  covers" in python_says(mesh[0], "The sea")[1]
    assert python_says(mesh[1], "The sea")[0] == 1


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_client(tool: Tool, mesh: tuple[str, str], cli: Start, tmp_path: Path, language: str) -> None:
    needed, commands, run = LANGUAGES[language]
    folder = CLIENTS / language
    build(tool, folder, needed, commands)
    for args in ((mesh[0],), (mesh[1],), (mesh[0], "The sea"), (mesh[1], "The sea")):
        assert say(run, folder, *args) == python_says(*args)
    (tmp_path / "full.py").write_text(FULL)
    env = {"DYN_DISCOVERY_BACKEND": "static"}
    full = cli("worker", str(tmp_path / "full.py"), env=env).wait_for(r"worker ready at (\S+)")[1]
    code, said = say(run, folder, full)
    assert (code, said.splitlines()[1]) == (1, "error: RESOURCE_EXHAUSTED OVERLOADED, again after 7.0 s: come later")


FULL = f"""
from dynamo_grpc import OverloadedError, Worker

class Full(Worker):
    model_path = {str(MODEL)!r}

    async def generate(self, request, context):
        raise OverloadedError("come later", retry_after_s=7.0)
        yield
"""


LIMITED = f"""
import asyncio
from dynamo_grpc import Worker

class Limited(Worker):
    model_path = {str(MODEL)!r}
    max_concurrent = 20

    async def generate(self, request, context):
        for _ in range(request.stop_conditions.max_tokens):
            yield 300
            await asyncio.sleep(0.002)
"""


def test_grpcs_own_balancer_follows_the_load(tool: Tool, cli: Start, tmp_path: Path) -> None:
    """Go's weighted_round_robin reads the trailers of workers in Python."""
    needed, _, _ = LANGUAGES["go"]
    build(tool, CLIENTS / "go", needed, [BUF, ["go", "build", "-o", "balanced/balanced", "./balanced"]])
    (tmp_path / "limited.py").write_text(LIMITED)
    env = {"DYN_DISCOVERY_BACKEND": "static"}
    workers = [cli("worker", str(tmp_path / "limited.py"), env=env) for _ in range(2)]
    addresses = [worker.wait_for(r"worker ready at (\S+)")[1] for worker in workers]

    def spread() -> dict[str, int]:
        code, said = say(["balanced/balanced"], CLIENTS / "go", ",".join(addresses), "2000")
        assert code == 0, said
        return {address: int(num) for address, num in (line.split() for line in said.splitlines())}

    with grpc.insecure_channel(addresses[0]) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        stop = inference_pb2.StopConditions(max_tokens=8_000, ignore_eos=True)
        request = inference_pb2.PreprocessedRequest(token_ids=[5], stop_conditions=stop)
        calls = [stub.Generate(request) for _ in range(14)]
        for call in calls:
            next(iter(call))
        counts = spread()
        for call in calls:
            call.cancel()
    assert counts[addresses[1]] > 2 * counts[addresses[0]], counts
    assert counts[addresses[0]] > 0


def test_what_was_sent_is_read_in_every_language(tool: Tool) -> None:
    """The golden wire files; Python's turn is in the unit tests."""
    for language in ("go", "node", "java", "rust"):
        build(tool, CLIENTS / language, *LANGUAGES[language][:2])
    run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=500)
    wire = [*("java", "-cp", "target/client.jar"), str(Path(__file__).parent / "clients" / "Wire.java"), str(WIRE)]
    for language, command in (
        ("go", ["go", "test", "."]),
        ("node", ["node", "--test", "test/"]),
        ("java", wire),
        ("rust", ["cargo", "test", "-q", "--release", "--locked"]),
    ):
        done = run(command, cwd=CLIENTS / language)
        assert done.returncode == 0, f"{language}\n{done.stdout}{done.stderr}"


# -- workers -----------------------------------------------------------------------------------------------------------

WORKER_COMMANDS = {
    "go": (
        ["go", "buf"],
        [BUF, ["go", "build", "-o", "worker", "."]],
        ["./worker", "-card", "{card}", "-files", "{files}", "-address", "{address}", "-max-concurrent", "64"],
    ),
    "node": (
        ["npm", "node", "buf"],
        [NPM, BUF_WITH_DETAILS, ["npm", "run", "-s", "build"]],
        ["node", "dist/worker.js", "--card", "{card}", "--files", "{files}", "--address", "{address}"],
    ),
}
PYTHON = """
import asyncio
from dynamo_workers.echo import Echo

class SlowEcho(Echo):
    async def generate(self, request, context):
        async for token in super().generate(request, context):
            yield token
            await asyncio.sleep(0.005)
"""


class Fleet:
    """Workers in several languages that serve one model, and a registry."""

    def __init__(self, tool: Tool, start: Start, cli: Start, folder: Path) -> None:
        self._tool, self._start, self._cli, self._folder = tool, start, cli, folder
        self.port = free_port()
        self.registry = cli("registry", "--port", str(self.port))
        self.registry.wait_for("ready")
        self.env = {"ETCD_ENDPOINTS": f"127.0.0.1:{self.port}"}
        self.card = folder / "card.json"
        made = subprocess.run(
            [sys.executable, "-m", "dynamo_grpc", "card", str(MODEL), "--name", "echo"], capture_output=True, text=True
        )
        self.card.write_text(made.stdout)

    def worker(self, language: str) -> tuple[Process, str]:
        """Start one; gives its address, too."""
        if language == "python":
            (self._folder / "slow.py").write_text(PYTHON)
            options = ["--model-path", str(MODEL), "--model-name", "echo"]
            process = self._cli("worker", f"{self._folder}/slow.py:SlowEcho", *options, env=self.env)
        else:
            needed, commands, run = WORKER_COMMANDS[language]
            folder = WORKERS / language
            build(self._tool, folder, needed, commands)
            address = f"127.0.0.1:{free_port()}"
            args = [part.format(card=self.card, files=MODEL, address=address) for part in run]
            process = self._start(*args, cwd=folder, env=self.env)
        return process, process.wait_for(r"worker ready at (\S+)")[1]

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        """A command of ours."""
        full = [sys.executable, "-m", "dynamo_grpc", *args]
        return subprocess.run(full, capture_output=True, text=True, timeout=120, env={**os.environ, **self.env})


@pytest.fixture
def fleet(tool: Tool, start: Start, cli: Start, tmp_path: Path) -> Fleet:
    return Fleet(tool, start, cli, tmp_path)


OURS = {
    "tiny": ["-m", "dynamo_grpc", "worker", "tiny"],
    "echo": ["-m", "dynamo_grpc", "worker", "echo"],
    "shout": ["examples/worker/shout.py"],
    "plain endpoint": ["examples/plain_endpoint/backend.py"],
    "plain servicer": ["examples/plain_servicer/server.py"],
}


@pytest.mark.parametrize("name", OURS)
def test_a_worker_that_we_ship_keeps_the_contract(fleet: Fleet, start: Start, name: str) -> None:
    process = start(sys.executable, *OURS[name], cwd=ROOT, env=fleet.env)
    until(lambda: " ready " in fleet.run("ps").stdout)
    address = re.search(r"\S+:\d+", fleet.run("ps").stdout)
    assert address is not None
    judged = fleet.run("conformance", address[0], "--pid", str(process.pid))
    assert judged.returncode == 0, judged.stdout
    assert process.wait() == 0


@pytest.mark.parametrize("language", [*WORKER_COMMANDS, "python"])
def test_a_worker_keeps_the_contract(fleet: Fleet, language: str) -> None:
    process, address = fleet.worker(language)
    assert address in fleet.run("ps").stdout
    judged = fleet.run("conformance", address, "--pid", str(process.pid))
    assert judged.returncode == 0, judged.stdout
    assert process.wait() == 0
    assert address not in fleet.run("ps").stdout
    process, address = fleet.worker(language)
    judged = fleet.run("conformance", address, "--rule", "drain", "--drain")
    assert "1 passed" in judged.stdout, judged.stdout
    assert process.wait() == 0


@pytest.mark.parametrize("language", WORKER_COMMANDS)
def test_the_guide_in_an_empty_folder(tool: Tool, start: Start, tmp_path: Path, language: str) -> None:
    """docs/workers-in-any-language.md by the letter; but for the ports, which others may use here."""
    for name in WORKER_COMMANDS[language][0]:
        tool(name)
    page = (ROOT / "docs" / "workers-in-any-language.md").read_text()
    make, use = re.findall(rf"```sh {language}\n(.*?)```", page, re.DOTALL)
    registry, port = free_port(), free_port()
    bins = f"{Path(sys.executable).parent}:{ROOT}/.tools/node_modules/.bin"
    env = {"CLONE": str(ROOT), "MODEL": str(MODEL), "PATH": f"{bins}:{os.environ['PATH']}"}
    env["ETCD_ENDPOINTS"] = f"127.0.0.1:{registry}"
    leave_out = ("node_modules", "dist", "gen", "worker")  # what other tests have built there

    def run(command: str) -> str:
        full = {**os.environ, **env}
        done = subprocess.run(
            ["bash", "-ec", command], cwd=tmp_path, env=full, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    copy, _, rest = make.partition("\n")
    run(copy)
    for name in leave_out:
        run(f"rm -rf {name} src/{name}")
    run(rest)
    use = use.replace("dynamo-grpc registry", f"dynamo-grpc registry --port {registry}").replace(":9000", f":{port}")
    said = []
    for line in use.splitlines():
        if line.endswith(" &"):
            start("bash", "-c", f"exec {line[:-2]}", cwd=tmp_path, env=env).wait_for("ready at")
        else:
            said.append(run(line))
    assert f"127.0.0.1:{port}" in said[0]
    assert re.search(r"model echo at .*: \d+ passed, 0 failed", said[1])


def test_they_come_back_after_the_registry_lost_its_data(fleet: Fleet, cli: Start) -> None:
    addresses = [fleet.worker(language)[1] for language in ("go", "node")]
    fleet.registry.close_at_once()
    cli("registry", "--port", str(fleet.port)).wait_for("ready")

    def is_back(address: str) -> bool:
        return re.search(rf"{address}\s+echo\s+ready\s+2\s", fleet.run("ps").stdout) is not None

    async def both() -> None:
        async with asyncio.timeout(40):
            while not all(is_back(address) for address in addresses):
                await asyncio.sleep(0.5)

    asyncio.run(both())


@pytest.mark.parametrize("language", WORKER_COMMANDS)
def test_one_that_is_killed_loses_nothing(fleet: Fleet, cli: Start, language: str) -> None:
    """Its answers go on at the Python worker beside it."""
    killed, _ = fleet.worker(language)
    fleet.worker("python")
    front = cli("frontend", "--http-port", "0", "--grpc-port", "off", env=fleet.env)
    url = front.wait_for(r"ready at (http://\S+)")[1]
    front.wait_for("model 'echo' is ready")
    prompt = "the sea is wide and " * 40

    async def ask(client: openai.AsyncOpenAI, begun: asyncio.Event) -> str:
        text = ""
        stream = await client.completions.create(model="echo", prompt=prompt, max_tokens=400, stream=True)
        async for chunk in stream:
            text += chunk.choices[0].text
            begun.set()
        return text

    async def load() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            begun = [asyncio.Event() for _ in range(40)]
            tasks = [asyncio.ensure_future(ask(client, event)) for event in begun]
            await asyncio.gather(*(event.wait() for event in begun))
            killed.close_at_once()
            return await asyncio.gather(*tasks)

    answers = asyncio.run(asyncio.wait_for(load(), 60))
    assert set(answers) == {prompt}
    until(lambda: front.output.count("status=200") == 40)
    assert front.output.count("migrations=1") == 20
