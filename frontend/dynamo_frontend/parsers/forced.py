"""Calls that a request forces, where the worker is held to a JSON schema: the answer is the call, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynamo_frontend.parsers.base import Steps
from dynamo_frontend.parsers.calls import JsonParser
from dynamo_frontend.parsers.tools import Tools


class Forced(JsonParser):
    """Reads the arguments of the one tool that there is, or a list of calls."""

    def parse(self) -> Steps[None]:
        if self.is_in_reasoning:  # a worker may be held to the call from its first character on
            self.attempt()
            yield from self.skip_space()
            self.is_in_reasoning = (yield from self.char()) not in ("{", "[")
            self.rewind()
        if self.is_in_reasoning:
            yield from super().parse()
            return
        yield from self.answer()
        yield from self.text_until()

    def answer(self) -> Steps[None]:
        names = self.tools.names
        self.attempt()
        yield from self.skip_space()
        char = yield from self.char()
        if char == "{" and len(names) == 1:
            self.begin_call(names[0])
            yield from self.json_value(self.arguments)
            yield from self.close_call()
        elif (yield from self.match("[")):
            yield from self.skip_space()
            is_broken = yield from self.call_objects(",")
            if is_broken or not self.num_calls:
                self.give_up()
            else:
                yield from self.match("]")
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
    shared: dict[str, Any] = {}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "parameters": _hoisted(name, tools.schema_of(name), shared)},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for name in tools.names
    ]
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    schema |= {"$defs": shared} if shared else {}
    return schema if several else {**schema, "maxItems": 1}


_DEFINITIONS = ("$defs", "definitions")


def _hoisted(name: str, schema: Mapping[str, Any], shared: dict[str, Any]) -> Any:
    """A tool's schema as a part of another: what it refers to moves to the root, under names of its own."""
    own = {(where, key): value for where in _DEFINITIONS for key, value in (schema.get(where) or {}).items()}

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(one) for one in value]
        if not isinstance(value, Mapping):
            return value
        return {key: _reference(one) if key == "$ref" else moved(one) for key, one in value.items()}

    def _reference(value: Any) -> Any:
        parts = value.split("/") if isinstance(value, str) else []
        if len(parts) >= 3 and parts[0] == "#" and (parts[1], parts[2]) in own:
            return "/".join(["#", "$defs", f"{name}.{parts[2]}", *parts[3:]])
        return value

    for (_, key), value in own.items():
        shared[f"{name}.{key}"] = moved(value)
    return moved({key: value for key, value in schema.items() if key not in _DEFINITIONS})
