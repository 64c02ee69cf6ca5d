"""How parsers read: text in, of any length; what it says out, as it becomes known. No model family, no I/O.

A parser is written as if it had all of the text: a generator that waits where the text ends so far. What it reads
doesn't depend on how the text was cut, because it is never told.
"""

from __future__ import annotations

import functools
import json
import random
import re
import string
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeAlias, TypeVar

from dynamo_frontend.marks import viable_suffix
from dynamo_frontend.parsers.said import Arguments, Call, Reasoning, Said, Text
from dynamo_frontend.parsers.tools import Tools

T = TypeVar("T")
#: A part of a parser: waits at each yield for more text, and gives a T.
Steps: TypeAlias = Generator[None, None, T]


#: So much white space before a mark is dropped; and a name is no longer than this.
_MAX_SPACE, _MAX_NAME = 64, 512


@dataclass(slots=True)
class _Growing:
    """What is said, piece by piece."""

    kind: type[Text | Reasoning | Arguments]
    index: int
    pieces: list[str]

    def told(self) -> Text | Reasoning | Arguments:
        text = self.pieces[0] if len(self.pieces) == 1 else "".join(self.pieces)
        return Arguments(self.index, text) if self.kind is Arguments else self.kind(text)  # type: ignore[call-arg]


@functools.cache
def _compiled(marks: tuple[str, ...]) -> tuple[re.Pattern[str], tuple[str, ...], int]:
    """What finds the marks, the characters that they begin with, and how much of one may have come without being one.

    None of them is within another, so that the one that begins first is complete first.
    """
    pattern = re.compile("|".join(map(re.escape, sorted(marks, key=len))) or r"(?!)")
    return pattern, tuple({mark[0] for mark in marks}), max(map(len, marks), default=1) - 1


def _before_space(text: str, begin: int, end: int) -> int:
    """Where the white space before `end` begins."""
    first = max(begin, end - _MAX_SPACE)
    while end > first and text[end - 1].isspace():
        end -= 1
    return end


class Thinking(NamedTuple):
    """How a model family marks what it thinks before it answers."""

    opening: str
    closing: str


