"""One answer from a model: the relays of its parts, side by side, and what is counted of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from dynamo_frontend.catalog import Model
from dynamo_frontend.pieces import Piece, join
from dynamo_frontend.preprocess import Part, Shown
from dynamo_frontend.record import Record
from dynamo_frontend.relay import Relay
from dynamo_grpc import Context, RouterMode
from dynamo_grpc.v1 import inference_pb2 as pb


class Relays:
    """The relays of one answer, side by side: when one fails, all are given up."""

    def __init__(self, relays: Sequence[Relay]) -> None:
        self._relays = relays

    @property
    def usage(self) -> pb.Usage:
        """Of all."""
        if len(self._relays) == 1:
            return self._relays[0].usage
        total = pb.Usage()
        for relay in self._relays:
            total.completion_tokens += relay.usage.completion_tokens
            if relay.counts_prompt:
                total.prompt_tokens += relay.usage.prompt_tokens
            for name in ("cached_tokens", "reasoning_tokens"):
                if relay.usage.HasField(name):  # type: ignore[arg-type]
                    setattr(total, name, getattr(total, name) + getattr(relay.usage, name))
        return total

    @property
    def usage_so_far(self) -> pb.Usage:
        """Of all, while they run."""
        for relay in self._relays:
            relay.settle()
        return self.usage

    @property
    def has_output(self) -> bool:
        """Whether any of them gave anything."""
        return any(relay.has_output for relay in self._relays)

    @property
    def num_migrations(self) -> int:
        """Of all."""
        return sum(relay.num_migrations for relay in self._relays)

    async def run(self, show: Callable[[list[Piece]], bool], rest: Callable[[], Awaitable[None]]) -> None:
        """As `Relay.run`, for all of them at once."""
        if len(self._relays) == 1:
            await self._relays[0].run(show, rest)
            return
        lock = asyncio.Lock()

        async def rest_alone() -> None:
            async with lock:
                await rest()

        try:
            async with asyncio.TaskGroup() as tasks:
                for relay in self._relays:
                    tasks.create_task(relay.run(show, rest_alone))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None


class Asking:
    """Asks a model for one answer: called, it makes the relays, and again when the answer is begun again. To be entered
    when the prompt is ready; at the end, the tokens of the last relays are counted.

    Attributes:
        made: the last relays.
        on_more: told of each output of the first part that is more than a token.
    """

    def __init__(
        self,
        model: Model,
        parts: Sequence[Part],
        shown: Shown,
        context: Context,
        record: Record,
        mode: RouterMode,
        instance_id: int | None = None,
    ) -> None:
        self._model, self._parts, self._shown, self._context, self._record = model, parts, shown, context, record
        self._mode, self._instance_id = mode, instance_id
        self.made = Relays([])
        self.on_more: Callable[[pb.GenerateResponse], None] | None = None

    def __enter__(self) -> Asking:
        self._record.prompt_is_ready(self._parts)
        for part in self._parts:
            part.message.request_id = self._context.id()
        return self

    def __exit__(self, *error: object) -> None:
        self._record.count(self.made.usage)

    def __call__(self) -> Relays:
        self.made = Relays([self._relay(part) for part in self._parts])
        return self.made

    def _relay(self, part: Part) -> Relay:
        relay = Relay(self._model, part, self._shown, self._context, self._record, self._mode, self._instance_id)
        if part.index == 0:
            relay.on_more = self.on_more
        return relay


async def collect(relay: Relays) -> list[Piece]:
    """All pieces of a request, joined."""
    kept: list[Piece] = []

    def keep(pieces: list[Piece]) -> bool:
        kept.extend(pieces)
        return True

    async def rest() -> None: ...

    await relay.run(keep, rest)
    return join(kept)
