"""The tools that a request offers: their names, and what their schemas say of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class Tools:
    """The functions that a request offers, by name, with the JSON schema of their parameters."""

    def __init__(self, functions: Mapping[str, Mapping[str, Any]]) -> None:
        self._functions = functions

    @property
    def names(self) -> Sequence[str]:
        """All."""
        return list(self._functions)

    def __contains__(self, name: object) -> bool:
        return name in self._functions

    def schema_of(self, name: str) -> Mapping[str, Any]:
        """The schema of a tool's parameters."""
        return self._functions[name] or {"type": "object"}

    def parameters(self, name: str) -> Sequence[str]:
        """The names of a tool's parameters, in the schema's order."""
        properties = self._functions.get(name, {}).get("properties")
        return list(properties) if isinstance(properties, Mapping) else []

    def types_of(self, name: str, parameter: str) -> frozenset[str]:
        """The JSON types that a parameter may have; empty where the schema doesn't say."""
        root = self._functions.get(name, {})
        properties = root.get("properties")
        return _types(properties.get(parameter) if isinstance(properties, Mapping) else None, root, 0)


_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def _types(schema: Any, root: Mapping[str, Any], depth: int) -> frozenset[str]:
    if not isinstance(schema, Mapping) or depth > 8:
        return frozenset()
    told = schema.get("type")
    if isinstance(told, (str, list)):
        return frozenset(one for one in ([told] if isinstance(told, str) else told) if isinstance(one, str))
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list):
        return frozenset(_TYPES.get(type(value), "null") for value in values)
    if isinstance(reference := schema.get("$ref"), str):
        found: Any = root
        for part in reference.removeprefix("#/").split("/"):
            found = found.get(part) if isinstance(found, Mapping) else None
        return _types(found, root, depth + 1)
    ways = [one for key in ("anyOf", "oneOf", "allOf") if isinstance(schema.get(key), list) for one in schema[key]]
    return frozenset().union(*(_types(one, root, depth + 1) for one in ways))