class Parser(ABC):
    """Reads one choice.

    Args:
        tools: that the model may call.
        thinking: how reasoning is marked, if the model reasons.
        is_thinking: the prompt has opened the reasoning already.
        rng: for the ids of calls.

    Attributes:
        marks: tokens that it must see, though they are special ones.
        num_calls: so many have begun.
        is_in_reasoning: what comes next is reasoning.
        gap: the white space before the mark that was found last.
        is_tentative: what is read is attempted.
        is_in_call: a call has begun, and isn't known to be whole.
    """

    marks: ClassVar[Sequence[str]] = ()

    def __init__(
        self,
        tools: Tools,
        thinking: Thinking | None = None,
        *,
        is_thinking: bool = False,
        rng: random.Random | None = None,
    ) -> None:
        self.tools = tools
        self._thinking, self.is_in_reasoning = thinking, is_thinking
        self._rng = rng or random.Random()
        self.num_calls = 0
        self._has_arguments, self.is_in_call = True, False
        self._held, self._pos, self._start = "", 0, 0
        self._tried: list[str] = []
        self.gap = ""
        self._is_over = self.is_tentative = False
        self._said: list[Call | _Growing] = []
        self._steps = self.parse()

    @property
    def all_marks(self) -> Sequence[str]:
        """Tokens that it must see: of calls, and of reasoning."""
        return (*self.marks, *(self._thinking or ()))

    def feed(self, text: str) -> list[Said]:
        """Take text; gives what it says."""
        self._held += text
        next(self._steps, None)
        return self._told()

    def end(self) -> list[Said]:
        """What is left, when no more text comes."""
        self._is_over = True
        next(self._steps, None)
        return self._told()

    def _told(self) -> list[Said]:
        said, self._said = self._said, []
        return [one if isinstance(one, Call) else one.told() for one in said]

    # what a family is made of

    def parse(self) -> Steps[None]:
        """The whole answer: reasoning, if there is any, and the answer proper."""
        if self._thinking is not None:
            yield from self._think(self._thinking)
        yield from self.answer()
        yield from self.text_until()

    @abstractmethod
    def answer(self) -> Steps[None]:
        """What comes behind the reasoning; what it leaves is text."""

    def _think(self, thinking: Thinking) -> Steps[None]:
        if not self.is_in_reasoning:
            self.attempt()  # white space before it is the answer's, if no reasoning comes
            yield from self.skip_space()
            if not (yield from self.match(thinking.opening)):
                self.rewind()
                return
            self.is_in_reasoning = True
            self.commit()
        else:
            yield from self.skip_space()
            yield from self.match(thinking.opening)  # some write it again
        yield from self.skip_space()
        yield from self.until(thinking.closing, say=self.reason)
        self.is_in_reasoning = False
        yield from self.skip_space()

    def text_until(self, *marks: str) -> Steps[str | None]:
        """Say the text up to the first of the marks, and take that; None at the end."""
        return (yield from self.until(*marks, say=self.text))

    # reading

    def more(self) -> Steps[bool]:
        """Wait for more text; False at the end."""
        if self.is_tentative:
            self._tried.append(self._held[self._start : self._pos])
        self._held = self._held[self._pos :]
        self._pos = self._start = 0
        if not self._is_over:
            yield
        return not self._is_over

    def char(self) -> Steps[str]:
        """The next character, which is not taken; empty at the end."""
        while self._pos >= len(self._held):
            if not (yield from self.more()):
                return ""
        return self._held[self._pos]

    def take(self, length: int = 1) -> str:
        """Take what is there."""
        taken = self._held[self._pos : self._pos + length]
        self._pos += length
        return taken

    def skip_space(self, others: str = "") -> Steps[None]:
        """Take white space, and other characters."""
        while char := (yield from self.char()):
            if not char.isspace() and char not in others:
                return
            self._pos += 1

    def match(self, literal: str) -> Steps[bool]:
        """Take a literal, if it comes now."""
        while True:
            there = self._held[self._pos : self._pos + len(literal)]
            if there == literal:
                self._pos += len(literal)
                return True
            if not literal.startswith(there) or not (yield from self.more()):
                return False

    def until(self, *marks: str, say: Callable[[str], None], trims: bool = True) -> Steps[str | None]:
        """Say what comes before the first of the marks, and take that; None at the end.

        Args:
            trims: white space before a mark is dropped; so it is held back as the beginning of a mark is.
        """
        pattern, starts, longest = _compiled(marks)
        while True:
            held, pos = self._held, self._pos
            if pos < len(held):
                if found := pattern.search(held, pos):
                    at = found.start()
                    end = _before_space(held, pos, at) if trims else at
                    say(held[pos:end])
                    self.gap, self._pos = held[end:at], found.end()
                    return found[0]
                end, tail = len(held), held[max(pos, len(held) - longest) :]
                for start in starts:
                    if start in tail:
                        end -= viable_suffix(tail, marks)
                        break
                end = _before_space(held, pos, end) if trims else end
                if end > pos:
                    say(held[pos:end])
                    self._pos = end
            if not (yield from self.more()):
                rest = self.take(len(self._held))
                if rest.strip() or not trims or not self.num_calls:  # else it is only what is around calls
                    say(rest)
                return None

    def gather(self, *marks: str) -> Steps[tuple[str, str | None]]:
        """A name that ends with one of the marks, and that mark, which is taken; None where it doesn't come soon, and
        then nothing is taken.
        """
        pattern, _, longest = _compiled(marks)
        while True:
            if found := pattern.search(self._held, self._pos, self._pos + _MAX_NAME + longest):
                name = self._held[self._pos : found.start()]
                self._pos = found.end()
                return name, found[0]
            if len(self._held) - self._pos > _MAX_NAME + longest or not (yield from self.more()):
                return "", None

    # trying: what is read meanwhile can be had again

    def attempt(self) -> None:
        """What is read from here on may turn out to be something else."""
        self._tried, self._start, self.is_tentative = [], self._pos, True

    def commit(self) -> None:
        """What was read is what it looked like."""
        self.is_tentative = False

    def rewind(self) -> None:
        """Go back to where the attempt began."""
        if self.is_tentative:
            self._held = "".join([*self._tried, self._held[self._start :]])
            self._pos, self.is_tentative = 0, False

    def put_back(self, length: int) -> None:
        """Give back the end of what was taken last."""
        self._pos -= length

    def give_up(self, mark: str = "") -> None:
        """What was read is plain text after all.

        Args:
            mark: that stood before it.
        """
        self.text("".join([self.gap, mark, *self._tried, self._held[self._start : self._pos]]))
        self.is_tentative = False

    # saying

    def text(self, text: str) -> None:
        """Say text of the answer."""
        self._say(Text, 0, text)

    def reason(self, text: str) -> None:
        """Say reasoning."""
        self._say(Reasoning, 0, text)

    def _say(self, kind: type[Text | Reasoning | Arguments], index: int, text: str) -> None:
        if not text:
            return
        if self._said and isinstance(last := self._said[-1], _Growing) and last.kind is kind and last.index == index:
            last.pieces.append(text)
        else:
            self._said.append(_Growing(kind, index, [text]))

    def begin_call(self, name: str, call_id: str = "") -> None:
        """A call begins; its arguments follow."""
        self.commit()
        self._said.append(Call(self.num_calls, call_id or self.make_id(name), name))
        self.num_calls += 1
        self._has_arguments, self.is_in_call = False, True

    def arguments(self, text: str) -> None:
        """Say JSON of the arguments of the call that began last."""
        self._has_arguments = self._has_arguments or bool(text)
        self._say(Arguments, self.num_calls - 1, text)

    def end_call(self) -> None:
        """The call's arguments are complete: an empty object, if none came."""
        if not self._has_arguments:
            self.arguments("{}")
        self.is_in_call = False

    def close_call(self, *marks: str) -> Steps[None]:
        """The call ends here, with one of the marks or without; but for an answer that is cut here."""
        for mark in marks:
            if (yield from self.match(mark)):
                self.end_call()
                return
        if (yield from self.char()):
            self.end_call()

    def calls_between(self, opening: str, closing: str, begin: str, call: Callable[[], Steps[bool]]) -> Steps[None]:
        """Read calls that stand one after another between two marks, of which the opening one is taken; what is no call
        is text.

        Args:
            begin: begins each call, and is taken.
            call: reads what follows; gives whether it was a call.
        """
        self.attempt()
        mark = opening
        yield from self.skip_space()
        while (yield from self.match(begin)):
            if not (yield from call()):
                self.give_up(mark)
                return
            mark = self.gap = ""
            self.attempt()
            yield from self.skip_space()
        if (yield from self.match(closing)) and not mark:
            self.commit()
        else:
            self.give_up(mark)

    def make_id(self, name: str) -> str:
        """An id for a call."""
        return "call_" + self.random_name(24)

    def random_name(self, length: int) -> str:
        """Letters and digits."""
        return "".join(self._rng.choices(string.ascii_letters + string.digits, k=length))


class Plain(Parser):
    """Reasoning, and an answer without calls."""

    def answer(self) -> Steps[None]:
        yield from ()


def quoted(text: str) -> str:
    """Text as it stands in a JSON string, without the quotes."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
