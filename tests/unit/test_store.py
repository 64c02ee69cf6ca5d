"""The embedded registry's store, as etcd would answer."""

import grpc
import pytest

from dynamo_grpc.registry import etcd_pb2 as pb
from dynamo_grpc.registry.store import Store, StoreError
from dynamo_grpc.registry.wire import in_range, prefix_end


@pytest.fixture
def events() -> list[pb.Event]:
    return []


@pytest.fixture
def store(events: list[pb.Event]) -> Store:
    return Store(events.extend)


def put(store: Store, key: str, value: str = "v", lease: int = 0) -> None:
    store.put(pb.PutRequest(key=key.encode(), value=value.encode(), lease=lease))


def keys(store: Store, prefix: str = "/") -> list[str]:
    key = prefix.encode()
    return [kv.key.decode() for kv in store.range(pb.RangeRequest(key=key, range_end=prefix_end(key))).kvs]


def test_put_get_delete(store: Store, events: list[pb.Event]) -> None:
    put(store, "/a", "1")
    put(store, "/a", "2")
    (kv,) = store.range(pb.RangeRequest(key=b"/a")).kvs
    assert (kv.value, kv.version, kv.create_revision, kv.mod_revision) == (b"2", 2, 2, 3)
    deleted = store.delete(pb.DeleteRangeRequest(key=b"/a", prev_kv=True))
    assert (deleted.deleted, deleted.prev_kvs[0].value, store.revision) == (1, b"2", 4)
    assert [(e.type, e.kv.mod_revision) for e in events] == [(0, 2), (0, 3), (1, 4)]
    assert store.delete(pb.DeleteRangeRequest(key=b"/a")).deleted == 0
    assert store.revision == 4  # nothing happened


def test_ranges(store: Store) -> None:
    for key in ("/a", "/a/1", "/a/2", "/b"):
        put(store, key)
    assert keys(store, "/a/") == ["/a/1", "/a/2"]
    assert keys(store, "/a") == ["/a", "/a/1", "/a/2"]
    limited = store.range(pb.RangeRequest(key=b"/", range_end=b"0", limit=2))
    assert ([kv.key for kv in limited.kvs], limited.more, limited.count) == ([b"/a", b"/a/1"], True, 4)
    only = store.range(pb.RangeRequest(key=b"/", range_end=b"0", keys_only=True, sort_order=2))
    assert [(kv.key, kv.value) for kv in only.kvs] == [(b"/b", b""), (b"/a/2", b""), (b"/a/1", b""), (b"/a", b"")]
    assert store.range(pb.RangeRequest(key=b"/", range_end=b"0", count_only=True)).count == 4
    assert prefix_end(b"a\xff") == b"b"
    assert prefix_end(b"\xff") == b"\0"
    assert in_range(b"z", b"a", b"\0")
    assert not in_range(b"b", b"a", b"b")


def test_a_lease_takes_its_keys_along(store: Store, events: list[pb.Event]) -> None:
    store.grant(7, 5, now_s=100.0)
    put(store, "/a", lease=7)
    put(store, "/b", lease=7)
    put(store, "/c")
    assert store.expire(104.9) == []
    assert store.keep_alive(7, 104.0) == 5
    assert store.expire(108.9) == []
    events.clear()
    assert store.expire(109.0) == [7]
    assert keys(store) == ["/c"]
    assert len({e.kv.mod_revision for e in events}) == 1  # one revision for all
    assert store.keep_alive(7, 110.0) == 0
    with pytest.raises(StoreError, match="requested lease not found"):
        put(store, "/late", lease=7)


def test_a_put_under_another_lease_moves_the_key(store: Store) -> None:
    store.grant(1, 5, 0.0)
    store.grant(2, 50, 0.0)
    put(store, "/a", lease=1)
    put(store, "/a", lease=2)
    store.revoke(1)
    assert keys(store) == ["/a"]


def create(key: str) -> pb.TxnRequest:
    absent = pb.Compare(key=key.encode(), target=pb.Compare.CREATE, result=pb.Compare.EQUAL, create_revision=0)
    op = pb.RequestOp(request_put=pb.PutRequest(key=key.encode(), value=b"x"))
    get = pb.RequestOp(request_range=pb.RangeRequest(key=key.encode()))
    return pb.TxnRequest(compare=[absent], success=[op], failure=[get])


def test_create_if_absent(store: Store) -> None:
    assert store.txn(create("/a")).succeeded
    second = store.txn(create("/a"))
    assert not second.succeeded
    assert second.responses[0].response_range.kvs[0].value == b"x"


def test_a_transaction_is_all_or_nothing(store: Store) -> None:
    good = pb.RequestOp(request_put=pb.PutRequest(key=b"/a"))
    bad = pb.RequestOp(request_put=pb.PutRequest(key=b"/b", lease=99))
    with pytest.raises(StoreError):
        store.txn(pb.TxnRequest(success=[good, bad]))
    assert keys(store) == []
    store.txn(pb.TxnRequest(success=[good, pb.RequestOp(request_put=pb.PutRequest(key=b"/b"))]))
    assert (keys(store), store.revision) == (["/a", "/b"], 2)


def test_compaction(store: Store) -> None:
    for i in range(5):
        put(store, "/a", str(i))
    assert [e.kv.value for e in store.since(4)] == [b"2", b"3", b"4"]
    store.compact(4)
    assert [e.kv.value for e in store.since(5)] == [b"3", b"4"]
    for revision, text in ((4, "compacted"), (99, "future")):
        with pytest.raises(StoreError, match=text):
            store.compact(revision)
    with pytest.raises(StoreError, match="compacted") as caught:
        store.range(pb.RangeRequest(key=b"/a", revision=3))
    assert caught.value.code is grpc.StatusCode.OUT_OF_RANGE


def test_earlier_revisions_can_be_read(store: Store) -> None:
    def at(revision: int) -> dict[str, str]:
        found = store.range(pb.RangeRequest(key=b"/", range_end=b"0", revision=revision)).kvs
        return {kv.key.decode(): kv.value.decode() for kv in found}

    put(store, "/a", "1")
    put(store, "/b", "1")
    put(store, "/a", "2")
    store.delete(pb.DeleteRangeRequest(key=b"/", range_end=b"0"))
    put(store, "/a", "3")
    states = [{"/a": "1"}, {"/a": "1", "/b": "1"}, {"/a": "2", "/b": "1"}, {}, {"/a": "3"}]
    assert [at(revision) for revision in range(2, 7)] == states
    store.compact(4)
    with pytest.raises(StoreError, match="compacted"):
        at(4)
    assert at(5) == {}
    with pytest.raises(StoreError, match="future"):
        at(9)


def test_only_the_branch_that_is_taken_is_checked(store: Store) -> None:
    compare = [pb.Compare(target=pb.Compare.MOD, key=b"/a", mod_revision=7)]
    failing = [pb.RequestOp(request_put=pb.PutRequest(key=b"/a", lease=99))]
    assert not store.txn(pb.TxnRequest(compare=compare, success=failing)).succeeded
    with pytest.raises(StoreError, match="lease not found"):
        store.txn(pb.TxnRequest(success=failing))


def test_clear_begins_anew(store: Store, events: list[pb.Event]) -> None:
    store.grant(1, 10, 0.0)
    put(store, "/a", lease=1)
    store.clear()
    assert (store.revision, store.leases, keys(store)) == (1, {}, [])
    put(store, "/a")
    assert events[-1].kv.mod_revision == 2
