"""The instances a client can use now: what the registry says, whether each one's connection is up, how its answers are.

Three things take an instance out of the choice beside the registry: its connection is down; its answers fail (ejected,
never more than half of all); it is full or busy (left out while others have room).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Set
from dataclasses import dataclass

import grpc

from dynamo_grpc.changes import Changes
from dynamo_grpc.connections import Connection, Connections
from dynamo_grpc.errors import OverloadedError
from dynamo_grpc.records import InstanceRecord, endpoint_of
from dynamo_grpc.registry.view import View
from dynamo_grpc.routing.ejection import TRY_S, Ejections
from dynamo_grpc.v1 import control_pb2, model_card_pb2

logger = logging.getLogger(__name__)

_ANSWER_S = 2.0
_TIMES_ASKED = 2
_MAX_ASKED = 64
#: One that said it is full is asked again after this long, unless a request of ours ends there before; the time
#: doubles while it says so again.
FULL_S, _LONGEST_FULL_S = 0.1, 1.0
#: One that isn't ready is asked again after this long.
_NOT_READY_S = 1.0


def ask_whether_it_serves(connections: Connections) -> Callable[[InstanceRecord], Awaitable[bool]]:
    """How instances are asked that the registry lost: whether they say themselves that they are ready.

    One that is frozen, gone, draining or replaced by another process doesn't say so; one that is busy is asked twice.
    """
    limit = asyncio.Semaphore(_MAX_ASKED)

    async def describe(address: str) -> control_pb2.DescribeResponse | None:
        connection = connections.acquire(address)
        try:
            for _ in range(_TIMES_ASKED):
                try:
                    async with limit:
                        answer: control_pb2.DescribeResponse = await connection.control.Describe(
                            control_pb2.DescribeRequest(), timeout=_ANSWER_S
                        )
                        return answer
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                        return None
            return None
        finally:
            connections.release(connection)

    async def ask(record: InstanceRecord) -> bool:
        wanted, answer = record.instance, await describe(record.instance.address)
        if answer is None:
            return False
        return answer.state == control_pb2.WORKER_STATE_READY and any(
            i.instance_id == wanted.instance_id and endpoint_of(i) == endpoint_of(wanted) for i in answer.instances
        )

    return ask


@dataclass(slots=True, eq=False)
class Live:
    """An instance and the connection to it."""

    key: str
    instance_id: int
    instance: model_card_pb2.Instance
    connection: Connection

    @property
    def num_inflight(self) -> int:
        """Requests this process has running there."""
        return self.connection.num_inflight


@dataclass(slots=True)
class _Full:
    """What an instance said that has no room.

    Attributes:
        until: it is left out until then.
        seconds: for so long.
    """

    until: float
    seconds: float
    message: str
    retry_after_s: float | None


class InstanceSet:
    """A live set of instances.

    Args:
        view: of instances; not owned.
        accepts: which instances belong to the set.
    """

    def __init__(
        self,
        view: View[InstanceRecord],
        connections: Connections,
        accepts: Callable[[model_card_pb2.Instance], bool] = lambda _: True,
    ) -> None:
        self._view, self._connections, self._accepts = view, connections, accepts
        self._live: dict[str, Live] = {}
        self._sorted: list[Live] | None = []
        self._routable: list[Live] | None = None
        self._gone: set[str] = set()
        self._full: dict[str, _Full] = {}
        self._not_ready: dict[str, float] = {}
        self._busy: dict[str, str] = {}
        self._ejections = Ejections()
        self._timers: list[asyncio.TimerHandle] = []
        self._changes = Changes()
        view.subscribe(self._refresh)
        connections.subscribe(self._on_connection)

    def _on_connection(self) -> None:
        self._routable = None
        self._changes.tell()

    def _refresh(self, changed: Set[str]) -> None:
        """Take over what changed in the view."""
        has_changed = False
        for key in changed:
            record = self._view.records.get(key)
            has_changed |= self._put(record) if record and self._accepts(record.instance) else self._drop(key)
        if has_changed:
            self._sorted = None
        self._routable = None
        self._changes.tell()

    def _put(self, record: InstanceRecord) -> bool:
        self._gone.discard(record.key)
        live = self._live.get(record.key)
        if live is not None and live.instance.address == record.instance.address:
            live.instance = record.instance
            return False
        connection = self._connections.acquire(record.instance.address)
        self._drop(record.key)
        self._live[record.key] = Live(record.key, record.instance.instance_id, record.instance, connection)
        return True

    def _drop(self, key: str) -> bool:
        live = self._live.pop(key, None)
        self._gone.discard(key)
        self._full.pop(key, None)
        self._not_ready.pop(key, None)
        self._busy.pop(key, None)
        self._ejections.forget(key)
        if live is not None:
            self._connections.release(live.connection)
        return live is not None

    def all(self) -> list[Live]:
        """All that the registry lists, in order of their ids."""
        if self._sorted is None:
            self._sorted = sorted(self._live.values(), key=lambda live: live.instance_id)
        return self._sorted

    def routable(self, excluded: frozenset[int] = frozenset()) -> list[Live]:
        """Those that can be called now, without the excluded ones, in order of their ids; don't change the list."""
        if self._routable is None:
            up = [live for live in self.all() if live.connection.is_up and live.key not in self._gone]
            # With nobody else left, one whose answers fail is better than none
            self._routable = [live for live in up if not self._ejections.is_out(live.key)] or up
        if not excluded:
            return self._routable
        return [live for live in self._routable if live.instance_id not in excluded]

    def mark_gone(self, instance_id: int) -> None:
        """Another process answers at its address: leave it out until it registers again."""
        self._gone |= {live.key for live in self.all() if live.instance_id == instance_id}
        self._routable = None

    # -- how its answers are ------------------------------------------------------------------------------------------

    def chosen(self, live: Live) -> bool:
        """It is given a request; True if that is the one that tries whether it works again."""
        if self._ejections and self._ejections.chosen(live.key):
            self._on_connection()
            self._look_again(TRY_S)
            return True
        return False

    def answered(self, live: Live) -> None:
        """It gave a request's first output."""
        if self._ejections and self._ejections.answered(live.key):
            logger.info("instance %016x at %s answers again", live.instance_id, live.instance.address)
            self._on_connection()

    def ended(self, live: Live, *, is_well: bool | None, was_try: bool = False, was_refused: bool = False) -> None:
        """A request ended there: it has room again, unless it was refused.

        Args:
            is_well: how it ended; None is no verdict: it was left, or refused for a good reason.
            was_try: what `chosen` gave for it.
            was_refused: it never ran there.
        """
        had_no_room = not was_refused and self._full.pop(live.key, None) is not None
        if is_well is False:
            self._failed(live)
        elif self._ejections and (
            self._ejections.succeeded(live.key) if is_well else was_try and self._ejections.left(live.key)
        ):
            self._on_connection()
        elif had_no_room:
            self._changes.tell()

    def _failed(self, live: Live) -> None:
        if live.key not in self._live:
            return
        if (seconds := self._ejections.failed(live.key, len(self._live))) is not None:
            name, address = f"{live.instance_id:016x}", live.instance.address
            logger.warning("instance %s at %s is left out for %g s: its answers fail", name, address, seconds)
            self._on_connection()
            self._look_again(seconds)

    def _look_again(self, seconds: float) -> None:
        """When an ejection, or a try, is over."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._timers = [timer for timer in self._timers if not timer.cancelled() and timer.when() > now]
        self._timers.append(loop.call_later(seconds + 0.01, self._on_connection))  # (uvloop's come up to 1 ms early)

    def mark_full(self, live: Live, error: OverloadedError) -> None:
        """It refused a request because it has no room."""
        now, before = time.monotonic(), self._full.get(live.key)
        if live.key not in self._live or (before is not None and now < before.until):
            return  # (several were on their way)
        seconds = FULL_S if before is None else min(before.seconds * 2, _LONGEST_FULL_S)
        self._full[live.key] = _Full(now + seconds, seconds, error.message, error.retry_after_s)

    def mark_not_ready(self, live: Live) -> None:
        """It takes no requests for now: others first."""
        if live.key in self._live:
            self._not_ready[live.key] = time.monotonic() + _NOT_READY_S

    def mark_busy(self, key: str, why: str) -> None:
        """It is busy by a threshold of ours, in a few words; empty when it no longer is."""
        if why and key in self._live:
            self._busy[key] = why
        elif self._busy.pop(key, None):
            self._changes.tell()

    def with_room(self, candidates: list[Live], *, ignores_thresholds: bool = False) -> list[Live]:
        """Those of them that aren't known to be full, busy or not ready.

        Args:
            ignores_thresholds: for an answer that has begun.

        Raises:
            OverloadedError: none is left; says whose limit it is, and when to come back.
        """
        if not self._full and not self._busy and not self._not_ready:
            return candidates
        now = time.monotonic()
        for key in [key for key, until in self._not_ready.items() if until <= now]:
            del self._not_ready[key]
        for key in [key for key, full in self._full.items() if full.until + full.seconds <= now]:
            del self._full[key]  # (a while later: until then the next mark is longer)
        full = {live.key: mark for live in candidates if (mark := self._full.get(live.key)) and mark.until > now}
        busy = {} if ignores_thresholds else self._busy
        free = [live for live in candidates if live.key not in full and live.key not in busy]
        ready = [live for live in free if live.key not in self._not_ready]
        if ready or free or not candidates:
            return ready or free
        if full:
            first = min(full.values(), key=lambda mark: mark.retry_after_s or 0.0)
            raise OverloadedError(_of_all(len(candidates), first.message), retry_after_s=first.retry_after_s)
        raise OverloadedError(_of_all(len(candidates), busy[candidates[0].key]), retry_after_s=1.0)

    def why_not(self, live: Live) -> str:
        """Why it would not be chosen now, in a few words; empty when it could be."""
        now, key = time.monotonic(), live.key
        if not live.connection.is_up:
            return "its connection is down"
        if key in self._gone:
            return "it drains, or another process has its address"
        if live not in self.routable():
            return "its answers failed: it is left out for a while"
        if (full := self._full.get(key)) is not None and full.until > now:
            return f"it is full: {full.message}"
        if self._not_ready.get(key, 0.0) > now:
            return "it said that it is not ready"
        return self._busy.get(key, "")

    def get(self, instance_id: int) -> Live | None:
        """One by its id."""
        return next((live for live in self.all() if live.instance_id == instance_id), None)

    def is_listed(self, live: Live) -> bool:
        """Whether the registry lists it; else it is kept because it says itself that it serves."""
        return live.key not in self._view.doubted

    async def wait_changed(self) -> None:
        """Return at the next change."""
        await self._changes.wait()

    def close(self) -> None:
        """Let go of the connections."""
        for timer in self._timers:
            timer.cancel()
        self._view.unsubscribe(self._refresh)
        self._connections.unsubscribe(self._on_connection)
        for key in list(self._live):
            self._drop(key)
        self._sorted = self._routable = None
        self._changes.tell()


def _of_all(num: int, text: str) -> str:
    return text if num == 1 else f"none of {num} workers has room; {text}"
