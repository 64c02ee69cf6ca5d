"""A real Prometheus, with what lies in deploy/: it scrapes, the rules hold, and every query of the dashboard has data."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from ..conftest import ROOT, Process
from ..etcd import free_port
from .test_traces import runs
from .test_up import CHAT, until

Start = Callable[..., Process]
DEPLOY = ROOT / "deploy"

WORKER = """
import asyncio
import dynamo_workers.tiny
from pathlib import Path
from dynamo_grpc import Worker

class Slow(Worker):
    model_path = Path(dynamo_workers.tiny.__file__).parent / "model"
    model_name = "slow"
    max_concurrent = 1
    max_queued = 0

    async def generate(self, request, context):
        if request.priority == 7:
            raise ValueError("seven")
        for _ in range(1000):
            yield 300
            await asyncio.sleep(0.02)
"""


@pytest.fixture
def promtool(tool: Callable[[str], str]) -> str:
    return tool("promtool")


@pytest.mark.full
def test_configuration_and_rules(promtool: str) -> None:
    for command in (("check", "rules", "alerts.yml"), ("check", "config", "prometheus.yml")):
        done = subprocess.run([promtool, *command], cwd=DEPLOY, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.full
@pytest.mark.timeout(180)
def test_a_mesh_is_seen(start: Start, cli: Start, tool: Callable[[str], str], promtool: str, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(WORKER)
    ports, systems, http = [free_port(), free_port()], [free_port(), free_port()], free_port()
    env = {"DYN_DISCOVERY_BACKEND": "static"}
    workers = [
        cli("worker", str(tmp_path / "slow.py"), "--port", str(port), "--system-port", str(system), env=env)
        for port, system in zip(ports, systems, strict=True)
    ]
    for worker in workers:
        worker.wait_for("worker ready")
    addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
    cli("frontend", "--http-port", str(http), "--static", addresses, env=env).wait_for("ready at")
    url = f"http://127.0.0.1:{http}"
    until(lambda: len(httpx.get(f"{url}/health").json()["instances"]) == 2)
    prometheus = start_prometheus(start, tool("prometheus"), tmp_path, [f"127.0.0.1:{http}"], systems)

    num_tokens = load(url, workers, ports)
    pages = [httpx.get(f"{url}/metrics").text, httpx.get(f"{url}/metrics?workers=1").text]
    alive = next(system for worker, system in zip(workers, systems, strict=True) if worker.is_running)
    pages.append(httpx.get(f"http://127.0.0.1:{alive}/metrics").text)
    for page in pages:
        done = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stdout + done.stderr) == (0, ""), done.stdout + done.stderr

    def query(text: str) -> Any:
        answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": text}).json()
        assert answer["status"] == "success", (text, answer)
        return answer["data"]["result"]

    def value(text: str) -> float:
        return float(query(text)[0]["value"][1]) if query(text) else -1.0

    until(lambda: value("sum(dynamo_frontend_output_tokens_total)") == num_tokens, 30)
    assert value('sum(dynamo_frontend_requests_total{status="success"})') == 2
    assert value("sum(dynamo_frontend_time_to_first_token_seconds_count)") == 4
    until(lambda: value("sum(up)") == 2, 30)  # one worker was killed; a scrape of the others may have been late
    dashboard = json.loads((DEPLOY / "grafana" / "dynamo-grpc.json").read_text())
    exprs = {t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", ())}
    assert len(exprs) > 25
    for expr in exprs:
        asked = expr.replace("$__rate_interval", "1m").replace("$model", ".*")
        until(lambda asked=asked: query(asked), 15)  # type: ignore[misc]
    rules = httpx.get(f"{prometheus}/api/v1/rules").json()["data"]["groups"][0]["rules"]
    assert len(rules) == (DEPLOY / "alerts.yml").read_text().count("- alert:")
    until(
        lambda: all(
            r["health"] == "ok" for r in httpx.get(f"{prometheus}/api/v1/rules").json()["data"]["groups"][0]["rules"]
        ),
        30,
    )


def start_prometheus(start: Start, binary: str, folder: Path, frontends: list[str], systems: list[int]) -> str:
    """Prometheus with our configuration, at other addresses and faster."""
    text = (DEPLOY / "prometheus.yml").read_text()
    workers = ", ".join(f'"127.0.0.1:{port}"' for port in systems)
    text = text.replace('["localhost:8000"]', json.dumps(frontends), 1).replace('["localhost:9090"]', f"[{workers}]", 1)
    text = re.sub(r"(scrape|evaluation)_interval: \d+s", r"\1_interval: 1s", text)
    assert text.count("127.0.0.1") == 1 + len(systems)
    (folder / "prometheus.yml").write_text(text)
    (folder / "alerts.yml").write_text((DEPLOY / "alerts.yml").read_text())
    port = free_port()
    options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    start(binary, *options, f"--web.listen-address=127.0.0.1:{port}").wait_for("ready to receive", 30)
    return f"http://127.0.0.1:{port}"


def load(url: str, workers: list[Process], ports: list[int]) -> int:
    """Requests that end in all ways; gives how many tokens clients saw."""
    chat, body = f"{url}/v1/chat/completions", {**CHAT, "model": "slow", "stream": True}
    seen = 0

    def count(text: str) -> int:
        return len(re.findall(r'"content":"[^"]', text))

    whole = httpx.post(chat, json={**body, "max_tokens": 5}, timeout=30)
    seen += count(whole.text)
    assert httpx.post(chat, json={**body, "priority": 7}, timeout=30).status_code == 400
    with httpx.stream("POST", chat, json=body, timeout=30) as stream:  # left in the middle
        lines = stream.iter_lines()
        while '"content":"' not in (line := next(lines)) or '"content":""' in line:
            pass
    until(lambda: "model_cancellation_total{" in httpx.get(f"{url}/metrics").text)
    until(
        lambda: (
            "worker_inflight_requests{" in (t := httpx.get(f"{url}/metrics").text)
            and not re.search(r"worker_inflight_requests{.*} [1-9]", t)
        )
    )
    left = re.search(r"frontend_output_tokens_total{.*} (\S+)", httpx.get(f"{url}/metrics").text)
    assert left is not None
    seen = int(float(left[1]))  # of the one that was left nobody else knows how many were on their way

    answers: list[str] = []

    def ask() -> None:
        answers.append(httpx.post(chat, json={**body, "max_tokens": 150}, timeout=60).text)

    first = threading.Thread(target=ask)
    first.start()
    until(lambda: any(runs(url, w, p) for w, p in zip(workers, ports, strict=True)))
    with httpx.stream("POST", chat, json=body, timeout=30) as second:  # both are full now
        until(lambda: all(runs(url, w, p) for w, p in zip(workers, ports, strict=True)))
        assert httpx.post(chat, json=body, timeout=30).status_code == 503
        next(second.iter_lines())
    until(lambda: sum(runs(url, w, p) for w, p in zip(workers, ports, strict=True)) == 1)
    after = re.search(r"frontend_output_tokens_total{.*} (\S+)", httpx.get(f"{url}/metrics").text)
    assert after is not None
    seen = int(float(after[1]))
    running = next(w for w, p in zip(workers, ports, strict=True) if runs(url, w, p))
    os.kill(running.pid, signal.SIGKILL)
    first.join()
    assert answers[0].endswith("data: [DONE]\n\n")
    return seen + count(answers[0])
