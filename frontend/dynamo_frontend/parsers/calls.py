"""Calls that are JSON objects: a name and arguments, as most model families write them; the arguments as they come."""

from __future__ import annotations

import re
from collections.abc import Callable

from dynamo_frontend.parsers.base import Parser, Steps

_NAMES = ("name", "tool_name", "function")
_ARGUMENTS = ("arguments", "parameters", "args")
_IDS = ("id", "tool_call_id")
_IN_STRING, _OUTSIDE = re.compile(r'[^"\\]+'), re.compile(r'[^"{}\[\]]+')
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
_BROKEN = 0xFFFD  # stands for what is no character


class JsonParser(Parser):
    """Reads JSON as it comes. Models write some that isn't valid: what can be read is."""

    def json_value(self, say: Callable[[str], None]) -> Steps[None]:
        """Say a value as it stands there."""
        char = yield from self.char()
        if char == '"':
            yield from self._string(say)
            return
        if char not in ("{", "["):
            while (char := (yield from self.char())) and not (char.isspace() or char in ",}]<["):
                say(self.take())
            return
        depth = 0
        while char := (yield from self.char()):
            if run := _OUTSIDE.match(self._held, self._pos):
                say(self.take(len(run[0])))
            elif char == '"':
                yield from self._string(say)
            else:
                say(self.take())
                depth += 1 if char in "{[" else -1
                if not depth:
                    return

    def _string(self, say: Callable[[str], None]) -> Steps[None]:
        say(self.take())
        while char := (yield from self.char()):
            if run := _IN_STRING.match(self._held, self._pos):
                say(self.take(len(run[0])))
                continue
            say(self.take())
            if char == '"':
                return
            if (yield from self.char()):
                say(self.take())

    def json_string(self, say: Callable[[str], None]) -> Steps[bool]:
        """Say what a string says, without its quotes and escapes; False when it is cut, or there is none."""
        if not (yield from self.match('"')):
            return False
        while char := (yield from self.char()):
            if run := _IN_STRING.match(self._held, self._pos):
                say(self.take(len(run[0])))
                continue
            self.take()
            if char == '"':
                return True
            say((yield from self.escaped()))
        return False

    def escaped(self) -> Steps[str]:
        """What an escape stands for; its backslash is taken."""
        kind = yield from self.char()
        self.take()
        if kind != "u":
            return _ESCAPED.get(kind, kind)
        code = yield from self.hexadecimal(4)
        if 0xD800 <= code < 0xDC00 and (yield from self.match("\\u")):
            low = yield from self.hexadecimal(4)
            if 0xDC00 <= low < 0xE000:
                return chr(0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00))
            return chr(_BROKEN) + character(low)
        return character(code)

    def hexadecimal(self, num_digits: int) -> Steps[int]:
        """The number that so many digits stand for."""
        digits = ""
        while len(digits) < num_digits and (char := (yield from self.char())) and char in "0123456789abcdefABCDEF":
            digits += self.take()
        return int(digits, 16) if len(digits) == num_digits else _BROKEN

    def call_object(self) -> Steps[bool]:
        """Read an object that is a call, and begin it as soon as its name is known. To be attempted.

        Returns:
            Whether it was one; else what was read can be given up.
        """
        if not (yield from self.match("{")):
            return False
        kept: list[str] = []  # arguments that come before the name
        depth, is_begun, has_arguments, call_id = 1, False, False, ""
        while depth:
            yield from self.skip_space(",")
            if (char := (yield from self.char())) == "}":
                self.take()
                depth -= 1
                continue
            if char != '"' or (key := (yield from self._text())) is None:
                break
            yield from self.skip_space()
            if not (yield from self.match(":")):
                break
            yield from self.skip_space()
            char = yield from self.char()
            if key == "function" and char == "{":  # as OpenAI has it: what is within belongs to it
                self.take()
                depth += 1
            elif key in _NAMES and char == '"' and not is_begun:
                if not (name := (yield from self._text())) or not self.can_be_called(name):
                    return False
                is_begun = True
                self.begin_call(name, call_id)
                self.arguments("".join(kept))
            elif key in _ARGUMENTS and not has_arguments:
                has_arguments = True
                yield from self._arguments(self.arguments if is_begun else kept.append)
            elif key in _IDS and char == '"' and not is_begun:
                call_id = (yield from self._text()) or ""
            elif is_begun or self.allows_key(key):
                yield from self.json_value(lambda _: None)
            else:
                return False
        if is_begun and (not depth or (yield from self.char())):  # else it was cut
            self.end_call()
        return is_begun

    def call_objects(self, separators: str) -> Steps[bool]:
        """Read objects that are calls, one after another; to be attempted, and the last attempt goes on.

        Returns:
            Whether what was read last was no call, though it looked like one: then it can be given up.
        """
        while (yield from self.char()) == "{":
            if not (yield from self.call_object()):
                return True
            self.gap = ""
            self.attempt()
            yield from self.skip_space(separators)
        return False

    def can_be_called(self, name: str) -> bool:
        """Whether a call of this name is one; where nothing else marks it, its name must."""
        return True

    def allows_key(self, key: str) -> bool:
        """Whether a call may have such a key beside its name and arguments."""
        return True

    def _text(self) -> Steps[str | None]:
        """What a whole string says; None when it is cut."""
        pieces: list[str] = []
        is_whole = yield from self.json_string(pieces.append)
        return "".join(pieces) if is_whole else None

    def _arguments(self, say: Callable[[str], None]) -> Steps[None]:
        """Arguments as they are, or those in a string, where a model wrote JSON into JSON."""
        char = yield from self.char()
        if char == '"':
            yield from self.json_string(say)
        elif char in ("{", "["):
            yield from self.json_value(say)
        else:
            pieces: list[str] = []
            yield from self.json_value(pieces.append)
            say("".join(pieces).removeprefix("null"))


def character(code: int) -> str:
    """A character by its number; a replacement where it has none."""
    return chr(code if code < 0xD800 or 0xE000 <= code < 0x110000 else _BROKEN)
