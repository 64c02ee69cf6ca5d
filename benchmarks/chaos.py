"""What clients see while workers and frontends are killed, frozen, restarted, left and flooded.

The client is a socket and a regular expression, and knows each answer beforehand (`counting.py`): a token that is lost
or doubled shows, wherever it happens.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from counting import LETTERS, expected  # noqa: E402

NUM_WORKERS, NUM_STREAMS, NUM_TOKENS, STEP_S = 3, 64, 100, 0.01
#: In the flood: requests that a worker runs at once (and lets wait).
NUM_AT_ONCE = 8
_TEXT = re.compile(r'"text":"([^"]*)"')


@dataclass
class Result:
    """What was seen under one fault.

    Attributes:
        wrong: answers whose text was not the one expected, or that had no end: lost or doubled tokens.
        failed: requests that ended with an error, each with what came.
        refused: requests that were answered with 503 and Retry-After.
        left_behind: what still ran when nothing should: requests at workers and frontends.
        longest_gap_s: between two reads of one answer.
    """

    fault: str
    seed: int
    answers: int = 0
    moved: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    refused: int = 0
    left_behind: list[str] = field(default_factory=list)
    longest_gap_s: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def is_well(self) -> bool:
        """Whether nothing was lost."""
        return not (self.wrong or self.failed or self.left_behind) and self.answers > 0


class Process:
    """One of ours, started again when it is asked to."""

    def __init__(self, name: str, args: list[str], env: dict[str, str], ready: str, folder: Path) -> None:
        self.name, self._args, self._env, self._ready = name, args, env, ready
        self._log = (folder / f"{name}.log").open("ab")
        self._process: asyncio.subprocess.Process
        self.match: re.Match[str]
        self.system_port = 0

    @property
    def pid(self) -> int:
        return self._process.pid

    async def start(self) -> None:
        """Run it, and return when it is ready."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "dynamo_grpc", *self._args, env={**os.environ, **self._env},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        assert self._process.stdout is not None
        async with asyncio.timeout(60):
            while line := (await self._process.stdout.readline()).decode():
                self._log.write(line.encode())
                if port := re.search(r"system port (\d+)", line):
                    self.system_port = int(port[1])
                if match := re.search(self._ready, line):
                    self.match = match
                    self._reader = asyncio.ensure_future(self._read())
                    return
        raise SystemExit(f"{self.name} did not start: see {self._log.name}")

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            self._log.write(line)

    def send(self, number: int) -> None:
        """Send a signal."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def end(self, number: int = signal.SIGTERM) -> None:
        """End it, and return when it has ended."""
        self.send(number)
        await self._process.wait()


class Mesh:
    """A registry, workers and a frontend, each a process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.processes: list[Process] = []
        self.workers: list[Process] = []
        self.frontend: Process
        self.url = ""

    async def start(self, *frontend: str, max_concurrent: int = 0) -> None:
        """Bring all up."""
        registry = await self._add("registry", ["registry", "--port", "0"], {}, r"registry ready at (\S+)")
        env = {"ETCD_ENDPOINTS": registry.match[1], "ETCD_LEASE_TTL": "3", "COUNTING_STEP_S": str(STEP_S)}
        if max_concurrent:
            env["COUNTING_MAX_CONCURRENT"] = str(max_concurrent)
        args = ["worker", f"{HERE / 'counting.py'}:Counting", "--system-port", "0"]
        for number in range(NUM_WORKERS):
            self.workers.append(await self._add(f"worker{number}", args, env, "worker ready"))
        self.frontend = await self._add(
            "frontend", ["frontend", "--http-port", "0", *frontend], env, r"ready at (http://\S+)"
        )
        self.url = self.frontend.match[1]
        await until(lambda: len(self.health()["instances"]) == NUM_WORKERS, "all workers are routed to")

    async def _add(self, name: str, args: list[str], env: dict[str, str], ready: str) -> Process:
        process = Process(name, args, env, ready, self._folder)
        self.processes.append(process)
        await process.start()
        return process

    def health(self) -> dict[str, list[object]]:
        """What the frontend says."""
        return json.loads(fetch(f"{self.url}/health"))  # type: ignore[no-any-return]

    def metric(self, name: str) -> float:
        """The sum of a metric of the frontend."""
        found = re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)", fetch(f"{self.url}/metrics"), re.MULTILINE)
        return sum(map(float, found))

    def num_running(self) -> dict[str, int]:
        """Requests at each worker, by its own count."""
        return {
            worker.name: json.loads(fetch(f"http://127.0.0.1:{worker.system_port}/health"))["requests"]
            for worker in self.workers
        }

    async def left_behind(self, limit_s: float = 1.0) -> list[str]:
        """What still runs so long after the last client has gone."""
        end = time.monotonic() + limit_s
        while True:
            running = {name: num for name, num in self.num_running().items() if num}
            with contextlib.suppress(OSError):
                if inflight := self.metric("dynamo_frontend_inflight_requests"):
                    running["frontend"] = int(inflight)
            if not running or time.monotonic() > end:
                return [f"{name}: {num} requests" for name, num in running.items()]
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        """End all."""
        for process in reversed(self.processes):
            process.send(signal.SIGCONT)
            process.send(signal.SIGTERM)
        for process in reversed(self.processes):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(15):
                    await process.end()
            process.send(signal.SIGKILL)


