"""Processes that leave, are full or die on purpose, from outside: flags, signals, HTTP."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from ..conftest import Process, metric
from .test_up import CHAT, children, until

Start = Callable[..., Process]
#: 3 s at least.
SLOW = {**CHAT, "max_tokens": 60, "ignore_eos": True, "stream": True}


@pytest.fixture
def env(cli: Start) -> dict[str, str]:
    """A registry."""
    registry = cli("registry", "--port", "0")
    return {"ETCD_ENDPOINTS": registry.wait_for(r"registry ready at (\S+)")[1], "ETCD_LEASE_TTL": "2"}


def start_frontend(cli: Start, env: dict[str, str], num_workers: int, *args: str) -> tuple[Process, str]:
    frontend = cli("frontend", "--http-port", "0", *args, env=env)
    url = frontend.wait_for(r"ready at (http://\S+)")[1]
    until(lambda: len(httpx.get(f"{url}/health").json()["instances"]) == num_workers)
    until(lambda: httpx.get(f"{url}/health").status_code == 200)
    return frontend, url


def lines_of(url: str) -> Iterator[str]:
    """A slow answer as it comes."""
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=SLOW, timeout=60) as response:
        assert response.status_code == 200, response.read()
        yield from response.iter_lines()


def test_a_frontend_that_leaves_says_so_serves_on_and_finishes(cli: Start, env: dict[str, str]) -> None:
    cli("worker", "tiny", "--inject-faults", "slow_s=0.05", env=env).wait_for("worker ready")
    args = ("--shutdown-grace-s", "1.5", "--shutdown-timeout-s", "30")
    frontend, url = start_frontend(cli, env, 1, *args)
    lines = lines_of(url)
    next(lines)
    frontend.signal(signal.SIGTERM)
    until(lambda: httpx.get(f"{url}/health").status_code == 503)
    assert httpx.get(f"{url}/health").json()["status"] == "draining"
    assert httpx.get(f"{url}/live").status_code == 200
    served = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "max_tokens": 1}, timeout=30)
    assert (served.status_code, served.headers["connection"]) == (200, "close")

    def is_closed() -> bool:
        try:
            httpx.get(f"{url}/live")
        except httpx.TransportError:
            return True
        return False

    until(is_closed)
    rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""]
    assert frontend.wait() in (0, -signal.SIGTERM)


def test_a_second_signal_ends_a_frontend_at_once(cli: Start, env: dict[str, str]) -> None:
    cli("worker", "tiny", "--inject-faults", "slow_s=0.5", env=env).wait_for("worker ready")
    frontend, url = start_frontend(cli, env, 1, "--shutdown-grace-s", "60", "--shutdown-timeout-s", "60")
    lines = lines_of(url)
    next(lines)
    frontend.signal(signal.SIGTERM)
    until(lambda: httpx.get(f"{url}/health").status_code == 503)
    time.sleep(1.1)  # one that comes at once is the same
    frontend.signal(signal.SIGTERM)
    frontend.wait(10)
    with pytest.raises((httpx.TransportError, StopIteration)):
        while True:
            assert next(lines) != "data: [DONE]"


def test_a_worker_that_dies_on_purpose_costs_no_answer(cli: Start, env: dict[str, str]) -> None:
    cli("worker", "tiny", env=env).wait_for("worker ready")
    dying = cli("worker", "tiny", "--inject-faults", "die_after=5", env=env)
    dying.wait_for("this worker injects faults: die_after=5")
    dying.wait_for("worker ready")
    _, url = start_frontend(cli, env, 2)
    body = {**CHAT, "max_tokens": 20, "seed": 1}
    answers = [httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 1
    assert sum("x-migrations" in answer.headers for answer in answers) == 1
    assert dying.wait() == -signal.SIGKILL


def test_a_full_worker_by_flags(cli: Start, env: dict[str, str]) -> None:
    args = ("--max-concurrent", "1", "--max-queued", "0", "--inject-faults", "slow_s=0.05")
    worker = cli("worker", "tiny", "--system-port", "0", *args, env=env)
    port = worker.wait_for(r"system port (\d+)")[1]
    worker.wait_for("worker ready")
    frontend, url = start_frontend(cli, env, 1, "--overload-status", "529")
    lines = lines_of(url)
    next(lines)
    refused = httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=30)
    assert (refused.status_code, refused.headers["retry-after"]) == (529, "1")
    assert re.search(r"is full: max_concurrent=1 requests run and none may wait", refused.json()["error"]["message"])
    metrics = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    assert metric(metrics, "dynamo_component_refused_requests_total", dynamo_component="backend", model="tiny") == 1
    frontend.signal(signal.SIGKILL)  # its handler ends, and counts
    counted = "dynamo_component_cancel_to_stop_seconds_count"
    until(lambda: metric(httpx.get(f"http://127.0.0.1:{port}/metrics").text, counted) == 1)
    assert httpx.get(f"http://127.0.0.1:{port}/health").json()["requests"] == 0
    with pytest.raises(httpx.TransportError):
        list(lines)


def test_faults_that_there_are_not(cli: Start, env: dict[str, str]) -> None:
    worker = cli("worker", "tiny", "--inject-faults", "explode=1", env=env)
    assert worker.wait() == 1
    assert "no fault 'explode': there are share, refuse, fail_after" in worker.output


@pytest.mark.full
def test_a_drain_and_then_a_signal_is_one_leaving(cli: Start, env: dict[str, str]) -> None:
    """As with a preStop hook."""
    worker = cli("worker", "tiny", "--inject-faults", "slow_s=0.05", env=env)
    instance_id = worker.wait_for(r"worker ready at .* instance (\w{16})")[1]
    _, url = start_frontend(cli, env, 1)
    lines = lines_of(url)
    next(lines)
    drain = cli("drain", instance_id, env=env)
    worker.wait_for("leaves; 1 requests run")
    worker.signal(signal.SIGTERM)
    assert list(lines)[-2:] == ["data: [DONE]", ""]
    assert worker.wait() == 0
    assert drain.wait() == 0


@pytest.mark.full
def test_a_signal_to_a_whole_group_is_one_leaving(cli: Start, env: dict[str, str]) -> None:
    """As systemd sends it: the processes get it from the supervisor too."""
    cli("worker", "tiny", "--inject-faults", "slow_s=0.05", env=env).wait_for("worker ready")
    frontend, url = start_frontend(cli, env, 1, "--processes", "2", "--shutdown-timeout-s", "30")
    streams = [lines_of(url) for _ in range(4)]
    for lines in streams:
        next(lines)
    for pid in (frontend.pid, *(pid for pid, _ in children(frontend.pid))):
        os.kill(pid, signal.SIGTERM)
    for lines in streams:
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    assert frontend.wait() == 0
