"""What an operator sees: ps, ps --watch, doctor, errors that say who is there."""

import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from ..conftest import Process
from ..etcd import free_port
from .test_up import until

Start = Callable[..., Process]


@pytest.fixture
def env(cli: Start) -> dict[str, str]:
    """Where an embedded registry is."""
    registry = cli("registry", "--port", "0")
    endpoint = registry.wait_for(r"registry ready at (\S+)")[1]
    return {"ETCD_ENDPOINTS": endpoint, "ETCD_LEASE_TTL": "2"}


def test_ps_watch_shows_every_change(cli: Start, env: dict[str, str]) -> None:
    watch = cli("ps", "--watch", env=env)
    watch.wait_for("no instances are registered")
    nowhere = cli("ps", "--watch", env={"ETCD_ENDPOINTS": "127.0.0.1:1"})
    nowhere.wait_for("etcd at 127.0.0.1:1: watching /dynamo_grpc/v1/instances/: UNAVAILABLE")
    assert "no instances" not in nowhere.output
    worker = cli("worker", "echo", env=env)
    ready = worker.wait_for(r"worker ready at (\S+) \(dynamo.backend.generate, model echo, instance (\w+)\)")
    watch.wait_for(rf"dynamo.backend.generate +{ready[2]} +{ready[1]} +echo +ready +1 +0 +\d+s")
    worker.signal(signal.SIGSTOP)
    # both may come at once
    watch.wait_for(rf"(?s){ready[2]} +{ready[1]} +echo +unreachable +1 +- +-.*no instances are registered")
    worker.signal(signal.SIGCONT)
    watch.wait_for(rf"{ready[2]} +{ready[1]} +echo +ready +2 +0 +\d+s")
    watch.signal(signal.SIGINT)
    assert watch.wait() == 130
    assert "Traceback" not in watch.output


def test_doctor_finds_a_worker_in_another_registry(cli: Start, env: dict[str, str]) -> None:
    other = cli("registry", "--port", "0").wait_for(r"registry ready at (\S+)")[1]
    worker = cli("worker", "echo", env={**env, "ETCD_ENDPOINTS": other})
    address = worker.wait_for(r"worker ready at (\S+)")[1]
    doctor = cli("doctor", address, "--frontend", "", env=env)
    assert doctor.wait() == 1
    reason = f"it registers with etcd at {other}, and you look at etcd at {env['ETCD_ENDPOINTS']}"
    assert re.search(rf"most likely: {address}: serves 'dynamo.backend.generate'.*{reason}", doctor.output)


def test_doctor_looks_at_frontend_and_names(cli: Start, env: dict[str, str]) -> None:
    worker = cli("worker", "echo", env=env)
    worker.wait_for("worker ready")
    front = cli("frontend", "--http-port", "0", "--namespace", "elsewhere", env=env)
    url = front.wait_for(r"ready at (http://\S+)")[1]
    doctor = cli("doctor", "--frontend", url, env=env)
    assert doctor.wait() == 1
    assert "most likely: it serves namespace 'elsewhere' alone, there are models in 'dynamo' too" in doctor.output
    assert re.search(r"ok +\S+: answers in [\d.]+ ms, etcd 3.5.0-embedded", doctor.output)
    doctor = cli("doctor", "ecko", "--frontend", "", env=env)
    assert doctor.wait() == 1
    assert "nobody registers it; there is 'dynamo.backend.generate', 'echo' (did you mean 'echo'?)" in doctor.output
    doctor = cli("doctor", "echo", "--frontend", "", env=env)
    assert doctor.wait() == 0, doctor.output
    assert doctor.output.endswith("nothing is wrong\n")


@pytest.mark.parametrize("body", [b'{"status":"ok"}', b'["ok"]', b"hello", b'{"registry":null,"instances":[]}'])
def test_doctor_is_not_led_astray_by_other_servers(cli: Start, env: dict[str, str], body: bytes) -> None:
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

    cli("worker", "echo", env=env).wait_for("worker ready")
    with http.server.HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        proxy = {"http_proxy": "http://127.0.0.1:1"}  # not for what is on this machine
        doctor = cli("doctor", "--frontend", url, env={**env, **proxy})
        assert doctor.wait() == 0, doctor.output
        server.shutdown()
    assert "what answers there is no frontend of dynamo-grpc" in doctor.output


def test_doctor_asks_what_is_no_http_server(cli: Start, env: dict[str, str]) -> None:
    address = cli("worker", "echo", env=env).wait_for(r"worker ready at (\S+)")[1]
    doctor = cli("doctor", "--frontend", f"http://{address}", env=env)
    assert doctor.wait() == 0, doctor.output
    assert "Traceback" not in doctor.output


@pytest.mark.full
def test_commands_when_no_registry_is_there(cli: Start) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    env = {"ETCD_ENDPOINTS": endpoint}
    doctor, ps, call = cli("doctor", env=env), cli("ps", env=env), cli("call", "a.b.c", "--wait-s", "1", env=env)
    assert doctor.wait(30) == 1
    assert re.search(f"most likely: etcd at {endpoint} does not answer: .*refused", doctor.output)
    for process in (ps, call):
        assert process.wait(30) == 1
        assert re.search(f"etcd at {endpoint} does not answer: .*refused", process.output)
        assert "Traceback" not in process.output


