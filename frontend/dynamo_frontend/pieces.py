"""What is new in one choice of an answer, ready to be shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_frontend.parsers.said import Arguments, Call, Reasoning, Said, Text
from dynamo_grpc.v1 import inference_pb2 as pb


@dataclass(slots=True)
class Piece:
    """What is new in one choice, ready to be shown.

    Attributes:
        token_ids: the tokens of the piece; may be more or fewer than `text` shows (half characters, stop strings).
        finish: OpenAI's finish reason, in a choice's last piece.
        stop: the stop string that ended the choice, if one did.
        num_prompt: so many of the tokens are the prompt's, echoed.
        info: what the worker said of the choice's end, if it was the one to end it.
        said: all that the piece says, in order, where that is more than `text`: reasoning, calls of tools.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: pb.Logprobs | None
    finish: str | None
    stop: str | None = None
    num_prompt: int = 0
    info: pb.FinishInfo | None = None
    said: Sequence[Said] = ()


def said_by(delta: pb.ChoiceDelta) -> list[Said]:
    """What a worker says that reads its answer itself."""
    said: list[Said] = [Reasoning(delta.reasoning)] if delta.reasoning else []
    for call in delta.tool_calls:
        if call.name:
            said.append(Call(call.index, call.id, call.name))
        if call.arguments:
            said.append(Arguments(call.index, call.arguments))
    return said


def join(pieces: Sequence[Piece]) -> list[Piece]:
    """One piece for each choice, by index."""
    by_index: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_index.setdefault(piece.index, []).append(piece)
    return [_join(by_index[index]) for index in sorted(by_index)]


def _join(pieces: Sequence[Piece]) -> Piece:
    logprobs = None
    if any(piece.logprobs is not None for piece in pieces):
        logprobs = pb.Logprobs()
        for piece in pieces:
            if piece.logprobs is not None:
                logprobs.MergeFrom(piece.logprobs)
    token_ids = [token_id for piece in pieces for token_id in piece.token_ids]
    last = pieces[-1]
    text = "".join(piece.text for piece in pieces)
    said: list[Said] = []
    if any(piece.said for piece in pieces):
        for piece in pieces:
            said += piece.said or ([Text(piece.text)] if piece.text else [])
    return Piece(last.index, text, token_ids, logprobs, last.finish, last.stop, pieces[0].num_prompt, last.info, said)
