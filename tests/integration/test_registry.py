"""What every registry must do; run against memory, the embedded one, a real etcd, and a static list."""

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import grpc
import pytest

from dynamo_grpc import ConfigurationError
from dynamo_grpc.discovery import open_registry
from dynamo_grpc.names import INSTANCES
from dynamo_grpc.records import read_instances, to_entries
from dynamo_grpc.registry import Registry, View
from dynamo_grpc.registry.embedded import EmbeddedRegistry
from dynamo_grpc.registry.etcd import EtcdRegistry
from dynamo_grpc.registry.etcd_settings import EtcdSettings
from dynamo_grpc.registry.memory import MemoryRegistry
from dynamo_grpc.registry.static import StaticRegistry, parse_addresses
from dynamo_grpc.testing import Mesh
from dynamo_grpc.v1 import model_card_pb2

from ..conftest import eventually
from ..etcd import distro, free_port


class Backend(Protocol):
    """A registry under test, and a way to let instances come and go."""

    registry: Registry

    async def join(self, component: str) -> Callable[[], Awaitable[None]]: ...


class WithLeases:
    def __init__(self, registry: Registry) -> None:
        self.registry = registry

    async def join(self, component: str) -> Callable[[], Awaitable[None]]:
        registration = await self.registry.register(to_entries(instance(component), None))
        await registration.wait_registered()
        return registration.close


class Static:
    def __init__(self, mesh: Mesh, file: Path) -> None:
        self.registry = StaticRegistry(f"@{file}")
        self._mesh, self._file = mesh, file

    async def join(self, component: str) -> Callable[[], Awaitable[None]]:
        async def handler(request: Any) -> None: ...

        runtime = await self._mesh.serve(f"test.{component}.generate", handler)
        with self._file.open("a") as file:
            file.write(f"127.0.0.1:{runtime.server.port}  # {component}\n")
        return lambda: self._mesh.stop(runtime)


@pytest.fixture(params=["memory", "embedded", "etcd", "static"])
async def backend(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Backend]:
    async with contextlib.AsyncExitStack() as stack:
        match request.param:
            case "memory":
                yield WithLeases(MemoryRegistry())
            case "embedded":
                server = await stack.enter_async_context(EmbeddedRegistry(0))
                settings = EtcdSettings((server.endpoint,), ttl_s=2)
                yield WithLeases(await stack.enter_async_context(EtcdRegistry(settings)))
            case "etcd":
                settings = EtcdSettings((request.getfixturevalue("etcd_endpoint"),), ttl_s=2)
                yield WithLeases(await stack.enter_async_context(EtcdRegistry(settings)))
            case "static":
                (tmp_path / "workers").touch()
                mesh = await stack.enter_async_context(Mesh())
                static = Static(mesh, tmp_path / "workers")
                await stack.enter_async_context(static.registry)
                yield static


def instance(component: str, instance_id: int = 1) -> model_card_pb2.Instance:
    return model_card_pb2.Instance(
        namespace="test", component=component, endpoint="generate", instance_id=instance_id, address="127.0.0.1:1"
    )


def components(view: View[Any]) -> set[str]:
    return {record.instance.component for record in read_instances(view.entries.values())}


async def test_a_watch_is_a_snapshot_and_then_every_change(backend: Backend) -> None:
    leave_a = await backend.join("a")
    view = View.start(backend.registry, f"{INSTANCES}test/")
    await view.wait_ready()
    await eventually(lambda: components(view) == {"a"})
    leave_b = await backend.join("b")
    await eventually(lambda: components(view) == {"a", "b"})
    await leave_a()
    await eventually(lambda: components(view) == {"b"})
    await leave_b()
    await eventually(lambda: components(view) == set())
    await view.close()


async def test_a_watch_sees_its_prefix_alone(backend: Backend) -> None:
    view = View.start(backend.registry, f"{INSTANCES}test/b/")
    leave_a, leave_b = await backend.join("a"), await backend.join("b")
    await eventually(lambda: components(view) == {"b"})
    await leave_a()
    await leave_b()
    await eventually(lambda: components(view) == set())
    await view.close()


async def test_list_gives_what_is_there(backend: Backend) -> None:
    assert await backend.registry.list(f"{INSTANCES}test/") == []
    leave = await backend.join("a")
    found = read_instances(await backend.registry.list(f"{INSTANCES}test/"))
    assert [record.instance.component for record in found] == ["a"]
    await leave()


async def test_several_watchers_see_the_same(backend: Backend) -> None:
    views = [View.start(backend.registry, f"{INSTANCES}test/") for _ in range(3)]
    leave = await backend.join("a")
    for view in views:
        await eventually(lambda view=view: components(view) == {"a"})
    await leave()
    for view in views:
        await eventually(lambda view=view: components(view) == set())
        await view.close()


