"""What the tests share: tools that may be missing, a real etcd, processes that are always ended."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import hypothesis  # noqa: F401 - its plugin would import it after the tests, which CPython 3.11's ast doesn't survive
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dynamo_grpc.testing import Mesh

from .etcd import Etcd

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Unit tests open no sockets and take no time: hold them to it."""
    for item in items:
        if "/unit/" in str(item.path):
            item.add_marker(pytest.mark.timeout(20))


@pytest.fixture
def tool() -> Callable[[str], str]:
    """Path of a command that may be missing: then the test is skipped, and fails in CI."""

    def find(name: str) -> str:
        for folder in (ROOT / ".tools" / "bin", ROOT / ".tools" / "node_modules" / ".bin"):
            if (folder / name).exists():
                return str(folder / name)
        if found := shutil.which(name):
            return found
        if os.environ.get("CI"):
            pytest.fail(f"{name} is missing, and this is CI")
        pytest.skip(f"{name} is missing: run `make test-full` where npm and go are")

    return find


@pytest.fixture
async def mesh(request: pytest.FixtureRequest) -> AsyncIterator[Mesh]:
    """A mesh in this process. Tests of what travels run over both lanes: `pytestmark = both_lanes`."""
    async with Mesh(delivery=getattr(request, "param", "delivery") == "delivery") as opened:
        yield opened


both_servers = pytest.mark.parametrize("front", ["wire", "any ASGI server"], indirect=True)
both_lanes = pytest.mark.parametrize("mesh", ["delivery", "own call"], indirect=True)
#: The same for tests of seconds: over the second lane in the full tests.
both_lanes_long = pytest.mark.parametrize(
    "mesh", ["delivery", pytest.param("own call", marks=pytest.mark.full)], indirect=True
)


class Process:
    """A child whose output can be waited for."""

    def __init__(self, *args: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> None:
        full = {key: value for key, value in os.environ.items() if not key.startswith(("DYN_", "ETCD_"))}
        self._popen = subprocess.Popen(
            args,
            env={**full, "PYTHONUNBUFFERED": "1", **(env or {})},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.pid = self._popen.pid
        self.output = ""
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            with self._changed:
                self.output += line
                self._changed.notify_all()

    def wait_for(self, pattern: str, timeout_s: float = 30.0) -> re.Match[str]:
        """Wait until the output has `pattern`."""
        end = time.monotonic() + timeout_s
        with self._changed:
            while not (match := re.search(pattern, self.output)):
                left = end - time.monotonic()
                if left <= 0 or (self._popen.poll() is not None and not self._reader.is_alive()):
                    raise AssertionError(f"no {pattern!r} in the output of {self._popen.args}:\n{self.output}")
                self._changed.wait(min(left, 0.2))
        return match

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._popen.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal."""
        self._popen.send_signal(number)

    def wait(self, timeout_s: float = 20.0) -> int:
        """Wait for the end; gives the exit code."""
        code = self._popen.wait(timeout_s)
        self._reader.join(5)
        return code

    def close_at_once(self) -> None:
        """Kill it."""
        self._popen.kill()
        self._popen.wait()

    def close(self) -> None:
        """End it, whatever it does."""
        if self._popen.poll() is None:
            self._popen.terminate()
            try:
                self._popen.wait(10)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait()
        self._reader.join(5)
        if self._popen.stdout:
            self._popen.stdout.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    """Start processes; they are ended after the test."""
    processes: list[Process] = []

    def begin(*args: str, **kwargs: object) -> Process:
        processes.append(Process(*args, **kwargs))  # type: ignore[arg-type]
        return processes[-1]

    yield begin
    for process in reversed(processes):
        process.close()


@pytest.fixture
def cli(start: Callable[..., Process]) -> Callable[..., Process]:
    """Start `dynamo-grpc …`."""
    return lambda *args, **kwargs: start(sys.executable, "-m", "dynamo_grpc", *args, **kwargs)


@pytest.fixture(scope="session")
def etcd_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real etcd."""
    server = Etcd(tmp_path_factory.mktemp("etcd"))
    server.start()
    yield server.endpoints
    server.close()


async def eventually(check: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait until `check()` is true."""
    async with asyncio.timeout(timeout_s):
        while not check():
            await asyncio.sleep(0.01)


def metric(text: bytes | str, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels, from Prometheus' format; -1 if there is none."""
    text = text.decode() if isinstance(text, bytes) else text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]
    return sum(found) if found else -1.0
