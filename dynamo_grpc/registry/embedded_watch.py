"""One watched range of the embedded registry: which events it gets, and how many may wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dynamo_grpc.registry import etcd_pb2 as pb
from dynamo_grpc.registry import wire

_MAX_PENDING = 10_000


class Watch:
    """One watched range of one Watch call."""

    def __init__(
        self,
        watch_id: int,
        request: pb.WatchCreateRequest,
        header: Callable[[], pb.ResponseHeader],
        responses: asyncio.Queue[pb.WatchResponse | None],
    ) -> None:
        self._id, self._request, self._header, self._responses = watch_id, request, header, responses
        self.is_lagging = False
        self._dropped = {
            {pb.WatchCreateRequest.NOPUT: pb.Event.PUT, pb.WatchCreateRequest.NODELETE: pb.Event.DELETE}[f]
            for f in request.filters
        }

    def offer(self, events: list[pb.Event]) -> None:
        """Queue those of `events` that belong to the range; a watcher that doesn't read gets no more."""
        self.is_lagging = self.is_lagging or self._responses.qsize() > _MAX_PENDING
        if self.is_lagging:
            return
        mine = [event for event in events if in_watch(event, self._request) and event.type not in self._dropped]
        if not mine:
            return
        response = pb.WatchResponse(header=self._header(), watch_id=self._id, events=mine)
        if not self._request.prev_kv:
            for event in response.events:
                event.ClearField("prev_kv")
        self._responses.put_nowait(response)


def in_watch(event: pb.Event, request: pb.WatchCreateRequest) -> bool:
    """Whether an event is in the watched range and not before its start."""
    return wire.in_range(event.kv.key, request.key, request.range_end) and (
        event.kv.mod_revision >= request.start_revision
    )
