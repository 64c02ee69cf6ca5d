"""The systems that are measured, as processes: ours, and the peers from PyPI."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("BENCH_CACHE", Path.home() / ".cache" / "dynamo-grpc-bench"))
PACKAGES = {
    "dynamo": [
        "--no-deps ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1",
        "aiohttp certifi msgspec prometheus-client pyzmq redis tqdm transformers zstandard pydantic<=2.13.5 uvloop",
    ],
    "smg": ["smg==1.13.0 smg-grpc-proto==0.4.28 grpcio grpcio-reflection grpcio-health-checking uvloop"],
}
_TICKS = os.sysconf("SC_CLK_TCK")


def model_folder() -> Path:
    """The model folder that all systems serve; made on first use."""
    folder = CACHE / "model"
    if not (folder / "config.json").exists():
        subprocess.run([sys.executable, HERE / "make_model.py", folder], check=True)
    return folder


def install(peer: str) -> Path:
    """A peer in a virtual environment of its own; gives its bin folder."""
    folder = CACHE / peer
    if not (folder / "ready").exists():
        print(f"installing {peer} …", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        for group in PACKAGES[peer]:
            subprocess.run([folder / "bin" / "pip", "install", "-q", *group.split()], check=True)
        (folder / "ready").touch()
    return folder / "bin"


def _family(pid: int) -> list[Path]:
    """A process and its living descendants, as /proc folders."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return [Path(f"/proc/{member}") for member in family]


def cpu_s(pid: int) -> float:
    """CPU seconds, user and system, of a process with its children."""
    total = 0
    for folder in _family(pid):
        fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS


def rss_bytes(pid: int) -> int:
    """Resident memory of a process with its children."""
    pages = sum(int((folder / "statm").read_text().split()[1]) for folder in _family(pid))
    return pages * os.sysconf("SC_PAGE_SIZE")


class System:
    """Processes that serve the model `bench` over HTTP.

    Attributes:
        address: HOST:PORT.
        pids: frontend first, then its worker.
        lines: what the worker printed.
    """

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        self.address = ""
        self.pids: list[int] = []
        self.lines: list[str] = []

    def _start(self, args: list[str | Path], env: Mapping[str, str], log: str) -> subprocess.Popen[str]:
        CACHE.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(
            [str(arg) for arg in args],
            env={**os.environ, **env, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=(CACHE / f"{log}.log").open("w"),
            text=True,
        )
        self._processes.append(process)
        return process

    def stop(self) -> None:
        """End all processes."""
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()

    def wait_ready(self, limit_s: float = 120.0) -> None:
        """Return when an answer has come to its end."""
        body = {"model": "bench", "stream": True, "max_tokens": 2, "messages": [{"role": "user", "content": "hello"}]}
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            connection = http.client.HTTPConnection(self.address, timeout=10)
            try:
                connection.request(
                    "POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"}
                )
                if b"[DONE]" in connection.getresponse().read():
                    return
            except (OSError, http.client.HTTPException):
                pass
            finally:
                connection.close()
            time.sleep(0.5)
        raise SystemExit(f"{type(self).__name__} gave no answer within {limit_s:.0f} s: see {CACHE}/*.log")


class Ours(System):
    """Registry, worker and frontend of this project.

    Args:
        profile: folder for profiles of frontend and worker, if they are to be made.
        beside: another worker, by its name or file.
    """

    def __init__(
        self,
        delay_s: float,
        worker: str = "Pacer",
        *,
        processes: int = 1,
        profile: Path | None = None,
        beside: str | Path = "",
    ) -> None:
        super().__init__()
        self._profile = profile
        env = {"BENCH_DELAY_S": str(delay_s), "BENCH_MODEL": str(model_folder())}
        env["ETCD_ENDPOINTS"], _ = self._command("registry", "--port", "0", ready=r"ready at (\S+)", env=env)
        _, worker_pid = self._command("worker", f"{HERE / 'worker.py'}:{worker}", ready="worker ready", env=env)
        if beside:
            self._command("worker", str(beside), ready="worker ready", env=env)
        more = ["--processes", str(processes)] if processes > 1 else []
        self.address, frontend_pid = self._command(
            "frontend", "--http-port", "0", *more, ready=r"ready at http://(\S+)", env=env
        )
        self.pids = [frontend_pid, worker_pid]
        self.wait_ready()

    def _command(self, *args: str, ready: str, env: Mapping[str, str]) -> tuple[str, int]:
        command: list[str | Path] = [sys.executable, "-m", "dynamo_grpc", *args, "--log-level", "error"]
        if self._profile is not None and args[0] != "registry":
            self._profile.mkdir(parents=True, exist_ok=True)
            command[1:3] = [HERE / "profiled.py", self._profile / args[0]]
        process = self._start(command, env, f"ours-{args[0]}")
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.search(ready, line):
                threading.Thread(target=self._keep, args=(process,), daemon=True).start()
                return (match[1] if match.groups() else ""), process.pid
        raise SystemExit(f"{' '.join(args)} did not start: see {CACHE}/ours-{args[0]}.log")

    def _keep(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.lines.append(line)


class Dynamo(System):
    """ai-dynamo 1.6.1: Rust frontend, Python worker; discovery by files, requests by TCP."""

    def __init__(self, delay_s: float) -> None:
        super().__init__()
        python = install("dynamo") / "python"
        env = {
            "TOK_DELAY": str(delay_s),
            "MODEL_DIR": str(model_folder()),
            "DYN_DISCOVERY_BACKEND": "file",
            "DYN_FILE_KV": tempfile.mkdtemp(),
            "DYN_REQUEST_PLANE": "tcp",
            "DYN_EVENT_PLANE": "zmq",
            "DYN_LOG": "error",
        }
        frontend = self._start([python, "-m", "dynamo.frontend", "--http-port", "8101"], env, "dynamo-frontend")
        worker = self._start([python, HERE / "peers" / "dynamo_worker.py"], env, "dynamo-worker")
        self.address, self.pids = "127.0.0.1:8101", [frontend.pid, worker.pid]
        self.wait_ready()


class Smg(System):
    """SMG 1.13.0: Rust gateway, Python gRPC worker."""

    def __init__(self, delay_s: float) -> None:
        super().__init__()
        folder = install("smg")
        env = {"TOK_DELAY": str(delay_s), "MODEL_DIR": str(model_folder())}
        worker = self._start([folder / "python", HERE / "peers" / "smg_worker.py"], env, "smg-worker")
        time.sleep(3)
        launch = "launch --host 127.0.0.1 --port 8103 --worker-urls grpc://127.0.0.1:7011 --policy round_robin"
        command = [folder / "smg", *launch.split(), "--log-level", "error", "--model-path", model_folder()]
        gateway = self._start(command, env, "smg-gateway")
        self.address, self.pids = "127.0.0.1:8103", [gateway.pid, worker.pid]
        self.wait_ready()
