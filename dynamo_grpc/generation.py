"""From what a model's handler yields to the outputs of a stream: checks, limits, finish reasons, usage.

Pure: it is fed items and gives messages. It owns what is about token ids (max_tokens, stop ids, min_tokens,
ignore_eos); stop strings belong to whoever detokenizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dynamo_grpc.errors import HandlerOutputError
from dynamo_grpc.v1 import inference_pb2 as pb

_REASONS = {
    "stop": pb.FINISH_REASON_STOP,
    "eos": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "tool_calls": pb.FINISH_REASON_TOOL_CALLS,
    "content_filter": pb.FINISH_REASON_CONTENT_FILTER,
    "cancelled": pb.FINISH_REASON_CANCELLED,
    "abort": pb.FINISH_REASON_CANCELLED,
}
_DICT_KEYS = frozenset(
    {"token_ids", "text", "index", "finish_reason", "stop_reason", "log_probs", "top_logprobs", "completion_usage"}
)


@dataclass(slots=True)
class _Choice:
    num_tokens: int = 0
    is_finished: bool = False


@dataclass(slots=True)
class Generation:
    """One request on its way.

    Args:
        handler_name: for messages to the handler's author.
        request: with its defaults filled in.
        vocab_size: ids from the handler must be below it; 0 is not known.
    """

    handler_name: str
    request: pb.PreprocessedRequest
    vocab_size: int = 0
    sequence: int = 0
    _choices: dict[int, _Choice] = field(default_factory=dict)
    _usage: pb.Usage = field(default_factory=pb.Usage)
    _hidden: frozenset[int] = frozenset()
    _shown: frozenset[int] = frozenset()
    _ending: frozenset[int] = frozenset()
    _plain: _Choice | None = None
    _max_tokens: int | None = None
    _min_tokens: int = 0
    _num_choices: int = 1
    _is_usage_told: bool = False
    _wants_logprobs: bool = False
    _wants_prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        stop = self.request.stop_conditions
        eos = () if stop.ignore_eos else self.request.eos_token_ids
        self._hidden = frozenset(eos) | frozenset(stop.stop_token_ids_hidden)
        self._shown = frozenset(stop.stop_token_ids) - self._hidden
        self._ending = self._hidden | self._shown
        self._max_tokens = stop.max_tokens if stop.HasField("max_tokens") else None
        self._min_tokens = stop.min_tokens
        self._wants_logprobs = self.request.output_options.HasField("logprobs")
        self._wants_prompt_logprobs = self.request.output_options.HasField("prompt_logprobs")
        self._num_choices = max(1, self.request.sampling_options.n)

    @property
    def is_finished(self) -> bool:
        """Whether all is said: every choice has ended and the usage was told. The handler needn't go on."""
        return self._is_usage_told

    @property
    def num_tokens(self) -> int:
        """Tokens given so far, of all choices."""
        return sum(choice.num_tokens for choice in self._choices.values())

    def _has_ended(self) -> bool:
        return sum(choice.is_finished for choice in self._choices.values()) >= self._num_choices

    def feed(self, item: Any) -> pb.GenerateResponse | None:
        """Take one item of the handler: an int, a list of ints, text, a dict, a ChoiceDelta or a GenerateResponse.

        Returns:
            the output to send, or None if there is nothing to tell (what comes after a choice's end is dropped).

        Raises:
            HandlerOutputError: the item is none of these, or has ids outside the vocabulary.
        """
        given = self._to_response(item)
        if given.HasField("usage"):
            self._usage.MergeFrom(given.usage)
            given.ClearField("usage")
        if self._wants_prompt_logprobs:
            self._check_prompt(given.prompt_info)
        kept = [delta for delta in given.choices if self._limit(delta)]
        if len(kept) != len(given.choices):
            del given.choices[:]
            given.choices.extend(kept)
        if self.request.token_ids and self._has_ended():  # one that takes text may tell its usage later
            self._tell_usage(given)
        if not given.ListFields():
            return None
        return self._number(given)

    def feed_token(self, token_id: Any) -> bool:
        """Whether an item is one more token of choice 0 that ends nothing: it is counted then and can be sent as it is.

        Its place in the stream is `sequence - 1`. All other items go to `feed`.
        """
        choice = self._plain
        if (
            choice is None
            or self.sequence == 0  # the first output says who answers
            or type(token_id) is not int
            or token_id in self._ending
            or choice.num_tokens + 1 == self._max_tokens
            or not 0 <= token_id < (self.vocab_size or 2**32)
        ):
            return False
        choice.num_tokens += 1
        self.sequence += 1
        return True

    def end(self, *, is_stopped: bool = False) -> pb.GenerateResponse | None:
        """The last output, when the handler has ended: what it didn't say about finish and usage.

        Args:
            is_stopped: the client asked for an early end.
        """
        if self.is_finished:
            return None
        if self._wants_prompt_logprobs and not is_stopped:
            self._check_prompt(pb.PromptInfo())
        last = pb.GenerateResponse()
        for index in range(self._num_choices):
            choice = self._choices.setdefault(index, _Choice())
            if not choice.is_finished:
                choice.is_finished = True
                reason = pb.FINISH_REASON_CANCELLED if is_stopped else pb.FINISH_REASON_STOP
                last.choices.add(index=index, finish=pb.FinishInfo(reason=reason))
        self._tell_usage(last)
        return self._number(last)

    def _tell_usage(self, response: pb.GenerateResponse) -> None:
        response.usage.CopyFrom(self.usage())
        self._is_usage_told = True

    def usage(self) -> pb.Usage:
        """Counts so far; what the handler said of its own is kept."""
        resumed = self.request.resume.num_prompt_tokens
        num_prompt = resumed or len(self.request.token_ids)
        carried = len(self.request.token_ids) - num_prompt
        counted = pb.Usage(
            prompt_tokens=num_prompt,
            completion_tokens=carried + self.num_tokens,
        )
        if not self.request.token_ids:  # a worker that takes text counts for itself
            counted.Clear()
        merged = pb.Usage()
        merged.CopyFrom(self._usage)
        merged.MergeFrom(counted)
        return merged

    # -- one delta --------------------------------------------------------------------------------------------------

    def _limit(self, delta: pb.ChoiceDelta) -> bool:
        """Cut a delta where its choice ends; False when nothing of it is left."""
        if delta.index >= self._num_choices:
            raise self._wrong(f"choice {delta.index} of a request for {self._num_choices}")
        choice = self._choices.get(delta.index)
        if choice is None:
            choice = self._choices[delta.index] = _Choice()
        if choice.is_finished:
            return False
        if self._wants_logprobs and len(delta.logprobs.token_logprobs) != len(delta.token_ids):
            raise HandlerOutputError(
                f"handler {self.handler_name} declares the capability 'logprobs' and yielded {len(delta.token_ids)} "
                f"tokens with {len(delta.logprobs.token_logprobs)} logprobs"
            )
        for position, token_id in enumerate(delta.token_ids):
            if self.vocab_size and token_id >= self.vocab_size:
                raise self._wrong(f"token id {token_id}, outside the vocabulary of {self.vocab_size}")
            may_stop = choice.num_tokens >= self._min_tokens
            if may_stop and token_id in self._hidden:
                self._cut(delta, position, pb.FinishInfo(reason=pb.FINISH_REASON_STOP, stop_token_id=token_id))
                break
            choice.num_tokens += 1
            if token_id in self._shown and choice.num_tokens >= self._min_tokens:
                self._cut(delta, position + 1, pb.FinishInfo(reason=pb.FINISH_REASON_STOP, stop_token_id=token_id))
                break
            if choice.num_tokens == self._max_tokens:
                is_last = position + 1 == len(delta.token_ids)
                if not (is_last and delta.HasField("finish")):
                    self._cut(delta, position + 1, pb.FinishInfo(reason=pb.FINISH_REASON_LENGTH))
                break
        choice.is_finished = delta.HasField("finish")
        may_be_plain = self._num_choices == 1 and not self._wants_logprobs and not choice.is_finished
        self._plain = choice if may_be_plain else None
        return bool(delta.token_ids or delta.text or delta.reasoning or delta.tool_calls or choice.is_finished)

    def _check_prompt(self, told: pb.PromptInfo) -> None:
        """The first output says how likely the prompt's tokens are."""
        self._wants_prompt_logprobs = False
        count, wanted = len(told.logprobs.token_logprobs), len(self.request.token_ids) or len(told.token_ids)
        has_top = not self.request.output_options.prompt_logprobs or len(told.logprobs.top) == wanted
        if count != wanted or not wanted or not has_top:
            raise HandlerOutputError(
                f"handler {self.handler_name} declares the capability 'prompt_logprobs' and its first output has "
                f"{count} of them in prompt_info for a prompt of {wanted} tokens ({len(told.logprobs.top)} tops)"
            )

    @staticmethod
    def _cut(delta: pb.ChoiceDelta, length: int, finish: pb.FinishInfo) -> None:
        del delta.token_ids[length:]
        if delta.HasField("logprobs"):
            del delta.logprobs.token_logprobs[length:]
            del delta.logprobs.top[length:]
        delta.finish.CopyFrom(finish)

    def _number(self, response: pb.GenerateResponse) -> pb.GenerateResponse:
        response.sequence = self.sequence
        self.sequence += 1
        return response

    # -- one item ---------------------------------------------------------------------------------------------------

    def _to_response(self, item: Any) -> pb.GenerateResponse:
        match item:
            case bool():
                pass
            case int():
                return self._tokens([item])
            case str():
                return pb.GenerateResponse(choices=[pb.ChoiceDelta(text=item)])
            case pb.ChoiceDelta():
                return pb.GenerateResponse(choices=[item])
            case pb.GenerateResponse():
                copy = pb.GenerateResponse()
                copy.CopyFrom(item)
                copy.ClearField("sequence")
                return copy
            case list() | tuple() if all(type(token_id) is int for token_id in item):
                return self._tokens(item)
            case Mapping():
                return self._from_dict(item)
        raise self._wrong(f"{item!r:.80} ({type(item).__name__})")

    def _tokens(self, token_ids: Any) -> pb.GenerateResponse:
        try:
            return pb.GenerateResponse(choices=[pb.ChoiceDelta(token_ids=token_ids)])
        except ValueError:
            raise self._wrong(f"{token_ids!r:.80}: token ids are from 0 to 4294967295") from None

    def _from_dict(self, item: Mapping[str, Any]) -> pb.GenerateResponse:
        if unknown := [str(key) for key in item if key not in _DICT_KEYS]:
            raise self._wrong(f"a dict with {', '.join(unknown)}; known keys are {', '.join(sorted(_DICT_KEYS))}")
        reason = item.get("finish_reason")
        if reason and reason not in _REASONS:
            raise self._wrong(f"finish_reason {reason!r:.80}; known ones are {', '.join(_REASONS)}")
        try:
            return _read_dict(item)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise self._wrong(f"{item!r:.80}: {error}") from None

    def _wrong(self, what: str) -> HandlerOutputError:
        return HandlerOutputError(
            f"handler {self.handler_name} yielded {what}; a model's handler yields an int or a list of ints "
            "(token ids), text, a dict, a ChoiceDelta or a GenerateResponse"
        )


def _read_dict(item: Mapping[str, Any]) -> pb.GenerateResponse:
    response = pb.GenerateResponse()
    delta = response.choices.add(index=item.get("index") or 0, token_ids=item.get("token_ids") or ())
    if item.get("text") is not None:
        delta.text = item["text"]
    for logprob in item.get("log_probs") or ():
        delta.logprobs.token_logprobs.append(logprob)
    for entry in item.get("top_logprobs") or ():
        top = delta.logprobs.top.add()
        for alternative in entry:
            top.token_ids.append(alternative["token_id"])
            top.logprobs.append(alternative["logprob"])
    if usage := item.get("completion_usage"):
        known = {"prompt_tokens", "completion_tokens"}
        response.usage.CopyFrom(pb.Usage(**{key: usage[key] for key in known & usage.keys()}))
    if reason := item.get("finish_reason"):
        delta.finish.reason = _REASONS[reason]
        if isinstance(item.get("stop_reason"), int):
            delta.finish.stop_token_id = item["stop_reason"]
    return response
