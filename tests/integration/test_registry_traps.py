"""What etcd's versions, gRPC and other people do that nobody expects of a registry."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from dynamo_grpc import DistributedRuntime, NoInstancesError, RouterMode
from dynamo_grpc.connections import Connections
from dynamo_grpc.instances import ask_whether_it_serves
from dynamo_grpc.names import INSTANCES
from dynamo_grpc.records import InstanceRecord, to_entries
from dynamo_grpc.registry import View, backoff, etcd_pb2, wire
from dynamo_grpc.registry.embedded import EmbeddedRegistry
from dynamo_grpc.registry.etcd import EtcdRegistry
from dynamo_grpc.registry.etcd_settings import EtcdSettings
from dynamo_grpc.registry.memory import MemoryRegistry
from dynamo_grpc.registry.static import StaticRegistry
from dynamo_grpc.v1 import control_pb2, control_pb2_grpc, model_card_pb2

from ..conftest import eventually
from ..etcd import Etcd

versions = pytest.mark.parametrize(
    "version",
    ["3.5", pytest.param("current", marks=pytest.mark.full), pytest.param("3.4", marks=pytest.mark.full)],
)


def jwt_flags(folder: Path) -> tuple[str, ...]:
    """Tokens that are signed, and valid for ten minutes whatever happens."""
    key = rsa.generate_private_key(65537, 2048)
    private = serialization.PrivateFormat.TraditionalOpenSSL
    (folder / "key").write_bytes(key.private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption()))
    public = serialization.PublicFormat.SubjectPublicKeyInfo
    (folder / "pub").write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, public))
    return ("--auth-token", f"jwt,pub-key={folder}/pub,priv-key={folder}/key,sign-method=RS256,ttl=10m")


@versions
async def test_a_signed_token_that_a_change_of_users_made_old(
    tmp_path: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backoff, "_REFUSED_S", 0.5)
    etcd = Etcd(tmp_path, version=version, flags=jwt_flags(tmp_path))
    try:
        await asyncio.to_thread(etcd.start)
        for command in ("user add root:secret", "user grant-role root root", "auth enable"):
            await asyncio.to_thread(etcd.ctl, *command.split())
        settings = EtcdSettings((etcd.endpoints,), ttl_s=2, username="root", password="secret")
        async with EtcdRegistry(settings) as registry:
            view = View.start(registry, "/j/")
            registration = await registry.register({"/j/a": b"1"})
            await eventually(lambda: view.entries)
            await asyncio.to_thread(etcd.ctl, "--user", "root:secret", "user", "add", "other:x")
            assert len(await registry.list("/j/")) == 1
            await registration.update({"/j/b": b"2"})
            await eventually(lambda: list(view.entries) == ["/j/b"])
            await asyncio.sleep(3)
            assert len(await registry.list("/j/")) == 1  # kept alive
            assert not registry.problem
            await registration.close()
            await view.close()
    finally:
        etcd.close()


async def test_a_token_that_somebody_else_forgot_meanwhile() -> None:
    """A call whose token is refused, while a stream has just forgotten it, must not go out without one."""
    async with EmbeddedRegistry(0) as server:
        settings = EtcdSettings((server.endpoint,), username="u", password="p")
        async with EtcdRegistry(settings) as registry:
            client, used, tokens = registry.client, [], iter(("one", "two", "three"))

            async def call(method: wire.Method, request: Any, timeout_s: float, token: str) -> Any:
                if method is wire.AUTHENTICATE:
                    return etcd_pb2.AuthenticateResponse(token=next(tokens))
                used.append(token)
                if token == "one":
                    client._token = ""
                    raise grpc.aio.AioRpcError(
                        grpc.StatusCode.UNAUTHENTICATED, grpc.aio.Metadata(), grpc.aio.Metadata(), "invalid auth token"
                    )
                return etcd_pb2.RangeResponse()

            client._call = call  # type: ignore[method-assign]
            await client.call(wire.RANGE, etcd_pb2.RangeRequest(key=b"a"))
            assert used == ["one", "two"]


@versions
async def test_a_learner_is_left(tmp_path: Path, version: str) -> None:
    etcd = Etcd(tmp_path, version=version)
    learner = None
    try:
        await asyncio.to_thread(etcd.start)
        learner = await asyncio.to_thread(etcd.add_learner, tmp_path)
        async with EtcdRegistry(EtcdSettings((learner.endpoint, etcd.endpoints), ttl_s=5)) as registry:
            registry.client._current = 0
            view = View.start(registry, "/l/")
            registration = await registry.register({"/l/a": b"1"})
            await eventually(lambda: view.entries, 20)
            await registration.close()
            await view.close()
    finally:
        if learner is not None:
            learner.kill()
        etcd.close()


async def test_leaving_takes_another_member_when_one_is_gone(tmp_path: Path) -> None:
    etcd = Etcd(tmp_path, size=3)
    try:
        await asyncio.to_thread(etcd.start)
        async with EtcdRegistry(EtcdSettings(tuple(etcd.endpoints.split(",")), ttl_s=60)) as registry:
            registration = await registry.register({"/m/a": b"1"})
            await registration.wait_registered()
            etcd.members[registry.client._current].kill()
            await asyncio.sleep(1)  # another leader, if it was that
            await registration.close()
        async with EtcdRegistry(EtcdSettings(tuple(m.endpoint for m in etcd.members if m.process))) as registry:
            assert await registry.list("/m/") == []
    finally:
        etcd.close()


async def test_who_has_nothing_to_keep_alive_has_no_outage() -> None:
    async with EmbeddedRegistry(0) as server, EtcdRegistry(EtcdSettings((server.endpoint,), ttl_s=1)) as registry:
        registration = await registry.register({"/x/a": b"1"})
        await registration.wait_registered()
        server.stall()
        await eventually(lambda: "keeping leases alive" in registry.problem)
        closing = asyncio.create_task(registration.close())
        await asyncio.sleep(0.1)
        server.resume()
        await closing
        await eventually(lambda: not registry.problem, 5)


class WithoutStreams(EmbeddedRegistry):
    """As behind a proxy that lets no streams through."""

    async def _watch(self, requests: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "no streams here")


async def test_a_watch_that_cannot_be_opened_is_tried_less_and_less(caplog: pytest.LogCaptureFixture) -> None:
    async with WithoutStreams(0) as server, EtcdRegistry(EtcdSettings((server.endpoint,))) as registry:
        server.store.put(etcd_pb2.PutRequest(key=b"/f/a", value=b"1"))
        num_reads, read_all = 0, registry.client.read_all

        async def counting(prefix: bytes) -> Any:
            nonlocal num_reads
            num_reads += 1
            return await read_all(prefix)

        registry.client.read_all = counting  # type: ignore[method-assign]
        view = View.start(registry, "/f/")
        await eventually(lambda: view.entries)  # what can be read is
        await asyncio.sleep(3)
        assert num_reads < 10
        assert "watching /f/: UNAVAILABLE: no streams here" in registry.problem
        assert len([r for r in caplog.records if "watching /f/" in r.message]) == 1
        await view.close()


class Describing(control_pb2_grpc.ControlServicer):
    """A process that says what it serves, when it finds the time."""

    def __init__(self, *instances: model_card_pb2.Instance) -> None:
        self.instances, self.delays_s = list(instances), [0.0]
        self.num_asked = 0

    async def Describe(self, request: Any, context: Any) -> Any:
        self.num_asked += 1
        await asyncio.sleep(self.delays_s.pop(0) if len(self.delays_s) > 1 else self.delays_s[0])
        return control_pb2.DescribeResponse(state=control_pb2.WORKER_STATE_READY, instances=self.instances)

    async def serve(self) -> grpc.aio.Server:
        server = grpc.aio.server()
        control_pb2_grpc.add_ControlServicer_to_server(self, server)
        self.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        return server


def instance(instance_id: int, address: str, checksum: str = "c1", **changes: str) -> model_card_pb2.Instance:
    names = {"namespace": "d", "component": "b", "endpoint": "g", **changes}
    return model_card_pb2.Instance(
        instance_id=instance_id,
        address=address,
        model="m",
        card_checksum=checksum,
        **names,  # type: ignore[arg-type]
    )


@pytest.fixture
async def describing() -> AsyncIterator[Describing]:
    process = Describing()
    server = await process.serve()
    yield process
    await server.stop(None)


@pytest.mark.parametrize(("delays_s", "is_kept"), [([0.0], True), ([9.0, 0.0], True), ([9.0], False)])
async def test_a_busy_owner_is_asked_twice(
    describing: Describing, delays_s: list[float], is_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dynamo_grpc import instances

    monkeypatch.setattr(instances, "_ANSWER_S", 0.3)
    describing.instances, describing.delays_s = [instance(1, describing.address)], delays_s
    connections = Connections()
    asked = InstanceRecord("/i", 1, describing.instances[0])
    assert await ask_whether_it_serves(connections)(asked) is is_kept
    assert describing.num_asked == (1 if delays_s == [0.0] else 2) or not delays_s[0]
    other = InstanceRecord("/i", 1, instance(2, describing.address))  # another process has the address
    describing.delays_s = [0.0]
    assert not await ask_whether_it_serves(connections)(other)
    nobody = InstanceRecord("/i", 1, instance(1, "127.0.0.1:1"))
    assert not await ask_whether_it_serves(connections)(nobody)
    await connections.close()


@pytest.mark.full
async def test_the_card_of_a_doubted_instance_is_known(describing: Describing) -> None:
    """B is cut off and kept; then A leaves, whose card had held: B's holds from then on."""
    from dynamo_frontend.catalog import Catalog

    def card(checksum: str) -> model_card_pb2.ModelCard:
        return model_card_pb2.ModelCard(name="m", checksum=checksum, model_input=model_card_pb2.MODEL_INPUT_TEXT)

    a, b = instance(1, "127.0.0.1:1"), instance(2, describing.address, "c2")
    describing.instances = [b]
    async with EmbeddedRegistry(0) as server:

        def put(owner: model_card_pb2.Instance) -> None:
            for key, value in to_entries(owner, card(owner.card_checksum)).items():
                server.store.put(etcd_pb2.PutRequest(key=key.encode(), value=value))

        def delete(owner: model_card_pb2.Instance) -> None:
            for key in to_entries(owner, card(owner.card_checksum)):
                server.store.delete(etcd_pb2.DeleteRangeRequest(key=key.encode()))

        runtime = DistributedRuntime(registry=EtcdRegistry(EtcdSettings((server.endpoint,))))
        catalog = Catalog(runtime, RouterMode.RoundRobin, instance_wait_s=0.2)
        put(a)
        put(b)
        await eventually(lambda: [m.card.checksum for m in catalog.all()] == ["c1"])
        delete(b)
        await eventually(lambda: catalog._instances.doubted)
        delete(a)
        await eventually(lambda: [m.card.checksum for m in catalog.ready()] == ["c2"])
        assert (await catalog.find("m")).card.checksum == "c2"
        describing.instances = []
        with pytest.raises(NoInstancesError):
            async with asyncio.timeout(10):
                while True:
                    await catalog.find("m")
                    await asyncio.sleep(0.2)
        await catalog.close()
        await runtime.aclose()


