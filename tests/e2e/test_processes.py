"""Several frontend processes behind one port."""

import os
import re
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx

from ..conftest import Process
from .test_up import CHAT, children

COUNT = 3


def test_processes_share_a_port_and_one_that_dies_costs_only_its_own(cli: Callable[..., Process]) -> None:
    worker = cli("worker", "tiny", "--discovery-backend", "static")
    address = worker.wait_for(r"worker ready at (\S+)")[1]
    front = cli("frontend", "--http-port", "0", "--processes", str(COUNT), "--static", address)
    url = front.wait_for(rf"ready at (http://\S+) .*{COUNT} processes")[1]

    def ask(_: int = 0) -> int:
        return httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "max_tokens": 3}, timeout=30).status_code

    def counted() -> int:
        text = httpx.get(f"{url}/metrics").text
        return sum(
            int(float(n)) for n in re.findall(r"dynamo_frontend_requests_total{.*status=\"success\"} (\S+)", text)
        )

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(40))) == {200}
        assert {counted() for _ in range(10)} == {40}  # whichever process answers
        first = children(front.pid)[0][0]
        os.kill(first, signal.SIGKILL)
        # those that the kernel gave to the dead one wait for the next
        assert set(pool.map(ask, range(40))) == {200}
    front.wait_for("SIGKILL.*starting it again")
    assert counted() == 80
    assert len(children(front.pid)) == COUNT
    port = url.rpartition(":")[2]
    other = cli("frontend", "--http-port", port, "--processes", "2", "--static", address)
    other.wait_for(f"can't listen on .*:{port}")
    assert other.wait() != 0
    front.signal(signal.SIGTERM)
    assert front.wait() == 0
    assert children(front.pid) == []
