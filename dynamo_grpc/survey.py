"""What the instances in a registry say of themselves: each is asked once, all at the same time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass

import grpc

from dynamo_grpc.connections import CHANNEL_OPTIONS
from dynamo_grpc.records import InstanceRecord, holding, refusal
from dynamo_grpc.v1 import control_pb2, control_pb2_grpc

_MAX_ASKED = 64


@dataclass(frozen=True, slots=True)
class Answer:
    """What a process said of itself.

    Attributes:
        said: unset when it did not answer.
        error: why it did not; empty when it did.
        code: the gRPC code of the failure.
        clock_ahead_s: how far its clock is ahead of ours; None if it doesn't tell its time.
        is_connected: it did not answer, but gRPC's own threads do: its event loop is blocked.
    """

    address: str
    said: control_pb2.DescribeResponse | None = None
    error: str = ""
    code: grpc.StatusCode | None = None
    clock_ahead_s: float | None = None
    is_connected: bool = False

    @property
    def state(self) -> str:
        """starting, ready, draining or stopped, as it says itself; busy or unreachable when it did not answer."""
        if self.said is None:
            return "busy" if self.is_connected else "unreachable"
        return control_pb2.WorkerState.Name(self.said.state).removeprefix("WORKER_STATE_").lower()


@dataclass(frozen=True, slots=True)
class Sighting:
    """An instance in the registry, and what its process says.

    Attributes:
        refused_because: why it gets no traffic though it serves, in a sentence.
    """

    record: InstanceRecord
    answer: Answer
    refused_because: str = ""

    @property
    def state(self) -> str:
        """What it is: ready, starting, draining, stopped, refused, gone (another process has its address), unreachable,
        or busy (its event loop doesn't answer and its connection stands).
        """
        said = self.answer.said
        if said is None:
            # a worker in another language may have no Control: it answers, and that is all we know
            return "ready" if self.answer.code is grpc.StatusCode.UNIMPLEMENTED else self.answer.state
        if all(i.instance_id != self.record.instance.instance_id for i in said.instances):
            return "gone"
        if self.refused_because:
            return "refused"
        return self.answer.state

    @property
    def age_s(self) -> float | None:
        """Seconds since it registered, both by the worker's own clock; None if it doesn't tell its time."""
        said, instance = self.answer.said, self.record.instance
        if said is None or not said.HasField("measured_at") or not instance.HasField("registered_at"):
            return None
        return said.measured_at.ToNanoseconds() / 1e9 - instance.registered_at.ToNanoseconds() / 1e9


async def ask(address: str, timeout_s: float = 2.0) -> Answer:
    """Ask the process at an address for its own view of itself."""
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        started = time.time()
        try:
            said = await control_pb2_grpc.ControlStub(channel).Describe(
                control_pb2.DescribeRequest(), timeout=timeout_s
            )
        except grpc.aio.AioRpcError as error:
            is_connected = channel.get_state() is grpc.ChannelConnectivity.READY
            text = "its event loop is blocked, its connection stands" if is_connected else error.details()
            return Answer(address, error=f"{error.code().name}: {text}", code=error.code(), is_connected=is_connected)
        ahead_s = None
        if said.HasField("measured_at"):
            ahead_s = said.measured_at.ToNanoseconds() / 1e9 - (started + time.time()) / 2
        return Answer(address, said, clock_ahead_s=ahead_s)


async def survey(records: Iterable[InstanceRecord], timeout_s: float = 2.0) -> list[Sighting]:
    """Ask all instances; in order of their keys."""
    listed = sorted(records, key=lambda record: record.key)
    limit = asyncio.Semaphore(_MAX_ASKED)

    async def one(address: str) -> Answer:
        async with limit:
            return await ask(address, timeout_s)

    addresses = sorted({record.instance.address for record in listed})
    answers = dict(zip(addresses, await asyncio.gather(*map(one, addresses)), strict=True))
    held = holding(listed)
    return [Sighting(r, answers[r.instance.address], refusal(r.instance, held)) for r in listed]


def shown_age(age_s: float | None) -> str:
    """An age for people: 42s, 17m, 5h, 3d."""
    if age_s is None:
        return "-"
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if age_s >= 2 * size:
            return f"{age_s / size:.0f}{unit}"
    return f"{max(0.0, age_s):.0f}s"
