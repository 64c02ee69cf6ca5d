"""Calls that a request forces, where the worker is held to a JSON schema: the answer is the call, and nothing else."""

from __future__ import annotations

from typing import Any

from dynamo_frontend.parsers.base import Steps, Tools
from dynamo_frontend.parsers.calls import JsonParser


class Forced(JsonParser):
    """Reads the arguments of the one tool that there is, or a list of calls."""

    def answer(self) -> Steps[None]:
        names = self.tools.names
        self.attempt()
        yield from self.skip_space()
        char = yield from self.char()
        if char == "{" and len(names) == 1:
            self.begin_call(names[0])
            yield from self.json_value(self.arguments)
        elif (yield from self.match("[")):
            yield from self.skip_space()
            while (yield from self.char()) == "{" and (yield from self.call_object()):
                self.attempt()
                yield from self.skip_space(",")
            yield from self.match("]")
            if not self.num_calls:
                self.give_up()
            self.commit()
        else:
            self.rewind()


def schema_of(tools: Tools, *, one: bool, several: bool) -> dict[str, Any]:
    """The JSON schema of an answer that `Forced` reads.

    Args:
        one: the one tool there is must be called, so the answer is its arguments.
        several: more than one call is allowed.
    """
    if one:
        return dict(tools.schema_of(tools.names[0]))
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "parameters": tools.schema_of(name)},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for name in tools.names
    ]
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    return schema if several else {**schema, "maxItems": 1}
