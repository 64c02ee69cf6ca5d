"""What goes wrong between a mesh and its etcd, under load: no request fails, nobody restarts, the view is right after."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from ..conftest import Process, metric
from ..etcd import Etcd
from ..proxy import Proxy
from .rig import TTL_S, Rig
from .test_up import CHAT

pytestmark = [pytest.mark.full, pytest.mark.timeout(240)]


@pytest.fixture
def rig(cli: Callable[..., Process], tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    """Make a mesh on an etcd with `size` members."""
    with ExitStack() as stack:

        def make(size: int = 1, version: str = "3.5", **kwargs: object) -> Rig:
            etcd = Etcd(tmp_path, size=size, version=version)
            stack.callback(etcd.close)
            etcd.start()
            made = Rig(cli, etcd, **kwargs)  # type: ignore[arg-type]
            stack.callback(made.close)
            return made

        yield make


@pytest.mark.parametrize("version", ["3.5", "current"])
def test_etcd_is_stopped_for_30_s(rig: Callable[..., Rig], version: str) -> None:
    mesh = rig(version=version)
    mesh.etcd.stop()
    mesh.load.go_on(20)
    health = mesh.health()
    assert health["status"] == "healthy"
    assert health["registry"]["unreachable_since"]
    assert health["message"].startswith("serving what was known, registry unreachable since 20")
    mesh.until(lambda: "dynamo_frontend_registry_up 0.0" in httpx.get(f"{mesh.url}/metrics").text)
    system = mesh.workers[0].wait_for(r"system port (\d+)")[1]
    health = httpx.get(f"http://127.0.0.1:{system}/health").json()
    assert health["status"] == "ready"
    assert health["message"].startswith("serving, registry unreachable since 20")
    assert metric(httpx.get(f"http://127.0.0.1:{system}/metrics").text, "dynamo_component_registry_up") == 0
    mesh.load.go_on(10)
    mesh.etcd.cont()
    mesh.until_right()
    page = f"http://127.0.0.1:{system}/metrics"
    mesh.until(lambda: metric(httpx.get(page).text, "dynamo_component_registry_up") == 1)
    mesh.check()


def restarted_on_its_data(etcd: Etcd) -> None:
    etcd.start()


def restarted_empty(etcd: Etcd) -> None:
    etcd.lose_data()


def replaced(etcd: Etcd) -> None:
    etcd.lose_data("two")


@pytest.mark.parametrize("come_back", [restarted_on_its_data, restarted_empty, replaced], ids=lambda f: f.__name__)
def test_etcd_is_killed_and_comes_back(rig: Callable[..., Rig], come_back: Callable[[Etcd], None]) -> None:
    mesh = rig()
    before = mesh.etcd.instances()
    mesh.etcd.kill()
    mesh.load.go_on(TTL_S)
    come_back(mesh.etcd)
    mesh.until_right()
    mesh.load.go_on(2 * TTL_S)
    mesh.until_right()
    after = mesh.etcd.instances()
    assert {k: v["address"] for k, v in after.items()} == {k: v["address"] for k, v in before.items()}
    mesh.check()


@pytest.mark.parametrize("who", ["leader", "follower"])
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_one_of_three_members_is_lost(rig: Callable[..., Rig], who: str, how: str) -> None:
    mesh = rig(size=3)
    leader = mesh.etcd.leader()
    lost = leader if who == "leader" else next(m for m in mesh.etcd.members if m is not leader)
    if how == "killed":
        lost.kill()
    else:
        lost.signal(signal.SIGSTOP)
    mesh.load.go_on(1)
    newcomer = mesh.add_worker()  # the watch has no gap: what changes meanwhile is seen
    mesh.until(lambda: newcomer in mesh.routed(), 20)
    mesh.load.go_on(2 * TTL_S)
    assert mesh.routed() == set(mesh.instance_ids)
    if how == "killed":
        mesh.etcd.start()
    else:
        lost.signal(signal.SIGCONT)
    mesh.until_right()
    mesh.check()


def test_a_worker_is_paused_beyond_its_lease(rig: Callable[..., Rig]) -> None:
    mesh = rig(num_workers=3)
    paused = mesh.instance_ids[0]
    mesh.workers[0].signal(signal.SIGSTOP)
    mesh.until(lambda: paused not in mesh.routed(), 2 * TTL_S + 5)
    assert mesh.listed().keys() == set(mesh.instance_ids[1:])
    for _ in range(12):
        mesh.load.ask()  # four for each, if it were three
    mesh.workers[0].signal(signal.SIGCONT)
    mesh.until_right()
    assert [mesh.listed()[i] for i in mesh.instance_ids] == [2, 1, 1]
    mesh.check()


def test_a_key_is_changed_and_deleted_by_hand(rig: Callable[..., Rig]) -> None:
    mesh = rig()
    (key, value), *_ = mesh.etcd.instances().items()
    changed = f"{int(value['instance_id']):016x}"

    def addresses() -> set[str]:
        return {instance["address"] for instance in mesh.health()["instances"]}

    before = addresses()
    for _ in range(2):
        mesh.etcd.ctl("put", key, json.dumps({**value, "address": "127.0.0.1:1"}))
        # nobody answers there; its owner may have put it back before anybody looked
        mesh.until(lambda: changed not in mesh.routed() or mesh.etcd.instances()[key] == value)
        mesh.load.go_on()
        mesh.until_right()
        assert addresses() == before
        mesh.etcd.ctl("del", key)
        mesh.load.go_on()
        assert changed in mesh.routed()  # it says itself that it serves
        mesh.until_right()
    mesh.check()


@pytest.mark.parametrize("how", [Proxy.drop, Proxy.refuse], ids=["dropped", "refused"])
@pytest.mark.parametrize("who", ["frontend", "worker 0"])
def test_one_side_is_cut_off_from_etcd(rig: Callable[..., Rig], who: str, how: Callable[[Proxy], None]) -> None:
    mesh = rig(num_workers=1, cut_off=("frontend", "worker 0"))
    mesh.cut(who, how)
    mesh.load.go_on(20)
    assert mesh.routed() == set(mesh.instance_ids)
    if who == "frontend":
        assert mesh.health()["registry"]["unreachable_since"]
        mesh.add_worker()  # not seen yet
        assert len(mesh.routed()) == 1
    else:
        assert mesh.listed() == {}  # its lease is over, and it serves
        assert [i["is_listed"] for i in mesh.health()["instances"]] == [False]
    mesh.load.go_on()
    mesh.heal()
    mesh.until_right()
    assert mesh.listed()[mesh.instance_ids[0]] == (1 if who == "frontend" else 2)
    mesh.check()


def test_the_watched_revision_is_compacted_away(rig: Callable[..., Rig]) -> None:
    mesh = rig(cut_off=("frontend",))
    mesh.cut("frontend", Proxy.refuse)
    newcomer = mesh.add_worker()
    mesh.etcd.ctl("put", "/other", "1")
    mesh.etcd.compact()
    mesh.load.go_on()
    assert newcomer not in mesh.routed()
    mesh.heal()
    mesh.until_right()
    assert newcomer in mesh.routed()
    mesh.check()


def test_two_namespaces_do_not_see_each_other(rig: Callable[..., Rig], cli: Callable[..., Process]) -> None:
    mesh = rig(num_workers=1)
    env = mesh._env("")
    other = cli("worker", "echo", "--namespace", "other", "--model-name", "tiny", env=env)
    ready = other.wait_for(r"worker ready at .* instance (\w{16})")  # the same name, with another card
    routed = {}
    for namespace in ("dynamo", "other"):
        front = cli("frontend", "--http-port", "0", "--namespace", namespace, env=env)
        url = front.wait_for(r"ready at (http://\S+)")[1]
        mesh.until(lambda url=url: httpx.get(f"{url}/v1/models").json()["data"])
        routed[namespace] = [i["instance_id"] for i in httpx.get(f"{url}/health").json()["instances"]]
        answer = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "max_tokens": 5})
        assert answer.status_code == 200, answer.text
    assert routed == {"dynamo": mesh.instance_ids, "other": [ready[1]]}
    states = cli("ps", "--json", env=env)
    assert states.wait() == 0
    assert [json.loads(line)["state"] for line in states.output.splitlines()] == ["ready", "ready"]
    doctor = cli("doctor", "--frontend", mesh.url, env=env)
    assert doctor.wait() == 1
    assert "most likely: it serves all namespaces, and 'tiny' has another card in 'other'" in doctor.output
    mesh.check()


@pytest.mark.parametrize("offset", ["-1h", "+1h"])
def test_a_clock_that_is_an_hour_off_changes_nothing(
    rig: Callable[..., Rig], cli: Callable[..., Process], library: Path, offset: str
) -> None:
    mesh = rig(num_workers=1)
    fake = {"LD_PRELOAD": str(library), "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    worker = cli("worker", "tiny", env={**mesh._env(""), **fake})
    mesh.workers.append(worker)
    mesh.instance_ids.append(worker.wait_for(r"worker ready at .* instance (\w{16})")[1])
    mesh.until_right()
    mesh.load.go_on(3 * TTL_S)
    mesh.until_right()
    shown = cli("ps", "--json", env=mesh._env(""))
    assert shown.wait() == 0
    ages = {row["instance"]: row["age"] for row in map(json.loads, shown.output.splitlines())}
    assert ages.keys() == set(mesh.instance_ids)
    assert all(age.endswith("s") for age in ages.values()), ages
    doctor = cli("doctor", "--frontend", mesh.url, env=mesh._env(""))
    assert doctor.wait() == 0
    assert f"its clock is 3600 s {'behind' if offset == '-1h' else 'ahead of'} ours" in doctor.output
    worker.signal(signal.SIGSTOP)
    mesh.until(lambda: len(mesh.routed()) == 1, 15)
    worker.signal(signal.SIGCONT)
    mesh.until_right()
    mesh.check()


@pytest.fixture
def library() -> Path:
    """What shifts a process's clock."""
    import os

    from ..etcd import TOOLS

    path = TOOLS / "libfaketime.so.1"
    if not path.exists():
        message = "no libfaketime: `make test-full` unpacks it where Debian's apt is"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return path


