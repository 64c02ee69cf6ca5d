"""Calls whose parameters are written one by one, as text: typed by the tool's schema, and told as JSON as they come."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence

from dynamo_frontend.parsers.base import Parser, Steps, quoted


class TaggedParser(Parser):
    """Makes an object of parameters."""

    _num_parameters = 0

    def begin_call(self, name: str, call_id: str = "") -> None:
        super().begin_call(name, call_id)
        self._num_parameters = 0

    def parameter(self, name: str, key: str, ends: Sequence[str], *, is_text: bool | None = None) -> Steps[str | None]:
        """Read a value up to one of `ends`, which is taken; text is told as it comes, other values when they are whole.

        Args:
            is_text: what the model says of it, where it does; else the schema decides.

        Returns:
            What ended it; None at the end of the answer.
        """
        self.arguments(", " if self._num_parameters else "{")
        self.arguments(f'"{quoted(key)}": ')
        self._num_parameters += 1
        types = self.tools.types_of(name, key)
        if is_text or (is_text is None and types <= {"string"}):
            self.arguments('"')
            yield from self._first_line()
            end = yield from self.until(*ends, say=lambda text: self.arguments(quoted(text)), trims=False)
            if end is not None:
                self.arguments('"')
            return end
        pieces: list[str] = []
        yield from self._first_line()
        end = yield from self.until(*ends, say=pieces.append, trims=False)
        value = "".join(pieces)
        if end is None:  # it is cut
            self.arguments(value)
        elif is_text is None and types <= {"string", "null"} and value.strip() not in ("null", "None"):
            self.arguments(f'"{quoted(value)}"')
        else:
            self.arguments(_as_json(value))
        return end

    def _first_line(self) -> Steps[None]:
        """What stands between the tag and the value."""
        yield from ()

    def end_call(self) -> None:
        if self._num_parameters:
            self.arguments("}")
        super().end_call()


def _as_json(text: str) -> str:
    """A value that isn't text, as JSON; what can't be read as a value is text after all."""
    for read in (json.loads, ast.literal_eval):
        try:
            return json.dumps(read(text.strip()), ensure_ascii=False, allow_nan=False)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return json.dumps(text, ensure_ascii=False)