@pytest.fixture(params=["embedded", "etcd"])
async def etcd(request: pytest.FixtureRequest) -> AsyncIterator[EtcdRegistry]:
    """What speaks etcd's API."""
    async with contextlib.AsyncExitStack() as stack:
        if request.param == "embedded":
            endpoint = (await stack.enter_async_context(EmbeddedRegistry(0))).endpoint
        else:
            endpoint = request.getfixturevalue("etcd_endpoint")
        yield await stack.enter_async_context(EtcdRegistry(EtcdSettings((endpoint,), ttl_s=2)))


async def test_values_can_be_replaced(etcd: EtcdRegistry) -> None:
    registration = await etcd.register({"/u/a": b"1", "/u/b": b"1"})
    await registration.wait_registered()
    view = View.start(etcd, "/u/")
    await eventually(lambda: set(view.entries) == {"/u/a", "/u/b"})
    created = view.entries["/u/a"].created
    await registration.update({"/u/a": b"2", "/u/c": b"1"})
    await eventually(lambda: {k: e.value for k, e in view.entries.items()} == {"/u/a": b"2", "/u/c": b"1"})
    assert view.entries["/u/a"].created == created
    await registration.close()
    await view.close()


@pytest.mark.full
async def test_the_lease_is_kept_alive_and_ends_without_its_owner(etcd: EtcdRegistry) -> None:
    view = View.start(etcd, "/k/")
    registration = await etcd.register({"/k/a": b"1"})
    await eventually(lambda: "/k/a" in view.entries)
    removed: list[bool] = []
    view.subscribe(lambda _: removed.append("/k/a" not in view.entries))
    await asyncio.sleep(5.0)  # more than two times to live
    assert not any(removed)
    await registration.orphan()
    await eventually(lambda: "/k/a" not in view.entries, 8.0)
    await view.close()


async def test_a_lease_that_was_taken_away_is_replaced(etcd: EtcdRegistry) -> None:
    from dynamo_grpc.registry import etcd_pb2, wire

    view = View.start(etcd, "/l/")
    registration = await etcd.register({"/l/a": b"1"})
    await registration.wait_registered()
    await etcd.client.call(wire.LEASE_REVOKE, etcd_pb2.LeaseRevokeRequest(ID=registration._lease_id))
    await eventually(lambda: not view.entries)
    await eventually(lambda: "/l/a" in view.entries, 8.0)
    await registration.close()
    await view.close()


async def test_etcdctl_reads_what_was_registered(etcd: EtcdRegistry) -> None:
    registration = await etcd.register({"/dynamo_grpc/v1/instances/x": b'{"namespace": "x"}'})
    await registration.wait_registered()
    command = [str(distro("etcdctl")), "--endpoints", etcd.settings.endpoints[0]]
    got = await asyncio.to_thread(subprocess.check_output, [*command, "get", "--prefix", "/dynamo_grpc"], text=True)
    assert got == '/dynamo_grpc/v1/instances/x\n{"namespace": "x"}\n'
    await asyncio.to_thread(subprocess.check_output, [*command, "put", "/dynamo_grpc/other", "1"])
    assert [e.key for e in await etcd.list("/dynamo_grpc/o")] == ["/dynamo_grpc/other"]
    status = await asyncio.to_thread(subprocess.check_output, [*command, "endpoint", "status"], text=True)
    assert etcd.settings.endpoints[0] in status
    await asyncio.to_thread(subprocess.check_output, [*command, "del", "/dynamo_grpc/other"])
    await registration.close()


async def test_start_order_does_not_matter() -> None:
    port = free_port()
    async with EtcdRegistry(EtcdSettings((f"127.0.0.1:{port}",), ttl_s=2)) as registry:
        view = View.start(registry, "/s/")
        registration = await registry.register({"/s/a": b"1"})
        await asyncio.sleep(0.5)
        assert not view.is_ready
        async with EmbeddedRegistry(port):
            await asyncio.wait_for(registration.wait_registered(), 15)
            await eventually(lambda: "/s/a" in view.entries)
        async with EmbeddedRegistry(port) as other:  # an empty one in its place
            await eventually(lambda: other.store.range(_all()).count == 1, 20.0)
            await eventually(lambda: "/s/a" in view.entries)
            await registration.close()
        await view.close()


def _all() -> Any:
    from dynamo_grpc.registry import etcd_pb2

    return etcd_pb2.RangeRequest(key=b"/", range_end=b"0")