def test_garbage_and_newer_schemas_hide_nobody(rig: Callable[..., Rig], cli: Callable[..., Process]) -> None:
    mesh = rig()
    garbage = {
        "/dynamo_grpc/v1/instances/dynamo/backend/generate/garbage": "not json",
        "/dynamo_grpc/v1/instances/x": '{"namespace": "x"}',
        "/dynamo_grpc/v1/models/dynamo/backend/generate/1": "[]",
        "/dynamo_grpc/v2/instances/dynamo/backend/generate/1": "{}",
    }
    for key, value in garbage.items():
        mesh.etcd.ctl("put", key, value)
    mesh.load.go_on()
    mesh.workers[0].signal(signal.SIGTERM)
    assert mesh.workers[0].wait() == 0
    gone = mesh.instance_ids.pop(0)
    mesh.workers.pop(0)
    mesh.until(lambda: gone not in mesh.routed())
    front = mesh.frontend.output
    assert front.count("generate/garbage is left out: it is no Instance") == 1
    assert front.count("instances/x is left out") == 1
    doctor = cli("doctor", "--frontend", mesh.url, env=mesh._env(""))
    assert doctor.wait() == 0
    assert "of another schema than this version" in doctor.output
    assert "generate/garbage is left out: it is no Instance" in doctor.output
    time.sleep(0.5)
    for key in garbage:
        mesh.etcd.ctl("del", key)
    mesh.until_right()
    mesh.check()
