"""Mistral."""

from __future__ import annotations

from tests.corpora import Entry

ENTRIES = {
    "a list": Entry(
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, '
        '{"name": "get_time", "arguments": {}, "id": "a1B2c3D4e"}]',
        "",
        [("get_weather", {"city": "Paris"}), ("get_time", {})],
    ),
    "a token for each": Entry(
        '[TOOL_CALLS]get_weather{"city": "Paris 🌊", "places": [{"a": "[TOOL_CALLS]"}]}[TOOL_CALLS]get_time{}',
        "",
        [("get_weather", {"city": "Paris 🌊", "places": [{"a": "[TOOL_CALLS]"}]}), ("get_time", {})],
    ),
    "with ids": Entry(
        '[TOOL_CALLS]get_weather[CALL_ID]a1B2c3D4e[ARGS]{"city": "Paris"}', "", [("get_weather", {"city": "Paris"})]
    ),
    "with text": Entry(
        'I look.\n[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}\nWell.',
        "I look.\nWell.",
        [("get_weather", {"city": "Paris"})],
    ),
    "no list": Entry('[TOOL_CALLS]{"name": "get_time", "arguments": {}}', "", [("get_time", {})]),
    "cut in a list": Entry(
        '[TOOL_CALLS] [{"name": "get_time", "arguments": {}}, {"name": "get_weather", "arguments": {"ci',
        "",
        [("get_time", {}), ("get_weather", '{"ci')],
        is_cut=True,
    ),
    "a broken list": Entry(
        '[TOOL_CALLS] [{"name": "get_time", "arguments": {}}, {"x": 1}] end', ', {"x": 1}] end', [("get_time", {})]
    ),
    "garbage": Entry("[TOOL_CALLS] [1, 2]", "[TOOL_CALLS] [1, 2]"),
    "nothing": Entry("a [TOOL_CALLS]", "a [TOOL_CALLS]"),
    "brackets": Entry("a[0] and [TOOL] and [", "a[0] and [TOOL] and ["),
    "thinking": Entry("[THINK]Hm.[/THINK][TOOL_CALLS]get_time[ARGS]{}", "", [("get_time", {})], "Hm."),
    "one and a line": Entry('[TOOL_CALLS] {"name": "get_time", "arguments": {}}\n', "", [("get_time", {})]),
}
