"""Marks in a stream of text: which is complete first, and what may be the beginning of one. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Found(NamedTuple):
    """A mark in a text: what is complete first counts, whatever comes behind it, so it doesn't depend on how the text
    was cut; of several that end at one place, the longest.
    """

    end: int
    start: int
    mark: str


def first_of(text: str, marks: Sequence[str], start: int = 0) -> Found | None:
    """The mark that is complete first, from `start` on."""
    found = [Found(at + len(mark), at, mark) for mark in marks if (at := text.find(mark, start)) >= 0]
    return min(found) if found else None


def viable_suffix(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of a text that is the beginning of a mark, and no whole one."""
    longest = max(map(len, marks), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-length:]) for mark in marks):
            return length
    return 0
