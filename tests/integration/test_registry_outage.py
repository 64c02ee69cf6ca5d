"""A registry that stops, comes back, or comes back empty."""

import pytest

from dynamo_grpc.registry import Change, Entry, View, base
from dynamo_grpc.registry.embedded import EmbeddedRegistry
from dynamo_grpc.registry.etcd import EtcdRegistry
from dynamo_grpc.registry.etcd_settings import EtcdSettings

from ..conftest import eventually, free_port


async def test_a_store_that_comes_back_empty_hides_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    epochs = [1]

    def renew() -> dict[str, bytes]:
        epochs.append(epochs[-1] + 1)
        return {"/e/alive": b"epoch %d" % epochs[-1]}

    async with EtcdRegistry(EtcdSettings((f"127.0.0.1:{port}",), ttl_s=2)) as registry:
        view = View.start(registry, "/e/")
        seen: list[set[str]] = []
        async with EmbeddedRegistry(port):
            registration = await registry.register({"/e/alive": b"epoch 1"}, renew)
            dead = await registry.register({"/e/dead": b""})
            await eventually(lambda: view.entries.keys() == {"/e/alive", "/e/dead"})
            dead._task.cancel()  # its process is gone
            view.subscribe(lambda: seen.append(set(view.entries)))
        monkeypatch.setattr(base, "GRACE_S", 8.0)
        async with EmbeddedRegistry(port):
            await eventually(lambda: view.entries["/e/alive"].value == b"epoch 2", 8.0)
            assert all("/e/alive" in keys for keys in seen)
            assert "/e/dead" in view.entries
            await eventually(lambda: view.entries.keys() == {"/e/alive"}, 15.0)
            assert all("/e/alive" in keys for keys in seen)
            assert epochs == [1, 2]
            await registration.close()
            await eventually(lambda: not view.entries)
        await view.close()


async def test_the_grace_outlives_another_break() -> None:
    view = View()
    a, b = Entry("a", b"", 1), Entry("b", b"", 1)
    view._apply(Change(puts=(a, b), is_snapshot=True))
    view._apply(Change(is_snapshot=True, is_replaced=True))
    view._apply(Change(is_snapshot=True))
    assert view.entries.keys() == {"a", "b"}
    view._apply(Change(puts=(a,), is_snapshot=True))
    view._apply(Change(deletes=("b",)))
    assert view.entries.keys() == {"a"}
    view._end_grace()
    assert view.entries.keys() == {"a"}
    await view.close()


async def test_a_key_that_leaves_a_replaced_store_is_not_kept() -> None:
    port = free_port()
    async with EtcdRegistry(EtcdSettings((f"127.0.0.1:{port}",), ttl_s=2)) as registry:
        view = View.start(registry, "/e/")
        async with EmbeddedRegistry(port):
            registration = await registry.register({"/e/a": b"1"})
            await eventually(lambda: "/e/a" in view.entries)
        async with EmbeddedRegistry(port):
            await eventually(lambda: not view._unconfirmed and view._grace, 8.0)  # it is back
            await registration.close()
            await eventually(lambda: not view.entries)
        await view.close()
