"""What an answer says, piece by piece."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias


class Text(NamedTuple):
    """New text of the answer."""

    text: str


class Reasoning(NamedTuple):
    """New text of what the model thought before it answered."""

    text: str


class Call(NamedTuple):
    """A call of a tool begins; `index` counts the calls of an answer."""

    index: int
    id: str
    name: str


class Arguments(NamedTuple):
    """New text of a call's arguments, which are JSON."""

    index: int
    text: str


Said: TypeAlias = Text | Reasoning | Call | Arguments
