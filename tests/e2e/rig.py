"""A mesh of real processes on a real etcd, under a steady load, whose parts can be stopped, killed and cut off."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from ..conftest import Process
from ..etcd import Etcd
from ..proxy import Proxy
from .test_up import CHAT

TTL_S = 3


class Load:
    """Streamed chats, one after the other, in several threads."""

    def __init__(self, url: str, num_threads: int = 4) -> None:
        self.url, self._stop = url, threading.Event()
        self.num_done = 0
        self.failed: list[str] = []
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(num_threads)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.ask()
            time.sleep(0.02)

    def ask(self) -> None:
        """One chat; it must be answered to its end."""
        try:
            body = {**CHAT, "stream": True, "max_tokens": 20}
            response = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60)
            if response.status_code != 200 or not response.text.endswith("data: [DONE]\n\n"):
                self.failed.append(f"{time.ctime()} {response.headers.get('x-request-id')} {response.text[-300:]}")
        except httpx.HTTPError as error:
            self.failed.append(f"{time.ctime()} {error!r}")
        self.num_done += 1

    def go_on(self, seconds: float = 0.0) -> None:
        """Go on for so long, and until at least ten requests more have ended."""
        before, end = self.num_done, time.monotonic() + 40
        time.sleep(seconds)
        while self.num_done < before + 10:
            assert time.monotonic() < end, f"requests stand still; failed: {self.failed}"
            time.sleep(0.05)

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


class Rig:
    """Workers, a frontend and a load.

    Args:
        cli: starts `dynamo-grpc …`.
        cut_off: which parts reach etcd through proxies of their own: "frontend" and "worker N".
    """

    def __init__(
        self, cli: Callable[..., Process], etcd: Etcd, num_workers: int = 2, cut_off: tuple[str, ...] = ()
    ) -> None:
        self._cli, self.etcd = cli, etcd
        self.proxies = {name: [Proxy(member.port) for member in etcd.members] for name in cut_off}
        self.workers: list[Process] = []
        self.instance_ids: list[str] = []
        for _ in range(num_workers):
            self.add_worker()
        self.frontend = cli("frontend", "--http-port", "0", env=self._env("frontend"))
        self.url = self.frontend.wait_for(r"ready at (http://\S+)")[1]
        self.until(lambda: self.routed() == set(self.instance_ids))
        self.load = Load(self.url)
        self.load.go_on()

    def _env(self, name: str) -> dict[str, str]:
        proxies = self.proxies.get(name)
        endpoints = ",".join(proxy.endpoint for proxy in proxies) if proxies else self.etcd.endpoints
        return {"ETCD_ENDPOINTS": endpoints, "ETCD_LEASE_TTL": str(TTL_S)}

    def add_worker(self) -> str:
        """One worker more; gives its instance id."""
        worker = self._cli("worker", "tiny", "--system-port", "0", env=self._env(f"worker {len(self.workers)}"))
        instance_id = worker.wait_for(r"worker ready at .* instance (\w{16})")[1]
        self.workers.append(worker)
        self.instance_ids.append(instance_id)
        return instance_id

    def health(self) -> dict[str, Any]:
        """What the frontend says."""
        health: dict[str, Any] = httpx.get(f"{self.url}/health", timeout=10).json()
        return health

    def routed(self) -> set[str]:
        """Ids of the instances that the frontend routes to."""
        return {instance["instance_id"] for instance in self.health()["instances"]}

    def listed(self) -> dict[str, int]:
        """The epoch of each instance that stands in etcd, by id; none stands there twice."""
        found = [(f"{int(i['instance_id']):016x}", int(i["epoch"])) for i in self.etcd.instances().values()]
        assert len(found) == len(dict(found)), found
        return dict(found)

    def until(self, check: Callable[[], object], limit_s: float = 10.0) -> None:
        """Wait until `check()` is true."""
        end = time.monotonic() + limit_s
        while not check():
            assert time.monotonic() < end, f"not within {limit_s} s; the frontend says {self.health()}"
            time.sleep(0.1)

    def until_right(self, limit_s: float = 10.0) -> None:
        """Until all instances stand in etcd, and the frontend routes to them and sees them as they stand there."""
        self.until(lambda: self.listed().keys() == set(self.instance_ids), limit_s)

        def is_seen() -> bool:
            health = self.health()
            seen = {i["instance_id"]: i["epoch"] for i in health["instances"] if i["is_listed"]}
            return seen == self.listed() and health["registry"]["unreachable_since"] is None

        self.until(is_seen, limit_s)

    def cut(self, name: str, how: Callable[[Proxy], None] = Proxy.drop) -> None:
        """Cut a part off from etcd."""
        for proxy in self.proxies[name]:
            how(proxy)

    def heal(self) -> None:
        """Undo all cuts."""
        for proxies in self.proxies.values():
            for proxy in proxies:
                proxy.restore()

    def check(self) -> None:
        """Nobody failed, nobody restarted; the load ends."""
        self.load.go_on()
        self.load.end()
        assert not self.load.failed, self.load.failed
        assert all(process._popen.poll() is None for process in (*self.workers, self.frontend))
        for process in (*self.workers, self.frontend):
            assert "Traceback" not in process.output

    def close(self) -> None:
        self.load.end()
        for proxies in self.proxies.values():
            for proxy in proxies:
                proxy.close()


def open_files(pid: int) -> int:
    """How many files and sockets a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