def fetch(url: str) -> str:
    """A page, whatever its status."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.read().decode()  # type: ignore[no-any-return]
    except urllib.error.HTTPError as error:
        return error.read().decode()


async def until(check: Callable[[], object], what: str, limit_s: float = 30.0) -> None:
    """Wait until it is true."""
    end = time.monotonic() + limit_s
    while True:
        with contextlib.suppress(OSError):
            if check():
                return
        if time.monotonic() > end:
            raise SystemExit(f"not within {limit_s:.0f} s: {what}")
        await asyncio.sleep(0.1)


class Load:
    """Clients that ask again and again, one connection for each request.

    Args:
        leaves: the share of requests that the client leaves at a random moment.
        num_tokens: of each answer.
    """

    def __init__(self, url: str, result: Result, num_streams: int, rng: random.Random, leaves: float = 0.0) -> None:
        self._port = int(url.rpartition(":")[2])
        self._result, self._rng, self._leaves = result, rng, leaves
        self._stop = asyncio.Event()
        self._pause_s = 0.05  # or what Retry-After says
        self.times: list[tuple[float, float, bool]] = []  # start, seconds, whether it was answered
        self._tasks = [asyncio.ensure_future(self._client(number)) for number in range(num_streams)]

    async def stop(self) -> None:
        """Return when the last answers have ended."""
        self._stop.set()
        await asyncio.gather(*self._tasks)

    async def _client(self, number: int) -> None:
        await asyncio.sleep(self._rng.random())
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                async with asyncio.timeout(120):
                    is_answered = await self._ask()
            except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
                self._result.failed.append(f"{type(error).__name__}: {error}")
                is_answered = False
                await asyncio.sleep(0.1)
            self.times.append((started, time.monotonic() - started, is_answered))
            if not is_answered:
                await asyncio.sleep(self._pause_s * self._rng.uniform(0.8, 1.2))

    async def _ask(self) -> bool:
        first = self._rng.choice(LETTERS)
        body = {"model": "counting", "prompt": first, "max_tokens": NUM_TOKENS, "stream": True}
        body["stream_options"] = {"include_usage": True}
        content = json.dumps(body).encode()
        leave_after = self._rng.uniform(0, NUM_TOKENS * STEP_S) if self._rng.random() < self._leaves else None
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            head = (
                f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(content)}\r\n"
            )
            writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + content)
            pieces, last = [], time.monotonic()
            ends = last + (leave_after or 0)
            while True:
                try:
                    async with asyncio.timeout(max(0.0, ends - time.monotonic()) if leave_after is not None else None):
                        piece = await reader.read(65536)
                except TimeoutError:
                    return True  # the client leaves
                now = time.monotonic()
                if pieces:
                    self._result.longest_gap_s = max(self._result.longest_gap_s, now - last)
                last = now
                if not piece:
                    break
                pieces.append(piece)
            return self._judge(first, b"".join(pieces).decode())
        finally:
            writer.close()

    def _judge(self, first: str, answer: str) -> bool:
        result = self._result
        status = re.match(r"HTTP/1.1 (\d+)", answer)
        if status is None:
            result.failed.append(f"no answer: {answer[:100]!r}")
            return False
        wait_s = re.search(r"^retry-after: (\d+)\r$", answer, re.MULTILINE)
        if status[1] == "503" and wait_s is not None and "is full" in answer:
            result.refused += 1
            self._pause_s = float(wait_s[1])
            return False
        if status[1] != "200" or '"error"' in answer:
            result.failed.append(answer[-600:])
            return False
        text, wanted = "".join(_TEXT.findall(answer)), expected(first, NUM_TOKENS)
        usage = re.search(r'"completion_tokens":(\d+)', answer)
        is_whole = "data: [DONE]" in answer and usage is not None and int(usage[1]) == NUM_TOKENS
        if text != wanted or not is_whole:
            result.wrong.append(f"after {first!r}: {text!r}, whole: {is_whole}")
            return False
        result.answers += 1
        result.moved += '"num_migrations"' in answer
        return True


Fault = Callable[[Mesh, Result, random.Random, float], Awaitable[None]]


async def kill(mesh: Mesh, result: Result, rng: random.Random, seconds: float) -> None:
    """Kill -9 of a worker every second, restarted."""
    load = Load(mesh.url, result, NUM_STREAMS, rng)
    await asyncio.sleep(1.5)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        worker = rng.choice(mesh.workers)
        started = time.monotonic()
        await worker.end(signal.SIGKILL)
        await worker.start()
        await asyncio.sleep(max(0.0, 1.0 - (time.monotonic() - started)))
    await load.stop()


async def rolling(mesh: Mesh, result: Result, rng: random.Random, seconds: float) -> None:
    """Rolling restart of all workers by SIGTERM, three rounds."""
    load = Load(mesh.url, result, NUM_STREAMS, rng)
    await asyncio.sleep(1.5)
    for _ in range(3):
        for worker in mesh.workers:
            await worker.end(signal.SIGTERM)
            await worker.start()
    await load.stop()


async def freeze(mesh: Mesh, result: Result, rng: random.Random, seconds: float) -> None:
    """SIGSTOP of a worker for 20 s."""
    load = Load(mesh.url, result, NUM_STREAMS, rng)
    await asyncio.sleep(1.5)
    worker = rng.choice(mesh.workers)
    worker.send(signal.SIGSTOP)
    await asyncio.sleep(20)
    worker.send(signal.SIGCONT)
    await asyncio.sleep(2)
    await load.stop()


async def frontend(mesh: Mesh, result: Result, rng: random.Random, seconds: float) -> None:
    """SIGTERM of one of two frontends behind one port, in turn, restarted."""
    load = Load(mesh.url, result, NUM_STREAMS, rng)
    await asyncio.sleep(1.5)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        tasks = Path(f"/proc/{mesh.frontend.pid}/task").iterdir()
        children = [pid for task in tasks for pid in (task / "children").read_text().split()]
        if len(children) == 2:  # the last one is back
            os.kill(int(rng.choice(sorted(children))), signal.SIGTERM)
        await asyncio.sleep(4.0)
    await load.stop()


async def leave(mesh: Mesh, result: Result, rng: random.Random, seconds: float) -> None:
    """Half of the clients leave at random moments."""
    load = Load(mesh.url, result, NUM_STREAMS, rng, leaves=0.5)
    await asyncio.sleep(seconds)
    await load.stop()


async def gone(mesh: Mesh, result: Result, rng: random.Random, seconds: float) -> None:
    """Kill -9 of the frontend: its handlers end within a second."""
    load = Load(mesh.url, result, NUM_STREAMS, rng)
    await until(lambda: sum(mesh.num_running().values()) >= NUM_STREAMS // 2, "requests run")
    await mesh.frontend.end(signal.SIGKILL)
    result.left_behind = await mesh.left_behind()
    result.failed, result.wrong = [], []  # they were all that frontend's
    result.answers += 1
    load._stop.set()
    for task in load._tasks:
        task.cancel()
    await asyncio.gather(*load._tasks, return_exceptions=True)
    await mesh.frontend.start()


async def flood(mesh: Mesh, result: Result, rng: random.Random, seconds: float) -> None:
    """Five times as many clients as there is room for, who come back when they are told."""
    room = NUM_WORKERS * NUM_AT_ONCE
    fitting = Load(mesh.url, result, room, rng)
    await asyncio.sleep(max(4.0, seconds / 3))
    await fitting.stop()
    result.figures["capacity_per_s"] = capacity = _rate(fitting.times, 1.5)
    refused_before = result.refused
    load = Load(mesh.url, result, 5 * room, rng)
    await asyncio.sleep(seconds)
    await load.stop()
    refused = sorted(took for _, took, is_answered in load.times if not is_answered)
    result.figures["accepted_share_of_capacity"] = _rate(load.times, 1.5) / capacity
    result.figures["refused_p50_ms"] = statistics.median(refused) * 1e3 if refused else 0.0
    result.figures["refused_p99_ms"] = refused[int(len(refused) * 0.99)] * 1e3 if refused else 0.0
    result.figures["refused"] = result.refused - refused_before
    after = Load(mesh.url, result, room // 2, rng)
    await asyncio.sleep(2.0)
    refused_before = result.refused
    await asyncio.sleep(2.0)
    await after.stop()
    result.figures["refused_2_s_after"] = result.refused - refused_before


def _rate(times: list[tuple[float, float, bool]], skip_s: float) -> float:
    """Answers for each second, without the beginning and the end."""
    begin, end = min(t[0] for t in times) + skip_s, max(t[0] for t in times)
    return sum(is_answered and begin < at + took < end for at, took, is_answered in times) / (end - begin)


FAULTS: dict[str, tuple[Fault, list[str]]] = {
    "kill": (kill, []),
    "rolling": (rolling, []),
    "freeze": (freeze, []),
    "frontend": (frontend, ["--processes", "2"]),
    "leave": (leave, []),
    "gone": (gone, []),
    "flood": (flood, []),
}


async def run(name: str, seconds: float, seed: int, folder: Path) -> Result:
    """One fault, with a mesh of its own."""
    fault, args = FAULTS[name]
    result, rng = Result(name, seed), random.Random(f"{seed} {name}")
    async with opened(folder / name) as mesh:
        await mesh.start(*args, max_concurrent=NUM_AT_ONCE if name == "flood" else 0)
        await fault(mesh, result, rng, seconds)
        if not result.left_behind:
            result.left_behind = await mesh.left_behind(10.0 if name == "freeze" else 1.0)
    return result


@contextlib.asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[Mesh]:
    """A mesh that is ended, whatever happens."""
    folder.mkdir(parents=True)
    mesh = Mesh(folder)
    try:
        yield mesh
    finally:
        await mesh.close()


def main() -> None:
    """Run the faults, and say what was seen; the exit code is 1 when anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", default=list(FAULTS), metavar="FAULT", help=", ".join(FAULTS))
    parser.add_argument("--seconds", type=float, default=60.0, help="how long a fault goes on (default 60)")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--json", type=Path, help="write all there")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dynamo-grpc-chaos-"))
    print(f"seed {options.seed}, logs in {folder}", flush=True)
    results = []
    print("| fault | answers | went on elsewhere | wrong | failed | left behind | longest gap, s | figures |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.faults:
        result = asyncio.run(run(name, options.seconds, options.seed, folder))
        results.append(result)
        figures = ", ".join(f"{key} {value:.3g}" for key, value in result.figures.items())
        print(
            f"| {FAULTS[name][0].__doc__} | {result.answers} | {result.moved} | {len(result.wrong)} | "
            f"{len(result.failed)} | {len(result.left_behind)} | {result.longest_gap_s:.2f} | {figures} |",
            flush=True,
        )
        for text, count in collections.Counter(result.wrong + result.failed + result.left_behind).most_common(5):
            print(f"    {count} ×: {text}", flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results]))
    raise SystemExit(not all(result.is_well for result in results))


if __name__ == "__main__":
    main()