async def test_a_name_that_is_none_hides_no_others_of_a_static_list(caplog: pytest.LogCaptureFixture) -> None:
    good, odd = Describing(), Describing()
    servers = [await good.serve(), await odd.serve()]
    good.instances = [instance(1, "")]
    odd.instances = [instance(2, "", namespace="team a"), instance(3, "")]
    async with StaticRegistry(f"{odd.address},{good.address}") as registry:
        view = View.start(registry, INSTANCES)
        await eventually(lambda: len(view.entries) == 2)
        await eventually(lambda: odd.num_asked > 3)
        assert caplog.text.count("'team a' is no namespace name") == 1
        await view.close()
    for server in servers:
        await server.stop(None)


@pytest.fixture
def small_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    from dynamo_grpc.registry import etcd

    monkeypatch.setattr(etcd, "_READ_AGAIN_S", 0.2)


@pytest.mark.usefixtures("small_intervals")
async def test_an_event_that_etcd_lost_is_found_by_reading_again() -> None:
    async with EmbeddedRegistry(0) as server, EtcdRegistry(EtcdSettings((server.endpoint,))) as registry:
        view = View.start(registry, "/e/")
        await view.wait_ready()
        server._publish = lambda events: None  # type: ignore[method-assign]
        server.store._on_events = server._publish
        server.store.put(etcd_pb2.PutRequest(key=b"/e/a", value=b"1"))
        await eventually(lambda: view.entries)
        assert not registry.problem
        await view.close()


