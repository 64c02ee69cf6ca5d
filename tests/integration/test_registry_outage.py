"""Registries that stall, expire, forget, compact and lose members; on the embedded one, and on real ones."""

from __future__ import annotations

import asyncio
import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dynamo_grpc.names import INSTANCES
from dynamo_grpc.records import decode_instance
from dynamo_grpc.registry import View, etcd_pb2, wire
from dynamo_grpc.registry.embedded import EmbeddedRegistry
from dynamo_grpc.registry.etcd import EtcdRegistry
from dynamo_grpc.registry.etcd_settings import EtcdSettings
from dynamo_grpc.testing import Mesh
from dynamo_grpc.v1 import model_card_pb2

from ..conftest import eventually
from ..etcd import Etcd
from ..proxy import Proxy
from .handlers import NAME, collect, echo

TTL_S = 2


class Store(ABC):
    """A registry server that can fail."""

    endpoints: str

    @abstractmethod
    async def stall(self) -> None: ...

    @abstractmethod
    async def resume(self) -> None: ...

    @abstractmethod
    async def forget(self, *, keeps_id: bool) -> None: ...

    @abstractmethod
    async def compact(self) -> None: ...

    @abstractmethod
    async def expire(self) -> None: ...

    def registry(self) -> EtcdRegistry:
        """A client of it."""
        return EtcdRegistry(EtcdSettings(tuple(self.endpoints.split(",")), ttl_s=TTL_S))


class Embedded(Store):
    def __init__(self, server: EmbeddedRegistry) -> None:
        self._server, self.endpoints = server, server.endpoint

    async def stall(self) -> None:
        self._server.stall()

    async def resume(self) -> None:
        self._server.resume()

    async def forget(self, *, keeps_id: bool) -> None:
        self._server.forget(keeps_id=keeps_id)

    async def compact(self) -> None:
        self._server.compact()

    async def expire(self) -> None:
        self._server.expire()


class Real(Store):
    def __init__(self, etcd: Etcd) -> None:
        self.etcd, self.endpoints = etcd, etcd.endpoints

    async def stall(self) -> None:
        self.etcd.stop()

    async def resume(self) -> None:
        self.etcd.cont()

    async def forget(self, *, keeps_id: bool) -> None:
        await asyncio.to_thread(self.etcd.lose_data, "one" if keeps_id else "another")

    async def compact(self) -> None:
        await asyncio.to_thread(self.etcd.compact)

    async def expire(self) -> None:
        for lease_id in await asyncio.to_thread(self.etcd.lease_ids):
            await asyncio.to_thread(self.etcd.ctl, "lease", "revoke", lease_id)


@pytest.fixture(
    params=[
        "embedded",
        pytest.param("3.5", marks=pytest.mark.full),
        pytest.param("current", marks=pytest.mark.full),
        pytest.param("3.4", marks=pytest.mark.full),
        pytest.param("3.5 x 3", marks=pytest.mark.full),
        pytest.param("current x 3", marks=pytest.mark.full),
    ]
)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    if request.param == "embedded":
        async with EmbeddedRegistry(0) as server:
            yield Embedded(server)
            server.resume()
        return
    version, _, size = request.param.partition(" x ")
    etcd = Etcd(tmp_path, version=version, size=int(size or 1))
    await asyncio.to_thread(etcd.start)
    yield Real(etcd)
    etcd.close()


