"""The choices of completions: what is echoed before them, and the best of several."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace

from dynamo_frontend.pieces import Piece
from dynamo_frontend.preprocess import Part
from dynamo_frontend.schemas import CompletionRequest


def echoes(part: Part) -> Iterator[Piece]:
    """What stands before each of its choices, where it needs no worker."""
    if part.echo and not part.has_prompt_logprobs:
        for number in range(part.num_choices):
            yield Piece(part.index + number, part.echo, (), None, None)


def select_completion(request: CompletionRequest, pieces: list[Piece], parts: list[Part]) -> list[Piece]:
    """The choices to show: with their echo, and of `best_of` the best ones, by log probability for each token."""
    num, per_prompt = request.n or 1, max(request.best_of or 1, request.n or 1)
    echoed = {part.index // per_prompt: len(part.message.token_ids) for part in parts if part.has_prompt_logprobs}
    if per_prompt > num:
        kept: list[Piece] = []
        for _, group in itertools.groupby(pieces, key=lambda piece: piece.index // per_prompt):
            members = list(group)
            prompt = members[0].index // per_prompt
            best = sorted(members, key=functools.partial(_score, skip=echoed.get(prompt, 0)), reverse=True)[:num]
            first = prompt * num
            kept += [replace(piece, index=first + rank) for rank, piece in enumerate(best)]
        pieces = kept if request.logprobs is not None else [replace(piece, logprobs=None) for piece in kept]
    if request.echo:
        echo = {piece.index // per_prompt: piece.text for part in parts for piece in echoes(part)}
        pieces = [replace(piece, text=echo.get(piece.index // num, "") + piece.text) for piece in pieces]
    return pieces


def _score(piece: Piece, skip: int) -> float:
    """Log probability for each token, without the `skip` first ones, which are the prompt's."""
    logprobs = piece.logprobs.token_logprobs[skip:] if piece.logprobs is not None else ()
    return sum(logprobs) / len(logprobs) if logprobs else float("-inf")