async def test_a_view_outlives_a_cancel_that_is_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    registry, number = MemoryRegistry(), 0
    watch = registry.watch

    async def cancelled_first(prefix: str) -> Any:
        nonlocal number
        number += 1
        if number == 1:
            raise asyncio.CancelledError  # as grpc.aio has it when a call was cancelled below
        async for change in watch(prefix):
            yield change

    monkeypatch.setattr(registry, "watch", cancelled_first)
    view = View.start(registry, "/x/")
    await asyncio.wait_for(view.wait_ready(), 5)
    assert number == 2
    await view.close()


UVLOOP = """
import asyncio, sys, uvloop
from dynamo_grpc.registry import View, etcd
from dynamo_grpc.registry.embedded import EmbeddedRegistry
from dynamo_grpc.discovery import open_registry

async def main():
    etcd._READ_AGAIN_S = 0.05  # every 300 s, else
    async with EmbeddedRegistry(0) as server:
        import os
        os.environ["ETCD_ENDPOINTS"] = server.endpoint
        async with open_registry() as registry:
            views = [View.start(registry, f"/{number}/") for number in range(5)]
            for view in views:
                await view.wait_ready()
            await asyncio.sleep(1.5)
            print([view._task.done() for view in views], repr(registry.problem))
            for view in views:
                await view.close()

uvloop.run(main())
"""


def test_a_timer_that_comes_early_ends_no_view() -> None:
    done = subprocess.run([sys.executable, "-c", UVLOOP], capture_output=True, text=True, timeout=30)
    assert done.stdout == "[False, False, False, False, False] ''\n", done.stderr
