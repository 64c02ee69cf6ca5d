"""The worker that is judged: what it says of itself, requests that suit it, and what comes of a call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dynamo_grpc.cancelling import is_being_cancelled
from dynamo_grpc.conformance.rule import Broken, NotSeen
from dynamo_grpc.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc, model_card_pb2
from dynamo_grpc.validation import makes_vectors_alone

#: Calls that should end by themselves may take so long.
CALL_S = 30.0
#: How long a worker may go on after a cancel or a deadline.
END_S = 1.0
#: Tokens of a prompt, and of an answer, that a worker is busy with for a while.
_MOST_TOKENS = 4_000
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.max_send_message_length", 64 * 2**20),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
)

Request = inference_pb2.PreprocessedRequest


@dataclass(slots=True)
class Seen:
    """What came of one Generate call.

    Attributes:
        code: its status.
        details: what grpc-status-details-bin holds, if it is there.
        took_s: until its end.
    """

    outputs: list[inference_pb2.GenerateResponse] = field(default_factory=list)
    code: grpc.StatusCode = grpc.StatusCode.OK
    message: str = ""
    details: status_pb2.Status | None = None
    trailers: dict[str, Any] = field(default_factory=dict)
    took_s: float = 0.0

    @property
    def status(self) -> str:
        """The status in words."""
        return f"{self.code.name}: {self.message}" if self.message else self.code.name

    def tokens(self, choice: int = 0) -> list[int]:
        """The token ids of a choice."""
        return [t for output in self.outputs for d in output.choices if d.index == choice for t in d.token_ids]

    def text(self, choice: int = 0) -> str:
        """The text of a choice."""
        return "".join(d.text for output in self.outputs for d in output.choices if d.index == choice)

    def finishes(self, choice: int = 0) -> list[inference_pb2.FinishInfo]:
        """How a choice ended; one entry, if the worker does as it should."""
        deltas = (d for output in self.outputs for d in output.choices if d.index == choice)
        return [d.finish for d in deltas if d.HasField("finish")]

    @property
    def usages(self) -> list[inference_pb2.Usage]:
        """The usages that were told."""
        return [output.usage for output in self.outputs if output.HasField("usage")]

    def reason(self) -> str:
        """Of ErrorInfo; empty without one."""
        info = self.detail(error_details_pb2.ErrorInfo())
        return info.reason if info is not None else ""

    def detail(self, wanted: Any) -> Any:
        """The first detail of a kind, unpacked into `wanted`; None if there is none."""
        packed = self.details.details if self.details is not None else ()
        return next((wanted for detail in packed if detail.Unpack(wanted)), None)

    def need_ok(self) -> Seen:
        """Itself, if the call succeeded.

        Raises:
            Broken: it didn't.
        """
        if self.code is not grpc.StatusCode.OK:
            raise Broken(f"a plain request ended with {self.status}")
        return self

    def need(self, code: grpc.StatusCode, what: str, reason: str = "") -> None:
        """See that the call ended with an error.

        Args:
            reason: that its ErrorInfo must have, if it has one; another rule wants that.

        Raises:
            Broken: it didn't, or with another one.
        """
        if self.code is not code:
            raise Broken(f"{what}: {self.status}" + (f" after {len(self.outputs)} outputs" if self.outputs else ""))
        if reason and self.reason() not in ("", reason):
            raise Broken(f"{what}: {self.status}, and its reason is {self.reason()}, not {reason}")


class Target:
    """The worker.

    Args:
        model: the one to ask for; empty is the first that it describes.
        pid: its process, if it may be ended by SIGTERM.

    Attributes:
        card: of the model; an empty one if the worker doesn't describe itself.
        flooded: what came of many streams at once, once that was tried.
        quick_s: how long its longest answer takes, if that is too short to be interrupted; None before it was tried.
    """

    def __init__(self, address: str, model: str = "", pid: int | None = None) -> None:
        self.address, self.model, self.pid = address, model, pid
        self.channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self.inference: Any = inference_pb2_grpc.InferenceStub(self.channel)
        self.control: Any = control_pb2_grpc.ControlStub(self.channel)
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)
        self.flooded: list[Seen] = []
        self.quick_s: float | None = None
        self.card = model_card_pb2.ModelCard(name=model, model_input=model_card_pb2.MODEL_INPUT_TOKENS)

    async def connect(self) -> None:
        """Read what it says of itself.

        Raises:
            Broken: nobody answers there, or it doesn't serve the model.
        """
        try:
            async with asyncio.timeout(10.0):
                await self._until_connected()
            cards = (await self.control.Describe(control_pb2.DescribeRequest(), timeout=10.0)).cards
        except TimeoutError:
            raise Broken(f"nobody answers gRPC at {self.address}") from None
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return  # the rule about it says so
            raise Broken(f"Control.Describe ended with {error.code().name}: {error.details()}") from None
        found = [card for card in cards if not self.model or self.model in (card.name, *card.aliases)]
        if not found and cards:
            raise Broken(f"{self.address} serves no model {self.model!r}: it serves {[c.name for c in cards]}")
        if found:
            self.card, self.model = found[0], self.model or found[0].name

    async def _until_connected(self) -> None:
        state = self.channel.get_state(try_to_connect=True)
        while state is not grpc.ChannelConnectivity.READY:
            await self.channel.wait_for_state_change(state)
            state = self.channel.get_state()
            if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                raise TimeoutError

    @property
    def takes_text(self) -> bool:
        """Whether prompts are text."""
        return self.card.model_input == model_card_pb2.MODEL_INPUT_TEXT

    @property
    def makes_vectors_alone(self) -> bool:
        """Whether it generates nothing."""
        return makes_vectors_alone(self.card)

    @property
    def room(self) -> int:
        """Tokens of a long prompt, and of a long answer to it."""
        return max(1, min(_MOST_TOKENS, (self.card.context_length or 2 * _MOST_TOKENS) // 2 - 8))

    def prompt(self, num_tokens: int, request: Request | None = None) -> Request:
        """A request with a prompt of so many tokens, or about so many words."""
        request = request or Request(model=self.model)
        if self.takes_text:
            request.text = "word " * num_tokens
        else:
            highest = min(self.card.vocab_size or 100, 2**31)
            special = {*self.card.eos_token_ids, self.card.bos_token_id}
            usable = [token for token in range(min(highest, 200)) if token not in special] or [0]
            request.token_ids.extend(usable[i % len(usable)] for i in range(7, 7 + num_tokens))
        return request

    def ask(self, max_tokens: int = 8, num_prompt: int = 12) -> Request:
        """A request that has the same answer each time, and that doesn't end before `max_tokens` if it can help it."""
        request = self.prompt(num_prompt)
        request.stop_conditions.max_tokens = max_tokens
        request.stop_conditions.ignore_eos = True
        request.sampling_options.temperature = 0.0
        request.sampling_options.seed = 7
        return request

    def ask_long(self) -> Request:
        """A request that keeps the worker busy."""
        return self.ask(self.room, self.room)

    async def read(
        self, request: Request, *, timeout_s: float = CALL_S, metadata: Sequence[tuple[str, str]] = ()
    ) -> Seen:
        """Send a request, and read its stream to the end."""
        return await self.finish(self.inference.Generate(request, timeout=timeout_s, metadata=tuple(metadata)))

    async def finish(self, call: Any, seen: Seen | None = None) -> Seen:
        """Read a call to its end, with what was seen of it before."""
        seen, started = seen or Seen(), time.monotonic()
        try:
            while (output := await call.read()) is not grpc.aio.EOF:
                seen.outputs.append(output)
        except grpc.aio.AioRpcError:
            pass  # its status says it
        except asyncio.CancelledError:
            if is_being_cancelled():
                raise  # else it was the call
        seen.took_s = time.monotonic() - started
        seen.code, seen.message = await call.code(), await call.details() or ""
        seen.trailers = dict(tuple(await call.trailing_metadata() or ()))
        if packed := seen.trailers.get("grpc-status-details-bin"):
            try:
                seen.details = status_pb2.Status.FromString(packed)
            except DecodeError:
                raise Broken("the trailer grpc-status-details-bin is no google.rpc.Status") from None
        return seen

    async def num_requests(self) -> int:
        """How many run, as the worker says.

        Raises:
            NotSeen: it doesn't say.
        """
        try:
            described = await self.control.Describe(control_pb2.DescribeRequest(), timeout=5.0)
        except grpc.aio.AioRpcError as error:
            raise NotSeen(f"Control.Describe, which tells what runs, ended with {error.code().name}") from None
        return int(described.num_requests)

    async def until_idle(self, what: str) -> None:
        """Wait until nothing runs.

        Raises:
            Broken: something still does after END_S.
        """
        if num := await self.wait_idle(END_S):
            raise Broken(f"{num} requests still run {END_S:g} s after {what}")

    async def wait_idle(self, limit_s: float) -> int:
        """Wait until nothing runs; gives how many still do at the limit."""
        end = time.monotonic() + limit_s
        while (num := await self.num_requests()) and time.monotonic() <= end:  # noqa: ASYNC110 - it is asked over the wire
            await asyncio.sleep(0.01)
        return num

    async def serves(self, service: str = "") -> str:
        """What its health service says of a service."""
        try:
            answer = await self.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5.0)
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
