"""Which workers are busy by thresholds: what each says of its load, against what an operator set for the model."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict, dataclass

import grpc
from google.protobuf import duration_pb2

from dynamo_grpc.cancelling import is_being_cancelled
from dynamo_grpc.instances import InstanceSet, Live
from dynamo_grpc.v1 import control_pb2

logger = logging.getLogger(__name__)

#: How often a worker tells its load at most, and when it is asked again after it broke off, in seconds.
_INTERVAL_S, _AGAIN_S = 0.1, 1.0


@dataclass(frozen=True, slots=True)
class Thresholds:
    """When a worker of a model is busy; None never makes it so.

    Attributes:
        active_decode_blocks_threshold: share of its KV blocks that are in use, 0 to 1.
        active_prefill_tokens_threshold: prompt tokens that wait for prefill.
        active_requests_threshold: requests that run or wait there, of all its clients.
    """

    active_decode_blocks_threshold: float | None = None
    active_prefill_tokens_threshold: int | None = None
    active_requests_threshold: int | None = None

    @property
    def is_set(self) -> bool:
        """Whether any is."""
        return any(value is not None for value in asdict(self).values())

    def why_busy(self, load: control_pb2.WatchLoadResponse) -> str:
        """Which one a load is over, in a few words; empty if none."""
        share, tokens, requests = (
            self.active_decode_blocks_threshold,
            self.active_prefill_tokens_threshold,
            self.active_requests_threshold,
        )
        if share is not None and load.num_total_blocks and load.num_used_blocks > share * load.num_total_blocks:
            used = f"{load.num_used_blocks} of {load.num_total_blocks} KV blocks in use"
            return f"{used}, over active_decode_blocks_threshold={share:g}"
        if tokens is not None and load.num_prefill_tokens > tokens:
            return f"{load.num_prefill_tokens} tokens wait for prefill, over active_prefill_tokens_threshold={tokens}"
        if requests is not None and load.num_running + load.num_waiting > requests:
            num = load.num_running + load.num_waiting
            return f"{num} requests run or wait there, over active_requests_threshold={requests}"
        return ""


class BusyWatch:
    """Marks the busy ones of a model's instances. Without a threshold nobody is asked."""

    def __init__(self, instances: InstanceSet) -> None:
        self._instances, self._thresholds = instances, Thresholds()
        self._loads: dict[str, control_pb2.WatchLoadResponse] = {}
        self._watching: dict[Live, asyncio.Task[None]] = {}  # one that came back at another address is another one
        self._task: asyncio.Task[None] | None = None

    @property
    def thresholds(self) -> Thresholds:
        """What holds now."""
        return self._thresholds

    def set(self, thresholds: Thresholds) -> None:
        """From now on these hold."""
        self._thresholds = thresholds
        if thresholds.is_set and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._follow(), name="load of workers")
        for live in self._instances.all():
            self._judge(live)

    def _judge(self, live: Live) -> None:
        load = self._loads.get(live.key)
        why = self._thresholds.why_busy(load) if load is not None else ""
        self._instances.mark_busy(live.key, f"worker {live.instance.address} is busy: {why}" if why else "")

    async def _follow(self) -> None:
        while True:
            all_now = self._instances.all()
            for live in [live for live in self._watching if live not in all_now]:
                self._watching.pop(live).cancel()
                self._loads.pop(live.key, None)
            for live in all_now:
                if live not in self._watching:
                    self._watching[live] = asyncio.get_running_loop().create_task(self._watch(live))
            await self._instances.wait_changed()

    async def _watch(self, live: Live) -> None:
        interval = duration_pb2.Duration()
        interval.FromNanoseconds(int(_INTERVAL_S * 1e9))
        while True:
            try:
                call = live.connection.control.WatchLoad(
                    control_pb2.WatchLoadRequest(min_interval=interval), wait_for_ready=True
                )
                async for load in call:
                    self._loads[live.key] = load
                    self._judge(live)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    logger.warning("worker %s doesn't tell its load: no threshold holds there", live.instance.address)
                    return
            except asyncio.CancelledError:  # also raised when the connection was closed
                if is_being_cancelled():
                    raise
            self._loads.pop(live.key, None)
            self._judge(live)
            await asyncio.sleep(_AGAIN_S)

    async def close(self) -> None:
        """Ask nobody any more."""
        tasks = [*self._watching.values(), *((self._task,) if self._task else ())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