async def test_what_the_embedded_registry_lacks_is_said_clearly() -> None:
    async with EmbeddedRegistry(0) as server:
        command = [str(distro("etcdctl")), "--endpoints", server.endpoint]
        failed = await asyncio.to_thread(subprocess.run, [*command, "member", "list"], capture_output=True, text=True)
        assert failed.returncode != 0
        assert "Unimplemented" in failed.stderr
        assert "the embedded registry has no /etcdserverpb.Cluster/MemberList" in failed.stderr
        with pytest.raises(ConfigurationError, match=f"port {server.port} for the registry is taken"):
            async with EmbeddedRegistry(server.port):
                pass


def test_settings() -> None:
    env = {
        "ETCD_ENDPOINTS": "http://a:1, b:2",
        "ETCD_LEASE_TTL": "5",
        "ETCD_AUTH_USERNAME": "u",
        "ETCD_AUTH_PASSWORD": "p",
    }
    settings = EtcdSettings.from_env(env)
    assert (settings.endpoints, settings.ttl_s, settings.username) == (("http://a:1", "b:2"), 5, "u")
    assert "p" not in repr(settings).replace("http", "").replace("endpoints", "").split("username")[1]
    assert EtcdSettings.from_env({}).endpoints == ("localhost:2379",)
    with pytest.raises(ConfigurationError, match="ETCD_LEASE_TTL"):
        EtcdSettings.from_env({"ETCD_LEASE_TTL": "soon"})


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ({"DYN_DISCOVERY_BACKEND": "file"}, "embedded registry"),
        ({"DYN_DISCOVERY_BACKEND": "kubernetes"}, "dns:SERVICE:PORT"),
        ({"DYN_DISCOVERY_BACKEND": "ectd"}, "did you mean 'etcd'"),
        ({"DYN_DISCOVERY_BACKEND": "static", "DYN_STATIC": "@/nowhere"}, "no file '/nowhere'"),
        ({"DYN_DISCOVERY_BACKEND": "static", "DYN_STATIC": "nohost"}, "HOST:PORT"),
        ({"DYN_REQUEST_PLANE": "tcp"}, "travel by gRPC alone"),
        ({"DYN_REQUEST_PLANE": "http"}, "travel by gRPC alone"),
        ({"DYN_REQUEST_PLANE": "nats"}, "travel by gRPC alone"),
        ({"DYN_EVENT_PLANE": "zmq"}, "SubscribeKvEvents"),
    ],
)
def test_settings_of_other_systems_say_what_replaces_them(env: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        open_registry(env=env)


def test_addresses() -> None:
    assert parse_addresses(["a:1", " b:2 # the second", "", "# none", "a:1"]) == ["a:1", "b:2"]
    for wrong in ("a", "a:b", "a:0", ":1", "a:70000"):
        with pytest.raises(ConfigurationError, match="HOST:PORT"):
            parse_addresses([wrong])
        with pytest.raises(ConfigurationError, match="HOST:PORT"):
            StaticRegistry(f"a:1,{wrong}")
    for wrong in ("dns:a", "dns::1", "dns:a:b"):
        with pytest.raises(ConfigurationError, match="dns:NAME:PORT"):
            StaticRegistry(wrong)


async def test_a_static_list_says_what_it_is_made_of(mesh: Mesh, tmp_path: Path) -> None:
    async def handler(request: Any) -> None: ...

    a, b = await mesh.serve("a.b.c", handler), await mesh.serve("a.b.d", handler)
    file = tmp_path / "workers"
    file.write_text(f"127.0.0.1:{b.server.port}\n")
    async with StaticRegistry(f"127.0.0.1:{a.server.port}, @{file}, dns:localhost:{a.server.port}") as registry:
        assert registry.description == (
            f"static list: 127.0.0.1:{a.server.port}, the file {file}, what DNS has for localhost, port {a.server.port}"
        )
        view = View.start(registry, INSTANCES)
        await eventually(lambda: components(view) == {"b"} and len(view.entries) == 2)
        file.write_text("no address")  # a typo: what it said before holds, and is said to
        await eventually(lambda: registry.problem.startswith(f"reading {file}: 'no address' should be HOST:PORT"))
        assert len(view.entries) == 2
        file.write_text("")
        await eventually(lambda: len(view.entries) == 1 and registry.unreachable_since is None)
        await view.close()


async def test_a_worker_that_is_only_slow_stays_on_a_static_list(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    from dynamo_grpc.registry import static

    async def handler(request: Any) -> None: ...

    runtime = await mesh.serve("a.b.c", handler)
    view = View.start(StaticRegistry(f"127.0.0.1:{runtime.server.port}"), INSTANCES)
    await eventually(lambda: view.entries)
    monkeypatch.setattr(static, "_ANSWER_S", 0.0)
    await asyncio.sleep(1.2)
    assert view.entries
    monkeypatch.setattr(static, "_ANSWER_S", 2.0)
    await mesh.stop(runtime)
    await eventually(lambda: not view.entries)
    await view.close()


async def test_a_static_list_takes_addresses_and_names(mesh: Mesh, tmp_path: Path) -> None:
    async def handler(request: Any) -> None: ...

    runtime = await mesh.serve("a.b.c", handler)
    port = runtime.server.port
    for spec in (f"127.0.0.1:{port}", f"dns:localhost:{port}"):
        async with StaticRegistry(spec) as registry:
            (entry,) = read_instances(await registry.list(INSTANCES))
            assert entry.instance.address.endswith(f":{port}")


async def test_a_put_that_lands_late_takes_no_keys_along(etcd: EtcdRegistry) -> None:
    """The first put seems to fail, and is applied after the second: its lease must be over by then."""
    from dynamo_grpc.registry import etcd_pb2, wire

    call, late = etcd.client.call, []

    async def failing(method: Any, request: Any, timeout_s: float = 3.0) -> Any:
        if method is wire.TXN and any(op.HasField("request_put") for op in request.success) and not late:
            late.append(request)
            raise grpc.aio.AioRpcError(grpc.StatusCode.DEADLINE_EXCEEDED, grpc.aio.Metadata(), grpc.aio.Metadata())
        return await call(method, request, timeout_s)

    etcd.client.call = failing  # type: ignore[method-assign]
    registration = await etcd.register({"/late/a": b"1"})
    await asyncio.wait_for(registration.wait_registered(), 5)
    assert not (await call(wire.TXN, late[0])).succeeded
    late[0].ClearField("compare")
    with pytest.raises(grpc.aio.AioRpcError, match="requested lease not found"):
        await call(wire.TXN, late[0])
    answer = await call(wire.LEASE_TIME_TO_LIVE, etcd_pb2.LeaseTimeToLiveRequest(ID=registration._lease_id, keys=True))
    assert list(answer.keys) == [b"/late/a"]
    await registration.close()


async def test_a_deleted_key_is_put_again(etcd: EtcdRegistry) -> None:
    from dynamo_grpc.registry import etcd_pb2, wire

    registration = await etcd.register({"/deleted/a": b"1"})
    await registration.wait_registered()
    await etcd.client.call(wire.DELETE_RANGE, etcd_pb2.DeleteRangeRequest(key=b"/deleted/a"))
    view = View.start(etcd, "/deleted/")
    await eventually(lambda: "/deleted/a" in view.entries)
    await view.close()
    await registration.close()


async def test_keys_that_are_no_text_hide_no_others(etcd: EtcdRegistry) -> None:
    from dynamo_grpc.registry import etcd_pb2, wire

    view = View.start(etcd, "/bytes/")
    await view.wait_ready()
    for key in (b"/bytes/\xff", b"/bytes/a"):
        await etcd.client.call(wire.PUT, etcd_pb2.PutRequest(key=key, value=b"\xff"))
    await eventually(lambda: list(view.entries) == ["/bytes/a"])
    await etcd.client.call(wire.DELETE_RANGE, etcd_pb2.DeleteRangeRequest(key=b"/bytes/", range_end=b"/bytes0"))
    await eventually(lambda: not view.entries)
    await view.close()


async def test_watches_of_a_static_list_are_independent(mesh: Mesh, tmp_path: Path) -> None:
    async def handler(request: Any) -> None: ...

    a, b = await mesh.serve("a.b.c", handler), await mesh.serve("a.b.d", handler)
    file = tmp_path / "workers"
    file.write_text(f"127.0.0.1:{a.server.port}\n127.0.0.1:{b.server.port}\n")
    views = [View.start(StaticRegistry(f"@{file}"), prefix) for prefix in (INSTANCES, f"{INSTANCES}a/")]
    for view in views:
        await eventually(lambda view=view: len(view.entries) == 2)
    for text in (f"127.0.0.1:{a.server.port}", "no address", f"127.0.0.1:{b.server.port}"):
        file.write_text(text)
        await asyncio.sleep(0.7)
    for view in views:
        await eventually(lambda view=view: [key for key in view.entries if "/d/" in key] == list(view.entries))
        await view.close()


def test_certificates_that_can_not_be_read_are_told_at_start() -> None:
    with pytest.raises(ConfigurationError, match="/nowhere"):
        open_registry(env={"ETCD_AUTH_CA": "/nowhere"})
