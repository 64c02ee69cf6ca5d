"""What models of each family write, by the published description of its format, and what it says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: The tools of every entry.
TOOLS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "units": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "places": {"type": "array", "items": {"type": "object"}},
        },
        "required": ["city"],
    },
    "get_time": {"type": "object", "properties": {}},
    "write_file": {
        "type": "object",
        "properties": {"path": {"type": "string"}, "content": {"type": "string"}, "overwrite": {"type": "boolean"}},
    },
}


@dataclass(frozen=True)
class Entry:
    """An answer as the model writes it, and what clients must see of it.

    Attributes:
        calls: name and arguments; arguments that are no JSON are cut.
        is_thinking: the prompt has opened the reasoning.
        is_cut: it ends where max_tokens did.
    """

    raw: str
    text: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    reasoning: str = ""
    is_thinking: bool = False
    is_cut: bool = False
