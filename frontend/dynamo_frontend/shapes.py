"""OpenAI's response bodies: chat and completions, whole and as events of a stream. No I/O."""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import orjson

from dynamo_frontend.parsers.said import Arguments, Call, Reasoning, Text
from dynamo_frontend.pieces import Piece
from dynamo_frontend.schemas import Asked, Sampling
from dynamo_frontend.spelling import Spelled, Spelling
from dynamo_grpc.v1 import inference_pb2 as pb

DONE = b"data: [DONE]\n\n"
#: What stands for a probability of 0, which JSON has no logarithm of. (NaN becomes null: nothing is known.)
_LOWEST = -9999.0


def usage_dict(usage: pb.Usage, num_migrations: int = 0) -> dict[str, Any]:
    """Usage as OpenAI has it."""
    values: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
    if usage.HasField("cached_tokens"):
        values["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    if num_migrations:
        values["num_migrations"] = num_migrations
    if usage.HasField("reasoning_tokens"):
        values["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return values


def typed_event(kind: str, **values: Any) -> bytes:
    """An event that has its type as name and in its data."""
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps({"type": kind, **values}) + b"\n\n"


class Shape(Protocol):
    """How answers of one endpoint look.

    Attributes:
        num_events: so many were told, where they have numbers.
    """

    num_events: int

    def begin(self, num_choices: int, usage: pb.Usage) -> bytes:
        """The events before the first piece."""

    def event(self, piece: Piece) -> bytes:
        """The events of one piece."""

    def end(self, usage: pb.Usage, num_migrations: int) -> bytes:
        """The events after the last piece."""

    def with_usage(self, events: bytes, usage: pb.Usage) -> bytes:
        """Events with the usage so far in each, where it would be told at the end."""

    def body(self, pieces: Iterable[Piece], usage: pb.Usage, num_migrations: int = 0) -> bytes:
        """The whole answer."""


class _Shape:
    prefix, chunk, whole = "", "", ""
    num_events = 0

    def __init__(self, request_id: str, asked: Asked, spelling: Spelling | None) -> None:
        self._spelling = spelling
        options = asked.stream_options if isinstance(asked, Sampling) and asked.stream else None
        has_usage = options is not None and (options.include_usage or options.continuous_usage_stats)
        self._has_usage = has_usage
        self._base = {"id": f"{self.prefix}-{request_id}", "created": int(time.time()), "model": asked.model}
        head = orjson.dumps({**self._base, "object": self.chunk})[:-1]
        self._head = b"data: " + head + b',"choices":[{"index":'
        self._tail = b'}],"usage":null}\n\n' if has_usage else b"}]}\n\n"
        self._frames: dict[tuple[int, bytes], tuple[bytes, bytes]] = {}

    def end(self, usage: pb.Usage, num_migrations: int) -> bytes:
        if not self._has_usage:
            return DONE
        content = {**self._base, "object": self.chunk, "choices": [], "usage": usage_dict(usage, num_migrations)}
        return b"data: " + orjson.dumps(content) + b"\n\n" + DONE

    def with_usage(self, events: bytes, usage: pb.Usage) -> bytes:
        # in a JSON string the quotes would be escaped
        told = b'"usage":' + orjson.dumps(usage_dict(usage)) + b"}\n\n"
        return events.replace(b'"usage":null}\n\n', told) if b'"usage":null}' in events else events

    def _whole(self, choices: list[dict[str, Any]], usage: pb.Usage, num_migrations: int) -> bytes:
        return orjson.dumps(
            {**self._base, "object": self.whole, "choices": choices, "usage": usage_dict(usage, num_migrations)}
        )

    def _token(self, token_id: int) -> Spelled:
        if self._spelling is None:
            return Spelled(f"token_id:{token_id}", b"")
        return self._spelling[token_id]


class ChatShape(_Shape):
    """/v1/chat/completions."""

    prefix, chunk, whole = "chatcmpl", "chat.completion.chunk", "chat.completion"

    def begin(self, num_choices: int, usage: pb.Usage) -> bytes:
        delta = b',"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        return b"".join(self._head + str(index).encode() + delta + self._tail for index in range(num_choices))

    def event(self, piece: Piece) -> bytes:
        events = b""
        before, after = self._frame(piece.index)
        if piece.said:
            events = b"".join(self._deltas(piece))
        elif piece.logprobs is not None:
            logprobs = orjson.dumps(self._logprobs(piece))
            events = b"".join((before, orjson.dumps(piece.text), b'},"logprobs":', logprobs, after))
        elif piece.text:
            events = b"".join((before, orjson.dumps(piece.text), b'},"logprobs":null', after))
        if piece.finish:
            finish = b',"delta":{},"logprobs":null,"finish_reason":' + orjson.dumps(piece.finish)
            events += self._head + str(piece.index).encode() + finish + self._tail
        return events

    def _deltas(self, piece: Piece) -> Iterable[bytes]:
        """An event for each thing that a piece says; the first has the log probabilities of all."""
        logprobs = b"null" if piece.logprobs is None else orjson.dumps(self._logprobs(piece))
        for one in piece.said:
            if type(one) is Text or type(one) is Reasoning:
                before, after = self._frame(piece.index, b"content" if type(one) is Text else b"reasoning_content")
                yield b"".join((before, orjson.dumps(one.text), b'},"logprobs":', logprobs, after))
            else:
                before, after = self._frame(piece.index, b"tool_calls")
                told = orjson.dumps([_call_delta(one)])  # type: ignore[arg-type]
                yield b"".join((before, told, b'},"logprobs":', logprobs, after))
            logprobs = b"null"

    def _frame(self, index: int, key: bytes = b"content") -> tuple[bytes, bytes]:
        """What stands before and after what a piece says."""
        if (index, key) not in self._frames:
            before = self._head + str(index).encode() + b',"delta":{"' + key + b'":'
            self._frames[index, key] = before, b',"finish_reason":null' + self._tail
        return self._frames[index, key]

    def body(self, pieces: Iterable[Piece], usage: pb.Usage, num_migrations: int = 0) -> bytes:
        choices = [
            {
                "index": piece.index,
                "message": _message(piece),
                "logprobs": None if piece.logprobs is None else self._logprobs(piece),
                "finish_reason": piece.finish,
            }
            for piece in pieces
        ]
        return self._whole(choices, usage, num_migrations)

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        assert piece.logprobs is not None
        tops = [self._top(top) for top in piece.logprobs.top] or [[] for _ in piece.token_ids]
        pairs = zip(piece.token_ids, piece.logprobs.token_logprobs, tops, strict=False)
        return {"content": [{**self._entry(token, logprob), "top_logprobs": top} for token, logprob, top in pairs]}

    def _top(self, top: pb.TopLogprobs) -> list[dict[str, Any]]:
        return [self._entry(token, logprob) for token, logprob in zip(top.token_ids, top.logprobs, strict=True)]

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        token = self._token(token_id)
        return {"token": token.text, "logprob": max(logprob, _LOWEST), "bytes": list(token.data)}


def _call_delta(said: Call | Arguments) -> dict[str, Any]:
    """What is new of a call, as a stream of a chat tells it."""
    if isinstance(said, Call):
        return {
            "index": said.index,
            "id": said.id,
            "type": "function",
            "function": {"name": said.name, "arguments": ""},
        }
    return {"index": said.index, "function": {"arguments": said.text}}


class Told(NamedTuple):
    """What a whole choice says beside its text."""

    reasoning: str
    calls: list[tuple[Call, str]]


def told_by(piece: Piece) -> Told:
    """Reasoning, and calls with their arguments."""
    reasoning = "".join([one.text for one in piece.said if isinstance(one, Reasoning)])
    arguments: dict[int, str] = {}
    for one in piece.said:
        if isinstance(one, Arguments):
            arguments[one.index] = arguments.get(one.index, "") + one.text
    calls = [(one, arguments.get(one.index, "")) for one in piece.said if isinstance(one, Call)]
    return Told(reasoning, calls)


def _message(piece: Piece) -> dict[str, Any]:
    """A whole choice of a chat."""
    reasoning, calls = told_by(piece)
    message: dict[str, Any] = {"role": "assistant", "content": piece.text or (None if calls else ""), "refusal": None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": text}}
            for call, text in calls
        ]
    return message


class CompletionShape(_Shape):
    """/v1/completions."""

    prefix, chunk, whole = "cmpl", "text_completion", "text_completion"

    def __init__(self, request_id: str, asked: Asked, spelling: Spelling | None) -> None:
        super().__init__(request_id, asked, spelling)
        self._places: dict[int, _Place] = {}
        self._skips_special = not isinstance(asked, Sampling) or asked.skip_special_tokens

    def begin(self, num_choices: int, usage: pb.Usage) -> bytes:
        return b""

    def event(self, piece: Piece) -> bytes:
        if not (piece.text or piece.finish or piece.logprobs is not None):
            return b""
        logprobs = b"null" if piece.logprobs is None else orjson.dumps(self._logprobs(piece))
        return b"".join((
            self._head, str(piece.index).encode(), b',"text":', orjson.dumps(piece.text), b',"logprobs":', logprobs,
            b',"finish_reason":', orjson.dumps(piece.finish), self._tail,
        ))  # fmt: skip

    def body(self, pieces: Iterable[Piece], usage: pb.Usage, num_migrations: int = 0) -> bytes:
        choices = [
            {
                "index": piece.index,
                "text": piece.text,
                "logprobs": None if piece.logprobs is None else self._logprobs(piece),
                "finish_reason": piece.finish,
            }
            for piece in pieces
        ]
        return self._whole(choices, usage, num_migrations)

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        assert piece.logprobs is not None
        spelled = [self._token(token) for token in piece.token_ids]
        place = self._places.setdefault(piece.index, _Place(skips_special=self._skips_special))
        offsets = [place.of_prompt(token, piece.text) for token in spelled[: piece.num_prompt]]
        if piece.num_prompt:
            place.end_of_prompt()
        offsets += [place.after(token) for token in spelled[piece.num_prompt :]]
        logprobs = piece.logprobs.token_logprobs[: len(spelled)]
        top: list[dict[str, float] | None] = []
        for token, logprob, entry in zip(spelled, logprobs, piece.logprobs.top, strict=False):
            names: dict[str, float] = {}
            for other, likely in zip(entry.token_ids, entry.logprobs, strict=True):
                names.setdefault(_named(self._token(other)), max(likely, _LOWEST))  # most likely first
            if names:  # the token itself is always there
                names.setdefault(_named(token), max(logprob, _LOWEST))
            top.append(names or None)  # of a prompt's first token
        return {
            "tokens": [_named(token) for token in spelled],
            "token_logprobs": [max(logprob, _LOWEST) for logprob in logprobs],
            "top_logprobs": top or None,
            "text_offset": offsets,
        }


class _Place:
    """Where the next token of a choice begins in its text, in characters."""

    def __init__(self, *, skips_special: bool) -> None:
        self._skips_special = skips_special
        self._length, self._is_within = 0, False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of_prompt(self, token: Spelled, text: str) -> int:
        """Where a token of an echoed prompt begins; of its text a decoder may have left out something."""
        for said in (token.text, token.text.lstrip()):
            if said and _is_text(token) and text.startswith(said, self._length):
                at, self._length = self._length, self._length + len(said)
                return at
        return self._length if _is_text(token) else self.after(token)

    def end_of_prompt(self) -> None:
        """What comes is the answer's."""
        self._decoder.reset()
        self._is_within = False

    def after(self, token: Spelled) -> int:
        """Where a token of the answer begins; the next one comes behind it."""
        if token.is_special and self._skips_special:
            return self._length
        goes_on = bool(token.data) and token.data[0] & 0xC0 == 0x80
        if self._is_within and not goes_on:  # of a character that was begun nothing more came
            self._decoder.reset()
            self._length += 1
        at = self._length
        self._length += len(self._decoder.decode(token.data))
        self._is_within = bool(self._decoder.getstate()[0])
        return at


def _is_text(token: Spelled) -> bool:
    """Whether it is one or several whole characters, or none."""
    return token.text.encode() == token.data


def _named(token: Spelled) -> str:
    return token.text if _is_text(token) or not token.data else f"bytes:{token.text}"