class Running:
    """A worker, a client, and requests one after the other; they have registry clients of their own."""

    def __init__(self, store: Store, stack: contextlib.AsyncExitStack) -> None:
        self._store, self._stack = store, stack
        self.num_answered = 0

    async def start(self) -> None:
        self.registry = await self._stack.enter_async_context(self._store.registry())
        mesh = await self._stack.enter_async_context(Mesh(self.registry))
        self.runtime = await mesh.serve(NAME, echo)
        other = await self._stack.enter_async_context(Mesh(self._store.registry()))
        self.client = await other.client(NAME)
        self.task = asyncio.create_task(self._load())
        self._stack.push_async_callback(self._end)

    async def _load(self) -> None:
        while True:
            assert await collect(await self.client.generate(["a"])) == ["a"]
            self.num_answered += 1
            await asyncio.sleep(0.01)

    async def _end(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task

    async def go_on(self, seconds: float = 0.0, num: int = 10) -> None:
        """For so long, and until so many requests more were answered."""
        before = self.num_answered
        await asyncio.sleep(seconds)
        await eventually(lambda: self.task.done() or self.num_answered >= before + num)
        assert not self.task.done() or self.task.result()

    async def listed(self) -> dict[str, model_card_pb2.Instance]:
        """What the registry has now, by key."""
        async with self._store.registry() as registry:
            entries = await registry.list(INSTANCES, timeout_s=10)
        return {record.key: record.instance for entry in entries if (record := decode_instance(entry))}

    async def until_back(self, epoch: int) -> None:
        """Until the instance stands in the registry in that epoch or a later one, once, and the client sees it so."""
        instance_id, view = self.runtime.instance_id, self.client._view
        async with asyncio.timeout(15):
            while True:
                listed = [(i.instance_id, i.epoch) for i in (await self.listed()).values()]
                seen = [(i.instance_id, i.epoch) for i in self.client.instances()]
                if listed == seen and not view.doubted and [i for i, e in listed if e >= epoch] == [instance_id]:
                    return
                await asyncio.sleep(0.1)


@pytest.fixture
async def running(store: Store) -> AsyncIterator[Running]:
    async with contextlib.AsyncExitStack() as stack:
        opened = Running(store, stack)
        await opened.start()
        yield opened


async def test_a_stalled_registry_costs_nothing(store: Store, running: Running) -> None:
    await store.stall()
    await running.go_on(2.5 * TTL_S)
    await eventually(lambda: running.registry.unreachable_since is not None)
    assert running.registry.problem
    await store.resume()
    await running.until_back(1)
    await eventually(lambda: running.registry.unreachable_since is None)
    await running.go_on()


@pytest.mark.parametrize("keeps_id", [False, True], ids=["another id", "the same id"])
async def test_a_registry_that_forgot_everything_is_told_again(
    store: Store, running: Running, *, keeps_id: bool
) -> None:
    await store.forget(keeps_id=keeps_id)
    await running.go_on()
    await running.until_back(2)
    await running.go_on()


async def test_leases_that_end_are_taken_anew(store: Store, running: Running) -> None:
    for epoch in (2, 3):
        await store.expire()
        await running.go_on()
        await running.until_back(epoch)
    await running.go_on()


@pytest.mark.full
async def test_a_key_that_is_deleted_or_changed_is_put_back(store: Store, running: Running) -> None:
    (key,) = await running.listed()
    async with store.registry() as other:
        await other.client.call(wire.DELETE_RANGE, etcd_pb2.DeleteRangeRequest(key=key.encode()))
        await running.go_on()
        await running.until_back(1)
        strange = {"namespace": "test", "component": "backend", "endpoint": "generate", "address": "127.0.0.1:1"}
        value = json.dumps({**strange, "instance_id": str(running.runtime.instance_id)}).encode()
        address = f"127.0.0.1:{running.runtime.server.port}"
        seen: list[str] = []
        running.client._view.subscribe(lambda _: seen.extend(i.address for i in running.client.instances()))
        running.task.cancel()  # nobody answers there
        await other.client.call(wire.PUT, etcd_pb2.PutRequest(key=key.encode(), value=value))
        await eventually(lambda: seen[-2:] == ["127.0.0.1:1", address], 10)
        await other.client.call(wire.PUT, etcd_pb2.PutRequest(key=key.encode(), value=value, ignore_lease=True))
        await eventually(lambda: seen[-4:] == ["127.0.0.1:1", address] * 2, 10)
    assert (await running.listed())[key].address == address


async def test_a_view_is_right_after_its_revision_was_compacted(store: Store) -> None:
    """The watch breaks, the store goes on and forgets its history, and the watch comes back."""
    proxy = Proxy(int(store.endpoints.split(",")[0].rpartition(":")[2]))
    async with EtcdRegistry(EtcdSettings((proxy.endpoint,))) as behind, store.registry() as direct:
        seen = View.start(behind, "/c/")
        registration = await direct.register({"/c/a": b"1", "/c/b": b"1"})
        await eventually(lambda: len(seen.entries) == 2)
        proxy.refuse()
        await registration.update({"/c/b": b"2", "/c/c": b"1"})
        await store.compact()
        await asyncio.sleep(0.5)
        assert len(seen.entries) == 2
        proxy.restore()
        await eventually(lambda: {k: e.value for k, e in seen.entries.items()} == {"/c/b": b"2", "/c/c": b"1"})
        assert {e.key: e for e in await direct.list("/c/")} == seen.entries
        await registration.update({"/c/d": b"1"})
        await eventually(lambda: list(seen.entries) == ["/c/d"])
        await registration.close()
        await eventually(lambda: not seen.entries)
        await seen.close()
    proxy.close()


async def test_a_long_list_is_read_in_pages(store: Store) -> None:
    async with store.registry() as registry:
        for start in range(0, 2_500, 100):
            puts = [
                etcd_pb2.RequestOp(request_put=etcd_pb2.PutRequest(key=b"/p/%05d" % i, value=b"x" * 3_000))
                for i in range(start, start + 100)
            ]
            await registry.client.call(wire.TXN, etcd_pb2.TxnRequest(success=puts))
        entries = await registry.list("/p/")
        assert [entry.key for entry in entries] == [f"/p/{i:05d}" for i in range(2_500)]


async def test_pages_are_of_one_revision() -> None:
    async with EmbeddedRegistry(0) as server, EtcdRegistry(EtcdSettings((server.endpoint,))) as registry:
        call = registry.client.call

        async def write_between(method: Any, request: Any, timeout_s: float = 3.0) -> Any:
            answer = await call(method, request, timeout_s)
            if method is wire.RANGE and not request.revision:
                await call(wire.PUT, etcd_pb2.PutRequest(key=b"/p/zz", value=b"later"))
                await call(wire.DELETE_RANGE, etcd_pb2.DeleteRangeRequest(key=b"/p/01500"))
                await call(wire.PUT, etcd_pb2.PutRequest(key=b"/p/01600", value=b"changed"))
            return answer

        for i in range(2_000):
            server.store.put(etcd_pb2.PutRequest(key=b"/p/%05d" % i, value=b"v"))
        registry.client.call = write_between  # type: ignore[method-assign]
        header, found = await registry.client.read_all(b"/p/")
        assert [(kv.key, kv.value) for kv in found] == [(b"/p/%05d" % i, b"v") for i in range(2_000)]
        assert header.revision == 2_001


async def test_two_processes_with_one_id_are_told(caplog: pytest.LogCaptureFixture) -> None:
    async with (
        EmbeddedRegistry(0) as server,
        EtcdRegistry(EtcdSettings((server.endpoint,), ttl_s=1)) as first,
        EtcdRegistry(EtcdSettings((server.endpoint,), ttl_s=1)) as second,
    ):
        ours = await first.register({"/same/a": b"the first"})
        await ours.wait_registered()
        theirs = await second.register({"/same/a": b"the second"})
        await eventually(lambda: "/same/a is registered by another process: the first" in second.problem)
        await asyncio.sleep(1.5)
        assert [e.value for e in await first.list("/same/")] == [b"the first"]
        assert caplog.text.count("another process") == 1
        await ours.close()
        await asyncio.wait_for(theirs.wait_registered(), 10)
        assert [e.value for e in await first.list("/same/")] == [b"the second"]
        await theirs.close()


async def test_an_orphan_is_listed_until_its_lease_ends(store: Store) -> None:
    async with store.registry() as registry:
        seen = View.start(registry, "/o/")
        registration = await registry.register({"/o/a": b"1"})
        await eventually(lambda: seen.entries)
        await registration.orphan()
        await asyncio.sleep(0.5)
        assert seen.entries
        await eventually(lambda: not seen.entries, 15)
        await seen.close()


@pytest.mark.full
async def test_registrations_of_one_process_share_a_stream(store: Store) -> None:
    async with store.registry() as registry:
        streams = 0
        stream = registry.client.stream

        def counting(method: wire.Method) -> Any:
            nonlocal streams
            streams += method is wire.LEASE_KEEP_ALIVE
            return stream(method)

        registry.client.stream = counting  # type: ignore[method-assign]
        registrations = [await registry.register({f"/many/{i}": b""}) for i in range(150)]
        for registration in registrations:
            await registration.wait_registered()
        await asyncio.sleep(2.5 * TTL_S)
        assert len(await registry.list("/many/")) == 150
        assert streams == 1
        await asyncio.gather(*(registration.close() for registration in registrations))
        assert await registry.list("/many/") == []


async def test_a_worker_that_leaves_is_not_kept(store: Store, running: Running) -> None:
    running.task.cancel()
    running.runtime.shutdown()
    await eventually(lambda: not running.client.instances(), 3)
    assert not running.client._view.doubted
