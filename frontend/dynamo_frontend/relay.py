"""One request on its way through the mesh: outputs in, pieces of text out."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from dynamo_frontend.catalog import Model
from dynamo_frontend.parsers.said import Arguments, Call, Said, Text
from dynamo_frontend.pieces import Piece, said_by
from dynamo_frontend.postprocess import ChoiceText, Detokenizer, ReadText
from dynamo_frontend.preprocess import Part, Shown
from dynamo_frontend.record import Record
from dynamo_grpc import Context, HandlerEndedError, RouterMode
from dynamo_grpc.errors import HandlerOutputError
from dynamo_grpc.v1 import inference_pb2 as pb

_REASONS = {
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_TOOL_CALLS: "tool_calls",
    pb.FINISH_REASON_CONTENT_FILTER: "content_filter",
}


class Relay:
    """Sends a prepared request and turns its outputs into pieces.

    Args:
        part: of the client's request, that is sent.
        shown: what the client wants to see of the answer.

    Attributes:
        counts_prompt: whether its prompt counts in the usage of the whole.
        usage: prompt and completion tokens; final when `run` has ended.
        has_output: whether its worker gave anything.
        on_more: told of each output that is more than a token.
        num_migrations: how often it went on at another worker.
    """

    def __init__(
        self,
        model: Model,
        part: Part,
        shown: Shown,
        context: Context,
        record: Record,
        mode: RouterMode,
        instance_id: int | None,
    ) -> None:
        message = part.message
        self._model, self._message, self._context, self._record = model, message, context, record
        self._index, self.counts_prompt = part.index, part.counts_prompt
        self._echo = part.echo if part.has_prompt_logprobs else None
        self._is_silent, self._reading = part.is_silent, part.reading
        self._called: dict[int, list[str]] = {}  # by workers that read their answers themselves
        self.has_output = False
        self._mode, self._instance_id = mode, instance_id
        self._shown, self._stops = shown, shown.stops
        self.on_more: Callable[[pb.GenerateResponse], None] | None = None
        self._num_choices = max(1, message.sampling_options.n)
        self._choices: dict[int, ChoiceText] = {}
        self._finished: set[int] = set()
        self._num_counted = self.num_migrations = 0
        num_prompt = message.resume.num_prompt_tokens or len(message.token_ids)
        self._num_carried = len(message.token_ids) - num_prompt  # generated elsewhere, before the client sent it
        self.usage = pb.Usage(prompt_tokens=num_prompt)

    async def run(self, show: Callable[[list[Piece]], bool], rest: Callable[[], Awaitable[None]]) -> None:
        """Send the request, and show the pieces of all outputs that are there, in order, as they come.

        Args:
            show: takes pieces at once; returns False when it takes no more before a rest.
            rest: is awaited then.

        Raises:
            HandlerEndedError: the worker's stream ended before every choice had.
            Other errors of the mesh, as the worker gave them.
        """
        router = self._model.router
        try:
            async with router.generate(self._message, self._context, self._mode, self._instance_id) as stream:
                self._record.routed(stream.instance.instance_id)

                def sink(outputs: list[pb.GenerateResponse | int]) -> bool:
                    before, self.has_output = self._num_counted, True
                    pieces = self.feed(outputs)
                    num_tokens = self._num_counted - before or len(pieces)  # text can't be counted in tokens
                    self._record.output(stream.instance.instance_id, num_tokens)
                    goes_on = show(pieces) if pieces else True
                    return goes_on and not self._is_stopped

                try:
                    while not await stream.read(sink):
                        if self._is_stopped:
                            stream.is_enough = True
                            break  # a stop string ended it before the worker did: leaving tells it so
                        await rest()
                finally:
                    self._record.instance = stream.instance.instance_id
                    self._record.num_retries += stream.num_retries
                    self.num_migrations = stream.num_migrations
                    self._record.num_migrations += self.num_migrations
        finally:
            self.settle()
        if not self._is_finished:
            raise HandlerEndedError("the worker's stream ended without a finish reason")

    @property
    def _is_stopped(self) -> bool:
        """Whether a stop string ended it that the worker knows nothing of; else its last words are waited for."""
        return bool(self._stops) and self._is_finished and any(choice.stop for choice in self._choices.values())

    @property
    def _is_finished(self) -> bool:
        return len(self._finished) == self._num_choices

    def feed(self, outputs: Sequence[pb.GenerateResponse | int]) -> list[Piece]:
        """The pieces of outputs; an int is one more token of choice 0."""
        pieces = []
        for output in outputs:
            if type(output) is int:
                if 0 not in self._finished:
                    pieces.append(self._token(output))
                continue
            assert isinstance(output, pb.GenerateResponse)
            if output.HasField("prompt_info") and self._echo is not None:
                pieces += self._echoes(self._echo, output.prompt_info)
            pieces += [piece for delta in output.choices if (piece := self._piece(delta))]
            if output.HasField("usage"):
                self._count(output.usage)
            if self.on_more is not None:
                self.on_more(output)
        return pieces

    def _echoes(self, echo: str, info: pb.PromptInfo) -> list[Piece]:
        """The prompt, before each choice, with how likely its tokens are; nothing is known of the first one."""
        self._echo = None
        token_ids = self._message.token_ids or info.token_ids
        if not token_ids or len(info.logprobs.token_logprobs) != len(token_ids):
            raise HandlerOutputError("the worker doesn't say how likely the prompt's tokens are, though it declares so")
        told = pb.Logprobs()
        told.CopyFrom(info.logprobs)
        told.token_logprobs[0] = math.nan
        num = len(token_ids)
        return [Piece(self._index + i, echo, token_ids, told, None, None, num) for i in range(self._num_choices)]

    def _token(self, token_id: int) -> Piece:
        if self._is_silent:
            return Piece(self._index, "", (), None, self._finish(0, "length"))
        choice = self._choices.get(0) or self._choice(0)
        text = choice.feed_token(token_id)
        self._num_counted += 1
        finish = None if choice.stop is None else self._finish(0, "stop")
        if type(choice) is ReadText:
            return Piece(self._index, text, (token_id,), None, finish, choice.stop, 0, None, choice.take())
        return Piece(self._index, text, (token_id,), None, finish, choice.stop)

    def _finish(self, index: int, reason: str) -> str:
        if self._reading is not None and reason in ("stop", "tool_calls"):
            choice, called = self._choices.get(index), self._called.get(index, [])
            is_cut = False
            if isinstance(choice, ReadText):
                called, is_cut = [*called, *choice.called], choice.stop is not None and choice.is_in_call
            self._reading.check(called)
            reason = self._reading.finish if called and not is_cut else reason
        self._finished.add(index)
        self._record.finish = reason
        return reason

    def _choice(self, index: int) -> ChoiceText:
        if index not in self._choices:
            assert self._model.preparation is not None
            tokenizer = self._model.preparation.tokenizer
            parser = self._reading.parser() if self._reading is not None else None
            detokenizer, kept = None, {}
            if tokenizer is not None and self._shown.has_text:
                skips = self._shown.skip_special_tokens
                kept = tokenizer.kept(parser.all_marks) if parser is not None and skips else {}
                seed = tokenizer.seed(self._message.token_ids, skip_special_tokens=skips)
                detokenizer = Detokenizer(
                    tokenizer.base,
                    seed,
                    skip_special_tokens=skips,
                    plain_seed=tokenizer.plain_seed,
                    kept=kept,
                )
            options: dict[str, Any] = {
                "keep_stop": self._shown.keeps_stop,
                "min_tokens": self._message.stop_conditions.min_tokens,
            }
            if parser is None:
                self._choices[index] = ChoiceText(detokenizer, self._stops, **options)
            else:
                assert self._reading is not None
                one_call = not self._reading.offer.is_parallel
                options |= {"one_call": one_call, "marks": kept.values()}
                self._choices[index] = ReadText(parser, detokenizer, self._stops, **options)
        return self._choices[index]

    def _piece(self, delta: pb.ChoiceDelta) -> Piece | None:
        if delta.index in self._finished:
            return None
        if self._is_silent:
            return Piece(self._index + delta.index, "", (), None, self._finish(delta.index, "length"))
        choice = self._choice(delta.index)
        token_ids: Sequence[int] = delta.token_ids
        logprobs = delta.logprobs if delta.HasField("logprobs") else None
        if delta.HasField("text") or not choice.has_detokenizer:
            text = choice.feed_text(delta.text)
        else:
            text, count = choice.feed_tokens(token_ids)
            if count < len(token_ids):
                token_ids = token_ids[:count]
                if logprobs is not None:
                    del logprobs.token_logprobs[count:]
                    del logprobs.top[count:]
        self._num_counted += len(token_ids)
        said: list[Said] = []
        if delta.HasField("reasoning") or delta.tool_calls:  # the worker reads its answer itself
            said = said_by(delta)
            self._check_calls(delta.index, said)
        finish = info = None
        if choice.stop is not None:
            finish = self._finish(delta.index, "stop")
        elif delta.HasField("finish"):
            text += choice.end()
            reason = "stop" if choice.stop is not None else _REASONS.get(delta.finish.reason, "stop")
            finish, info = self._finish(delta.index, reason), delta.finish
        taken = choice.take() if isinstance(choice, ReadText) else ()
        said += taken or ([Text(text)] if said and text else [])
        return Piece(self._index + delta.index, text, token_ids, logprobs, finish, choice.stop, 0, info, said)

    def _check_calls(self, index: int, said: Sequence[Said]) -> None:
        """Arguments belong to a call that has begun, and calls are counted from 0."""
        called = self._called.setdefault(index, [])
        for one in said:
            if isinstance(one, Call) and one.index == len(called):
                called.append(one.name)
            elif isinstance(one, Call) or (isinstance(one, Arguments) and one.index >= len(called)):
                text = f"the worker told of call {one.index} of a tool when {len(called)} had begun"
                raise HandlerOutputError(text)

    def _count(self, usage: pb.Usage) -> None:
        """Take the worker's counts."""
        prompt_tokens = self.usage.prompt_tokens
        self.usage.CopyFrom(usage)
        if self._message.token_ids:
            self.usage.prompt_tokens = prompt_tokens

    def settle(self) -> None:
        """What we could count ourselves holds."""
        if self._num_counted or self._is_silent:
            self.usage.completion_tokens = self._num_carried + self._num_counted
        if self._reading is not None and self._num_counted:
            choices = [choice for choice in self._choices.values() if isinstance(choice, ReadText)]
            if self._reading.family.thinks:
                self.usage.reasoning_tokens = sum(choice.num_reasoning for choice in choices)
