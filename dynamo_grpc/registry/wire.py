"""etcd's methods as this project calls and serves them, and its key ranges.

The messages are generated under our package name (two copies of etcd's own package in one process are a hard error);
the method paths carry etcd's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import grpc

from dynamo_grpc.registry import etcd_pb2 as pb

#: Sent with streams: a member that is cut off from the others must say so.
LEADER = (("hasleader", "true"),)


class Method(NamedTuple):
    """One method of etcd's API."""

    service: str
    name: str
    request: Any
    response: Any
    is_stream: bool = False

    @property
    def path(self) -> str:
        """Its path on the wire."""
        return f"/{self.service}/{self.name}"


RANGE = Method("etcdserverpb.KV", "Range", pb.RangeRequest, pb.RangeResponse)
PUT = Method("etcdserverpb.KV", "Put", pb.PutRequest, pb.PutResponse)
DELETE_RANGE = Method("etcdserverpb.KV", "DeleteRange", pb.DeleteRangeRequest, pb.DeleteRangeResponse)
TXN = Method("etcdserverpb.KV", "Txn", pb.TxnRequest, pb.TxnResponse)
COMPACT = Method("etcdserverpb.KV", "Compact", pb.CompactionRequest, pb.CompactionResponse)
WATCH = Method("etcdserverpb.Watch", "Watch", pb.WatchRequest, pb.WatchResponse, is_stream=True)
LEASE_GRANT = Method("etcdserverpb.Lease", "LeaseGrant", pb.LeaseGrantRequest, pb.LeaseGrantResponse)
LEASE_REVOKE = Method("etcdserverpb.Lease", "LeaseRevoke", pb.LeaseRevokeRequest, pb.LeaseRevokeResponse)
LEASE_KEEP_ALIVE = Method(
    "etcdserverpb.Lease", "LeaseKeepAlive", pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse, is_stream=True
)
LEASE_TIME_TO_LIVE = Method(
    "etcdserverpb.Lease", "LeaseTimeToLive", pb.LeaseTimeToLiveRequest, pb.LeaseTimeToLiveResponse
)
LEASE_LEASES = Method("etcdserverpb.Lease", "LeaseLeases", pb.LeaseLeasesRequest, pb.LeaseLeasesResponse)
STATUS = Method("etcdserverpb.Maintenance", "Status", pb.StatusRequest, pb.StatusResponse)
AUTHENTICATE = Method("etcdserverpb.Auth", "Authenticate", pb.AuthenticateRequest, pb.AuthenticateResponse)


def unary(channel: grpc.aio.Channel, method: Method) -> Any:
    """The callable for a unary method."""
    return channel.unary_unary(
        method.path,
        request_serializer=method.request.SerializeToString,
        response_deserializer=method.response.FromString,
    )


def stream(channel: grpc.aio.Channel, method: Method) -> Any:
    """The callable for a method with streams both ways."""
    return channel.stream_stream(
        method.path,
        request_serializer=method.request.SerializeToString,
        response_deserializer=method.response.FromString,
    )


def prefix_end(prefix: bytes) -> bytes:
    """The end of the range of all keys that begin with `prefix`."""
    for index in range(len(prefix) - 1, -1, -1):
        if prefix[index] < 0xFF:
            return prefix[:index] + bytes([prefix[index] + 1])
    return b"\0"


def in_range(key: bytes, start: bytes, end: bytes) -> bool:
    """Whether `key` is in etcd's range: one key without an end, everything from `start` when the end is a zero byte."""
    if not end:
        return key == start
    return key >= start and (end == b"\0" or key < end)


def describe(error: BaseException) -> str:
    """One line for a log."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__


def kind(error: BaseException) -> str:
    """What kind of error it is: two of one kind are told once."""
    return error.code().name if isinstance(error, grpc.aio.AioRpcError) else f"{type(error).__name__} {error}"


_REFUSALS = (
    grpc.StatusCode.INVALID_ARGUMENT,  # a wrong password
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
)


def is_refusal(error: BaseException | None) -> bool:
    """Whether etcd answered, and refused: trying again soon won't help."""
    return isinstance(error, grpc.aio.AioRpcError) and error.code() in _REFUSALS
