"""One request on its way through the mesh: outputs in, pieces of text out."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from dynamo_frontend.catalog import Model
from dynamo_frontend.postprocess import ChoiceText, Detokenizer
from dynamo_frontend.preprocess import stop_strings
from dynamo_frontend.record import Record
from dynamo_frontend.schemas import Sampling
from dynamo_grpc import Context, HandlerEndedError, RouterMode
from dynamo_grpc.v1 import inference_pb2 as pb

_REASONS = {
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_TOOL_CALLS: "tool_calls",
    pb.FINISH_REASON_CONTENT_FILTER: "content_filter",
}
#: Prompt tokens that a detokenizer is seeded with.
_TAIL = 8


@dataclass(slots=True)
class Piece:
    """What is new in one choice, ready to be shown.

    Attributes:
        token_ids: the tokens of the piece; may be more or fewer than `text` shows (half characters, stop strings).
        finish: OpenAI's finish reason, in a choice's last piece.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: pb.Logprobs | None
    finish: str | None


class Relay:
    """Sends a prepared request and turns its outputs into pieces.

    Attributes:
        usage: prompt and completion tokens; final when `pieces` has ended.
    """

    def __init__(
        self,
        model: Model,
        request: Sampling,
        message: pb.PreprocessedRequest,
        context: Context,
        record: Record,
        mode: RouterMode,
        instance_id: int | None,
    ) -> None:
        self._model, self._message, self._context, self._record = model, message, context, record
        self._mode, self._instance_id = mode, instance_id
        self._options = request
        self._stops = stop_strings(request)
        self._num_choices = max(1, message.sampling_options.n)
        self._choices: dict[int, ChoiceText] = {}
        self._finished: set[int] = set()
        self._num_counted = 0
        self.usage = pb.Usage(prompt_tokens=len(message.token_ids))
        record.prompt_tokens = len(message.token_ids)

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """The pieces of all outputs that are there, in order.

        Raises:
            HandlerEndedError: the worker's stream ended before every choice had.
            Other errors of the mesh, as the worker gave them.
        """
        router = self._model.router
        async with router.generate(self._message, self._context, self._mode, self._instance_id) as stream:
            self._record.instance = stream.instance.instance_id
            while responses := await stream.take():
                self._record.output()
                self._record.instance = stream.instance.instance_id
                pieces = []
                for response in responses:
                    pieces += [piece for delta in response.choices if (piece := self._piece(delta))]
                    if response.HasField("usage"):
                        self._count(response.usage)
                if pieces:
                    yield pieces
                if self._stops and len(self._finished) == self._num_choices:
                    return  # a stop string ended it before the worker did: leaving tells it so
        if len(self._finished) < self._num_choices:
            raise HandlerEndedError("the worker's stream ended without a finish reason")

    def _choice(self, index: int) -> ChoiceText:
        if index not in self._choices:
            assert self._model.preparation is not None
            tokenizer = self._model.preparation.tokenizer
            detokenizer = None
            if tokenizer is not None:
                tail = self._message.token_ids[-_TAIL:]
                detokenizer = Detokenizer(tokenizer, tail, skip_special_tokens=self._options.skip_special_tokens)
            self._choices[index] = ChoiceText(
                detokenizer,
                self._stops,
                keep_stop=bool(self._options.include_stop_str_in_output),
                min_tokens=self._options.min_tokens or 0,
            )
        return self._choices[index]

    def _piece(self, delta: pb.ChoiceDelta) -> Piece | None:
        if delta.index in self._finished:
            return None
        choice = self._choice(delta.index)
        token_ids: Sequence[int] = delta.token_ids
        logprobs = delta.logprobs if delta.HasField("logprobs") else None
        if delta.HasField("text") or not choice.has_detokenizer:
            text = choice.feed_text(delta.text)
        else:
            text, count = choice.feed_tokens(token_ids)
            if count < len(token_ids):
                token_ids = token_ids[:count]
        self._num_counted += len(token_ids)
        self._record.output_tokens = self.usage.completion_tokens = self._num_counted
        finish = None
        if choice.stop is not None:
            finish = "stop"
        elif delta.HasField("finish"):
            text += choice.end()
            finish = "stop" if choice.stop is not None else _REASONS.get(delta.finish.reason, "stop")
        if finish:
            self._finished.add(delta.index)
            self._record.finish = finish
        return Piece(delta.index, text, token_ids, logprobs, finish)

    def _count(self, usage: pb.Usage) -> None:
        """Take the worker's counts, except for those that we could make ourselves."""
        if self._message.token_ids:
            usage.prompt_tokens = len(self._message.token_ids)
        if self._num_counted:
            usage.completion_tokens = self._num_counted
        self.usage.CopyFrom(usage)
        self._record.prompt_tokens, self._record.output_tokens = usage.prompt_tokens, usage.completion_tokens


async def collect(relay: Relay) -> dict[int, Piece]:
    """All pieces of a request, one for each choice."""
    parts: dict[int, list[Piece]] = {}
    async with contextlib.aclosing(relay.pieces()) as batches:  # type: ignore[type-var]
        async for pieces in batches:
            for piece in pieces:
                parts.setdefault(piece.index, []).append(piece)
    return {index: _join(parts[index]) for index in sorted(parts)}


def _join(pieces: list[Piece]) -> Piece:
    logprobs = None
    if pieces[0].logprobs is not None:
        logprobs = pb.Logprobs()
        for piece in pieces:
            if piece.logprobs is not None:
                logprobs.MergeFrom(piece.logprobs)
    token_ids = [token_id for piece in pieces for token_id in piece.token_ids]
    return Piece(pieces[0].index, "".join(p.text for p in pieces), token_ids, logprobs, pieces[-1].finish)
