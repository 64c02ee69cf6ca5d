"""etcd stops, dies, and comes back empty, under load: nobody fails, nobody restarts."""

import json
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ..conftest import Process
from ..etcd import distro, free_port
from .test_up import CHAT

TTL_S = 3


class Etcd:
    """A real etcd that can be stopped and lost."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._runs = folder, 0
        self.client, self.peer = free_port(), free_port()
        self.process: subprocess.Popen[bytes]

    def start(self, *, keeps_data: bool = True, token: str = "one") -> None:
        self._runs += 0 if keeps_data else 1
        client, peer = f"http://127.0.0.1:{self.client}", f"http://127.0.0.1:{self.peer}"
        args = ["--data-dir", str(self._folder / str(self._runs)), "--name", "m", "--initial-cluster-token", token]
        args += ["--listen-client-urls", client, "--advertise-client-urls", client, "--listen-peer-urls", peer]
        args += ["--initial-advertise-peer-urls", peer, "--initial-cluster", f"m={peer}", "--log-level", "error"]
        self.process = subprocess.Popen([str(distro()), *args], stderr=subprocess.DEVNULL)
        end = time.monotonic() + 20
        while True:
            try:
                if b"true" in urllib.request.urlopen(f"{client}/health", timeout=1).read():
                    return
            except OSError:
                assert time.monotonic() < end, "etcd did not start"
                time.sleep(0.1)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def instances(self) -> dict[str, Any]:
        """What stands in etcd, by instance id."""
        command = [str(distro("etcdctl")), "--endpoints", f"127.0.0.1:{self.client}", "get", "--prefix"]
        output = subprocess.check_output([*command, "/dynamo_grpc/v1/instances/", "--print-value-only"], timeout=10)
        found = [json.loads(line) for line in output.splitlines() if line]
        return {instance["instance_id"]: instance for instance in found}


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    server = Etcd(tmp_path)
    server.start()
    yield server
    server.process.send_signal(signal.SIGCONT)
    server.kill()


class Load:
    """Streamed chats, one after the other, in several threads."""

    def __init__(self, url: str) -> None:
        self.url, self._stop = url, threading.Event()
        self.num_done, self.failed = 0, []
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(4)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        body = {**CHAT, "stream": True, "max_tokens": 20}
        while not self._stop.is_set():
            response = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=30)
            if response.status_code != 200 or not response.text.endswith("data: [DONE]\n\n"):
                self.failed.append(response.text[-300:])
            self.num_done += 1

    def get(self, path: str) -> Any:
        """A page of the frontend."""
        return httpx.get(f"{self.url}{path}").json()

    def wait(self, seconds: float) -> None:
        """Go on for so long; at least some requests must end meanwhile."""
        before = self.num_done
        time.sleep(seconds)
        assert self.num_done > before

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)


def stopped(etcd: Etcd, load: Load) -> None:
    etcd.process.send_signal(signal.SIGSTOP)
    load.wait(3 * TTL_S)
    while load.get("/health")["registry"]["unreachable_since"] is None:
        load.wait(1)  # until pings say so
    health = load.get("/health")
    assert health["status"] == "healthy"
    assert "registry doesn't answer" in health["message"]
    assert "dynamo_frontend_registry_up 0.0" in httpx.get(f"{load.url}/metrics").text
    etcd.process.send_signal(signal.SIGCONT)


def restarted_on_its_data(etcd: Etcd, load: Load) -> None:
    etcd.kill()
    load.wait(TTL_S)
    etcd.start()


def restarted_empty(etcd: Etcd, load: Load) -> None:
    etcd.kill()
    load.wait(1)
    etcd.start(keeps_data=False)


def replaced(etcd: Etcd, load: Load) -> None:
    etcd.kill()
    load.wait(TTL_S)
    etcd.start(keeps_data=False, token="two")  # another cluster id


@pytest.mark.full
@pytest.mark.parametrize("fault", [stopped, restarted_on_its_data, restarted_empty, replaced], ids=lambda f: f.__name__)
def test_an_outage_of_etcd_is_not_ours(
    cli: Callable[..., Process], etcd: Etcd, fault: Callable[[Etcd, Load], None]
) -> None:
    env = {"ETCD_ENDPOINTS": f"127.0.0.1:{etcd.client}", "ETCD_LEASE_TTL": str(TTL_S)}
    workers = [cli("worker", "tiny", env=env) for _ in range(2)]
    for worker in workers:
        worker.wait_for("worker ready")
    front = cli("frontend", "--http-port", "0", env=env)
    url = front.wait_for(r"ready at (http://\S+)")[1]
    before = etcd.instances()
    assert len(before) == 2
    load = Load(url)
    load.wait(1)
    fault(etcd, load)
    end = time.monotonic() + 10
    while etcd.instances().keys() != before.keys():
        assert time.monotonic() < end, "not registered again within 10 s"
        time.sleep(0.2)
    load.wait(2 * TTL_S)
    load.end()
    assert load.failed == []
    after = etcd.instances()
    assert after.keys() == before.keys()
    assert {i["address"] for i in after.values()} == {i["address"] for i in before.values()}
    assert all(process._popen.poll() is None for process in (*workers, front))
    health = load.get("/health")
    assert health["registry"]["unreachable_since"] is None
    assert {i["instance_id"] for i in health["instances"]} == {f"{int(i):016x}" for i in after}