def test_no_instances_is_said_with_what_there_is(cli: Start, env: dict[str, str]) -> None:
    cli("worker", "echo", env=env).wait_for("worker ready")
    call = cli("call", "dynamo.backend.generat", '"hi"', "--wait-s", "0.5", env=env)
    assert call.wait() == 1
    assert "dynamo.backend.generat" in call.output
    assert f"etcd at {env['ETCD_ENDPOINTS']} lists 'dynamo.backend.generate'" in call.output
    assert "did you mean 'dynamo.backend.generate'?" in call.output


def test_a_frontend_says_why_nobody_answers(cli: Start, env: dict[str, str]) -> None:
    worker = cli("worker", "echo", env={**env, "ETCD_LEASE_TTL": "30"})
    address = worker.wait_for(r"worker ready at (\S+)")[1]
    front = cli("frontend", "--http-port", "0", "--instance-wait-s", "0.2", env=env)
    url = front.wait_for(r"ready at (http://\S+)")[1]
    until(lambda: httpx.get(f"{url}/v1/models").json()["data"])
    worker.signal(signal.SIGKILL)
    worker.wait()
    body = {"model": "echo", "messages": [{"role": "user", "content": "hi"}]}

    def said() -> str:
        response = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert response.status_code == 503
        assert response.headers["retry-after"]
        return str(response.json()["error"]["message"])

    until(lambda: f"of 1 listed none answers, at '{address}'" in said())
    nowhere = cli("frontend", "--http-port", "0", "--instance-wait-s", "0.2", env={"ETCD_ENDPOINTS": "127.0.0.1:1"})
    url = nowhere.wait_for(r"ready at (http://\S+)")[1]
    until(lambda: "the registry has not answered yet: watching" in said())


@pytest.mark.full
def test_dns_names_are_resolved_again(cli: Start, start: Start, tmp_path: Path) -> None:
    """The resolver's own file is replaced in a mount namespace of the frontend's."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.fail("unshare -m is not allowed, and this is CI") if os.environ.get("CI") else pytest.skip("no unshare")
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n")
    port = str(free_port())
    script = f'mount --bind {hosts} /etc/hosts && exec "$@"'
    spec = f"dns:workers.test:{port}"
    front = start(
        "unshare", "-m", "sh", "-c", script, "sh",
        sys.executable, "-m", "dynamo_grpc", "frontend", "--http-port", "0", "--static", spec,
    )  # fmt: skip
    url = front.wait_for(r"ready at (http://\S+)")[1]
    assert f"static list: what DNS has for workers.test, port {port}" in front.output

    def addresses() -> set[str]:
        return {instance["address"] for instance in httpx.get(f"{url}/health").json()["instances"]}

    until(lambda: "resolving workers.test" in str(httpx.get(f"{url}/health").json()["registry"]["problem"]))
    for host in ("127.0.0.1", "127.0.0.2"):
        worker = cli("worker", "echo", "--host", host, "--port", port, "--discovery-backend", "static")
        worker.wait_for("worker ready")
    hosts.write_text("127.0.0.1 localhost workers.test\n")
    until(lambda: addresses() == {f"127.0.0.1:{port}"})
    hosts.write_text("127.0.0.1 localhost workers.test\n127.0.0.2 workers.test\n")
    until(lambda: addresses() == {f"127.0.0.1:{port}", f"127.0.0.2:{port}"})
    hosts.write_text("127.0.0.1 localhost\n127.0.0.2 workers.test\n")
    until(lambda: addresses() == {f"127.0.0.2:{port}"})
    hosts.write_text("127.0.0.1 localhost\n")  # a resolver that knows nothing: the last word holds
    until(lambda: httpx.get(f"{url}/health").json()["registry"]["unreachable_since"])
    assert addresses() == {f"127.0.0.2:{port}"}
    assert json.loads(httpx.get(f"{url}/health").text)["status"] == "healthy"


def test_a_worker_is_drained_by_command(cli: Start, env: dict[str, str]) -> None:
    workers = [cli("worker", "echo", env=env) for _ in range(2)]
    ids = [worker.wait_for(r"worker ready at \S+ .* instance (\w+)\)")[1] for worker in workers]
    unknown = cli("drain", "zzzz", env=env)
    assert unknown.wait() == 1
    assert all(instance_id in unknown.output for instance_id in ids)
    empty = cli("drain", "", env=env)
    assert empty.wait() == 1
    assert "too short" in empty.output
    drained = cli("drain", ids[0][:12], "--limit-s", "1", env=env)
    assert drained.wait() == 0, drained.output
    assert "drains; 0 requests run there" in drained.output
    assert workers[0].wait() == 0
    address = workers[1].wait_for(r"worker ready at (\S+)")[1]
    assert cli("drain", address, env=env).wait() == 0
    assert workers[1].wait() == 0
    again = cli("drain", address, env=env)
    assert again.wait() == 1
    assert "Traceback" not in again.output
