"""A view that doubts its registry."""

from __future__ import annotations

from typing import Any

import pytest

from dynamo_grpc.records import decode_instance, to_entries
from dynamo_grpc.registry import Change, Entry, View, view
from dynamo_grpc.v1 import model_card_pb2

from ..conftest import eventually


def entry(component: str, created: int = 1) -> Entry:
    instance = model_card_pb2.Instance(
        namespace="n", component=component, endpoint="e", instance_id=1, address="127.0.0.1:1"
    )
    ((key, value),) = to_entries(instance, None).items()
    return Entry(key, value, created)


class Doubting:
    """A view, and who says that it serves."""

    def __init__(self) -> None:
        self.serving: set[str] = set()
        self.num_asked = 0
        self.view = View(decode_instance, self._ask)
        self.told: list[set[str]] = []
        self.view.subscribe(lambda changed: self.told.append(set(changed)))

    async def _ask(self, record: Any) -> bool:
        self.num_asked += 1
        return record.instance.component in self.serving


async def test_who_serves_stays_though_the_registry_lost_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "RECHECK_S", 0.01)
    doubting = Doubting()
    a, b = entry("a"), entry("b")
    doubting.view.apply(Change(puts=(a, b), is_snapshot=True))
    assert doubting.told == [{a.key, b.key}]
    doubting.serving = {"a"}
    doubting.view.apply(Change(deletes=(a.key, b.key)))
    await eventually(lambda: b.key not in doubting.view.records)
    assert doubting.told[1:] == [{b.key}]
    doubting.view.apply(Change(is_snapshot=True))  # another break: nothing new
    assert doubting.view.doubted.keys() == {a.key}
    await eventually(lambda: doubting.num_asked > 5)
    assert doubting.view.records.keys() == {a.key}
    doubting.view.apply(Change(puts=(entry("a", 7),)))  # it is back
    assert not doubting.view.doubted
    assert doubting.view.entries[a.key].created == 7
    doubting.view.apply(Change(deletes=(a.key,)))
    doubting.serving = set()
    await eventually(lambda: not doubting.view.records)
    await doubting.view.close()


async def test_what_did_not_change_is_not_told() -> None:
    doubting = Doubting()
    doubting.view.apply(Change(is_snapshot=True))
    doubting.view.apply(Change(puts=(entry("a"),), is_snapshot=True))
    doubting.view.apply(Change(puts=(entry("a"),), is_snapshot=True))
    doubting.view.apply(Change(puts=(entry("a"),)))
    doubting.view.apply(Change(deletes=("nobody",)))
    assert doubting.told == [set(), {entry("a").key}]
    bad = Entry(entry("a").key, b"garbage", 1)
    doubting.view.apply(Change(puts=(bad,)))
    assert (doubting.view.records, list(doubting.view.entries)) == ({}, [bad.key])
    doubting.view.apply(Change(deletes=(bad.key,)))
    assert not doubting.view.entries
    await doubting.view.close()
