"""Measure the path from HTTP to worker and back: `make bench`.

One frontend and one worker process, streamed chats over raw sockets. Prints tokens per second, CPU microseconds for
each token in both processes, and the time to the first token. The machine's speed drifts: compare lines of one run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


class Mesh:
    """Registry, frontend and worker as processes."""

    def __init__(self, delay_s: float) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        registry = self._start("registry", "--port", "0", ready=r"ready at (\S+)")
        env = {"ETCD_ENDPOINTS": registry, "BENCH_DELAY_S": str(delay_s)}
        self._start("worker", f"{HERE / 'worker.py'}:Pacer", ready="worker ready", env=env)
        self.url = self._start("frontend", "--http-port", "0", ready=r"ready at http://(\S+)", env=env)
        self.worker, self.frontend = (process.pid for process in self._processes[1:])

    def _start(self, *args: str, ready: str, env: dict[str, str] | None = None) -> str:
        process = subprocess.Popen(
            [sys.executable, "-m", "dynamo_grpc", *args, "--log-level", "error"],
            env={**os.environ, **(env or {}), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        self._processes.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.search(ready, line):
                return match[1] if match.groups() else ""
        raise SystemExit(f"{args} did not start")

    def stop(self) -> None:
        """End all."""
        for process in reversed(self._processes):
            process.terminate()
            process.wait(20)


async def one(host: str, port: int, tokens: int, ttft_s: list[float]) -> int:
    """One streamed chat; gives the number of its tokens."""
    message = {"role": "user", "content": "Tell me something about the sea and its many creatures. " * 8}
    body = json.dumps({"model": "bench", "stream": True, "max_tokens": tokens, "messages": [message]}).encode()
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    seen, is_first = b"", True
    while piece := await reader.read(65536):
        if is_first and b'"content":"' in (seen := seen + piece).replace(b'"content":""', b""):
            ttft_s.append(time.perf_counter() - started)
            is_first = False
        elif not is_first:
            seen += piece
    writer.close()
    if b"[DONE]" not in seen:
        raise SystemExit(f"an answer failed: {seen[:500]!r}")
    return tokens


async def load(url: str, streams: int, tokens: int, seconds: float) -> tuple[int, list[float]]:
    """Keep `streams` chats running for `seconds`."""
    host, port = url.split(":")
    ttft_s: list[float] = []
    end, total = time.monotonic() + seconds, 0

    async def loop() -> None:
        nonlocal total
        while time.monotonic() < end:
            done = await one(host, int(port), tokens, ttft_s)  # `total += await` would add to a stale total
            total += done

    await asyncio.gather(*(loop() for _ in range(streams)))
    return total, ttft_s


def measure(name: str, streams: int, delay_s: float, seconds: float) -> None:
    """Print one line."""
    mesh = Mesh(delay_s)
    try:
        asyncio.run(load(mesh.url, 2, 5, 0.5))  # warm up; the first request waits for the model
        before, started = (cpu_s(mesh.frontend), cpu_s(mesh.worker)), time.monotonic()
        tokens, ttft_s = asyncio.run(load(mesh.url, streams, 100, seconds))
        took_s = time.monotonic() - started
        front, worker = cpu_s(mesh.frontend) - before[0], cpu_s(mesh.worker) - before[1]
        p50, p99 = (statistics.quantiles(ttft_s, n=100)[q] * 1e3 for q in (49, 98))
        print(
            f"{name:<28} {tokens / took_s:>8.0f} tokens/s   CPU a token: frontend {front / tokens * 1e6:5.1f} µs, "
            f"worker {worker / tokens * 1e6:5.1f} µs   first token: p50 {p50:6.1f} ms, p99 {p99:6.1f} ms"
        )
    finally:
        mesh.stop()


def main() -> None:
    """Run all measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each line")
    seconds = parser.parse_args().seconds
    measure("1 stream, flat out", 1, 0.0, seconds)
    measure("64 streams, flat out", 64, 0.0, seconds)
    measure("256 streams, one in 20 ms", 256, 0.02, seconds)


if __name__ == "__main__":
    main()
