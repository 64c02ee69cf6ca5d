"""The key-value store behind the embedded registry: revisions, history, leases. Pure; time is an argument."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import grpc

from dynamo_grpc.registry import etcd_pb2 as pb
from dynamo_grpc.registry.wire import in_range

_R = TypeVar("_R")

#: Events kept for watches that resume; older ones are compacted away.
HISTORY = 10_000


class StoreError(Exception):
    """A request that etcd would refuse, with the code and words it would use."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


def _lease_not_found() -> StoreError:
    return StoreError(grpc.StatusCode.NOT_FOUND, "etcdserver: requested lease not found")


@dataclass(slots=True)
class Lease:
    """Keys that go when it ends."""

    id: int
    ttl_s: int
    expires: float
    keys: set[bytes] = field(default_factory=set)


class Store:
    """Keys by revision. Every change is appended to `events` and told to `on_events`."""

    def __init__(self, on_events: Callable[[list[pb.Event]], None]) -> None:
        self._on_events = on_events
        self.clear()

    def clear(self) -> None:
        """Begin anew, without keys, leases and history."""
        self.revision = 1
        self.compacted = 0
        self.events: list[pb.Event] = []
        self.leases: dict[int, Lease] = {}
        self._kvs: dict[bytes, pb.KeyValue] = {}

    # -- keys -------------------------------------------------------------------------------------------------------

    def range(self, request: pb.RangeRequest) -> pb.RangeResponse:
        """Read keys, as they are or as they were at an earlier revision."""
        if request.revision and request.revision <= self.compacted:
            raise StoreError(grpc.StatusCode.OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted")
        if request.revision > self.revision:
            raise StoreError(grpc.StatusCode.OUT_OF_RANGE, "etcdserver: mvcc: required revision is a future revision")
        kvs = self._at(request.revision) if 0 < request.revision < self.revision else self._kvs
        found = sorted(_in_range(kvs, request.key, request.range_end), key=lambda kv: kv.key)
        response = pb.RangeResponse(count=len(found))
        found = [kv for kv in found if _passes(kv, request)]
        if request.sort_order or request.sort_target:
            names = ("key", "version", "create_revision", "mod_revision", "value")
            name = names[request.sort_target]
            found.sort(key=lambda kv: getattr(kv, name), reverse=request.sort_order == pb.RangeRequest.DESCEND)
        if request.limit and len(found) > request.limit:
            found, response.more = found[: request.limit], True
        for kv in () if request.count_only else found:
            added = response.kvs.add()
            added.CopyFrom(kv)
            if request.keys_only:
                added.ClearField("value")
        return response

    def put(self, request: pb.PutRequest) -> pb.PutResponse:
        """Write one key, as a revision of its own."""
        return self._in_revision(lambda events: self._put(request, events))

    def delete(self, request: pb.DeleteRangeRequest) -> pb.DeleteRangeResponse:
        """Delete keys, as one revision."""
        return self._in_revision(lambda events: self._delete(request, events))

    def txn(self, request: pb.TxnRequest) -> pb.TxnResponse:
        """Compare, then read and write, as one revision."""
        self._check_txn(request)
        return self._in_revision(lambda events: self._txn(request, events))

    def compact(self, revision: int) -> None:
        """Forget the history up to `revision`."""
        if revision <= self.compacted:
            raise StoreError(grpc.StatusCode.OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted")
        if revision > self.revision:
            raise StoreError(grpc.StatusCode.OUT_OF_RANGE, "etcdserver: mvcc: required revision is a future revision")
        self.compacted = revision
        self.events = [event for event in self.events if event.kv.mod_revision > revision]

    def since(self, revision: int) -> list[pb.Event]:
        """Events of `revision` and later, oldest first."""
        start = bisect.bisect_left(self.events, revision, key=lambda event: event.kv.mod_revision)
        return self.events[start:]

    # -- leases -----------------------------------------------------------------------------------------------------

    def grant(self, lease_id: int, ttl_s: int, now_s: float) -> Lease:
        """A new lease of `ttl_s` seconds."""
        if lease_id in self.leases:
            raise StoreError(grpc.StatusCode.FAILED_PRECONDITION, "etcdserver: lease already exists")
        lease = self.leases[lease_id] = Lease(lease_id, max(1, ttl_s), now_s + max(1, ttl_s))
        return lease

    def keep_alive(self, lease_id: int, now_s: float) -> int:
        """Renew a lease; returns its time to live, 0 when it is gone."""
        if not (lease := self.leases.get(lease_id)):
            return 0
        lease.expires = now_s + lease.ttl_s
        return lease.ttl_s

    def revoke(self, lease_id: int) -> None:
        """End a lease and delete its keys, as one revision."""
        if not (lease := self.leases.get(lease_id)):
            raise _lease_not_found()

        def delete(events: list[pb.Event]) -> None:
            for key in sorted(lease.keys):
                self._delete(pb.DeleteRangeRequest(key=key), events)

        self._in_revision(delete)
        del self.leases[lease_id]

    def expire(self, now_s: float) -> list[int]:
        """End the leases whose time is over; returns their ids."""
        over = [lease.id for lease in self.leases.values() if lease.expires <= now_s]
        for lease_id in over:
            self.revoke(lease_id)
        return over

    def lease(self, lease_id: int) -> Lease:
        """A lease by its id."""
        if not (lease := self.leases.get(lease_id)):
            raise _lease_not_found()
        return lease

    # -- inside one revision ----------------------------------------------------------------------------------------

    def _in_revision(self, work: Callable[[list[pb.Event]], _R]) -> _R:
        events: list[pb.Event] = []
        result = work(events)
        if events:
            self.revision += 1
            self.events.extend(events)
            if len(self.events) > 2 * HISTORY:
                self.compact(self.events[-HISTORY].kv.mod_revision - 1)
            self._on_events(events)
        return result

    def _at(self, revision: int) -> dict[bytes, pb.KeyValue]:
        """The keys as they were: the events since then, taken back."""
        kvs = dict(self._kvs)
        for event in reversed(self.since(revision + 1)):
            if event.HasField("prev_kv"):
                kvs[event.kv.key] = event.prev_kv
            else:
                del kvs[event.kv.key]
        return kvs

    def _put(self, request: pb.PutRequest, events: list[pb.Event]) -> pb.PutResponse:
        if not request.key:
            raise StoreError(grpc.StatusCode.INVALID_ARGUMENT, "etcdserver: key is not provided")
        old = self._kvs.get(request.key)
        if (request.ignore_value or request.ignore_lease) and old is None:
            raise StoreError(grpc.StatusCode.INVALID_ARGUMENT, "etcdserver: key not found")
        lease_id = old.lease if request.ignore_lease and old else request.lease
        if lease_id and lease_id not in self.leases:
            raise _lease_not_found()
        kv = pb.KeyValue(
            key=request.key,
            value=old.value if request.ignore_value and old else request.value,
            create_revision=old.create_revision if old else self.revision + 1,
            mod_revision=self.revision + 1,
            version=old.version + 1 if old else 1,
            lease=lease_id,
        )
        if old and old.lease in self.leases:
            self.leases[old.lease].keys.discard(kv.key)
        if lease_id:
            self.leases[lease_id].keys.add(kv.key)
        self._kvs[kv.key] = kv
        events.append(pb.Event(type=pb.Event.PUT, kv=kv, prev_kv=old))
        return pb.PutResponse(prev_kv=old if request.prev_kv else None)

    def _delete(self, request: pb.DeleteRangeRequest, events: list[pb.Event]) -> pb.DeleteRangeResponse:
        gone = _in_range(self._kvs, request.key, request.range_end)
        for kv in gone:
            del self._kvs[kv.key]
            if kv.lease in self.leases:
                self.leases[kv.lease].keys.discard(kv.key)
            deleted = pb.KeyValue(key=kv.key, mod_revision=self.revision + 1)
            events.append(pb.Event(type=pb.Event.DELETE, kv=deleted, prev_kv=kv))
        return pb.DeleteRangeResponse(deleted=len(gone), prev_kvs=gone if request.prev_kv else ())

    def _check_txn(self, request: pb.TxnRequest) -> None:
        # Everything that can be refused is refused before the first write: a transaction is all or nothing.
        if any(compare.range_end for compare in request.compare):
            raise StoreError(grpc.StatusCode.UNIMPLEMENTED, "the embedded registry compares single keys only")
        for op in request.success if self._all_hold(request) else request.failure:
            match op.WhichOneof("request"):
                case "request_put" if op.request_put.lease and op.request_put.lease not in self.leases:
                    raise _lease_not_found()
                case "request_put" if not op.request_put.key:
                    raise StoreError(grpc.StatusCode.INVALID_ARGUMENT, "etcdserver: key is not provided")
                case "request_put" if op.request_put.ignore_value or op.request_put.ignore_lease:
                    raise StoreError(
                        grpc.StatusCode.UNIMPLEMENTED, "the embedded registry has no ignore_value in a transaction"
                    )
                case "request_range":
                    self.range(op.request_range)
                case "request_txn":
                    self._check_txn(op.request_txn)
        keys = [op.request_put.key for op in request.success if op.HasField("request_put")]
        if len(keys) != len(set(keys)):
            raise StoreError(grpc.StatusCode.INVALID_ARGUMENT, "etcdserver: duplicate key given in txn request")

    def _txn(self, request: pb.TxnRequest, events: list[pb.Event]) -> pb.TxnResponse:
        response = pb.TxnResponse(succeeded=self._all_hold(request))
        for op in request.success if response.succeeded else request.failure:
            result = response.responses.add()
            match op.WhichOneof("request"):
                case "request_range":
                    result.response_range.CopyFrom(self.range(op.request_range))
                case "request_put":
                    result.response_put.CopyFrom(self._put(op.request_put, events))
                case "request_delete_range":
                    result.response_delete_range.CopyFrom(self._delete(op.request_delete_range, events))
                case "request_txn":
                    result.response_txn.CopyFrom(self._txn(op.request_txn, events))
        return response

    def _all_hold(self, request: pb.TxnRequest) -> bool:
        return all(self._holds(compare) for compare in request.compare)

    def _holds(self, compare: pb.Compare) -> bool:
        kv = self._kvs.get(compare.key, pb.KeyValue())
        name = ("version", "create_revision", "mod_revision", "value", "lease")[compare.target]
        if name == "value" and not kv.key:
            return False
        actual, wanted = getattr(kv, name), getattr(compare, name)
        match compare.result:
            case pb.Compare.EQUAL:
                return bool(actual == wanted)
            case pb.Compare.GREATER:
                return bool(actual > wanted)
            case pb.Compare.LESS:
                return bool(actual < wanted)
            case _:
                return bool(actual != wanted)


def _in_range(kvs: Mapping[bytes, pb.KeyValue], key: bytes, end: bytes) -> list[pb.KeyValue]:
    if not end:
        return [kvs[key]] if key in kvs else []
    return [kv for name, kv in kvs.items() if in_range(name, key, end)]


def _passes(kv: pb.KeyValue, request: pb.RangeRequest) -> bool:
    return (
        kv.mod_revision >= request.min_mod_revision
        and kv.create_revision >= request.min_create_revision
        and (not request.max_mod_revision or kv.mod_revision <= request.max_mod_revision)
        and (not request.max_create_revision or kv.create_revision <= request.max_create_revision)
    )
