"""Hermes and Qwen."""

from __future__ import annotations

from tests.corpora import Entry

PARIS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
NESTED = {"city": "São Paulo 🌊", "places": [{"a": [1, {"b": "}]</tool_call>"}]}, {}], "units": None}

ENTRIES = {
    "one call": Entry(PARIS, "", [("get_weather", {"city": "Paris"})]),
    "text before and after": Entry(
        f"Let me look.\n\n{PARIS}\nThat was it.", "Let me look.\nThat was it.", [("get_weather", {"city": "Paris"})]
    ),
    "several": Entry(
        PARIS + '\n<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>\n',
        "",
        [("get_weather", {"city": "Paris"}), ("get_time", {})],
    ),
    "nested and unicode": Entry(
        '<tool_call>{"name": "get_weather", "arguments": {"city": "São Paulo 🌊", "places": [{"a": [1, '
        '{"b": "}]</tool_call>"}]}, {}], "units": null}}</tool_call>',
        "",
        [("get_weather", NESTED)],
    ),
    "escapes": Entry(
        r'<tool_call>{"name": "write_file", "arguments": {"path": "C:\\a\"b", "content": "\u00e9\n\ud83c\udf0a"}}</tool_call>',
        "",
        [("write_file", {"path": 'C:\\a"b', "content": "é\n🌊"})],
    ),
    "arguments before the name": Entry(
        '<tool_call>{"arguments": {"city": "Rome"}, "name": "get_weather"}</tool_call>',
        "",
        [("get_weather", {"city": "Rome"})],
    ),
    "arguments as a string": Entry(
        r'<tool_call>{"name": "get_weather", "arguments": "{\"city\": \"R\\u00e9\"}"}</tool_call>',
        "",
        [("get_weather", {"city": "Ré"})],
    ),
    "as OpenAI has it": Entry(
        '<tool_call>{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}</tool_call>',
        "",
        [("get_weather", {"city": "Oslo"})],
    ),
    "no arguments": Entry('<tool_call>{"name": "get_time"}</tool_call>', "", [("get_time", {})]),
    "null arguments": Entry('<tool_call>{"name": "get_time", "arguments": null}</tool_call>', "", [("get_time", {})]),
    "no closing tag": Entry(
        '<tool_call>{"name": "get_time", "arguments": {}}\n<tool_call>{"name": "get_time", "arguments": {}}',
        "",
        [("get_time", {}), ("get_time", {})],
    ),
    "a brace too many": Entry(
        '<tool_call>{"name": "get_time", "arguments": {}}}\n</tool_call>done', "done", [("get_time", {})]
    ),
    "an unknown tool": Entry(
        '<tool_call>{"name": "fly", "arguments": {"to": "Mars"}}</tool_call>', "", [("fly", {"to": "Mars"})]
    ),
    "cut in the arguments": Entry(
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Par',
        "",
        [("get_weather", '{"city": "Par')],
        is_cut=True,
    ),
    "cut before the arguments": Entry('<tool_call>{"name": "get_time", ', "", [("get_time", "")], is_cut=True),
    "cut in the name": Entry('Hm. <tool_call>{"name": "get_wea', 'Hm. <tool_call>{"name": "get_wea', is_cut=True),
    "garbage": Entry("a <tool_call> b {c} </tool_call> d", "a <tool_call> b {c} </tool_call> d"),
    "an empty call": Entry("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>"),
    "plain": Entry("  Just <tool text & more.\n\n", "  Just <tool text & more.\n\n"),
    "empty": Entry("", ""),
    "reasoning": Entry("<think>\nHm, <tool_call>?\n</think>\n\nYes.", "Yes.", reasoning="Hm, <tool_call>?"),
    "reasoning and a call": Entry(
        f"<think>\nI must look.\n</think>\n\n{PARIS}", "", [("get_weather", {"city": "Paris"})], "I must look."
    ),
    "opened by the prompt": Entry(
        f"\nI must look.\n</think>\n\nSo.\n{PARIS}", "So.", [("get_weather", {"city": "Paris"})], "I must look.", True
    ),
    "opened twice": Entry("<think>\na</think>b", "b", reasoning="a", is_thinking=True),
    "nothing thought": Entry("<think>\n\n</think>\n\nYes.", "Yes."),
    "cut in the reasoning": Entry("I wonder </th", "", reasoning="I wonder </th", is_thinking=True, is_cut=True),
    "a tag in the answer": Entry("Use <think> and </think>.", "Use <think> and </think>."),
    "two in one tag": Entry(
        '<tool_call>{"name": "get_time", "arguments": {}}\n{"name": "get_weather", "arguments": {"city": "x"}}</tool_call>',
        "",
        [("get_time", {}), ("get_weather", {"city": "x"})],
    ),
    "a list in the tag": Entry(
        '<tool_call>[{"name": "get_time", "arguments": {}}, {"name": "get_time"}]</tool_call>\nDone.',
        "\nDone.",
        [("get_time", {}), ("get_time", {})],
    ),
    "arguments twice": Entry(
        '<tool_call>{"name": "get_time", "arguments": {"a": 1}, "arguments": {"a": 2}, "args": {}}</tool_call>',
        "",
        [("get_time", {"a": 1})],
    ),
    "a call and garbage": Entry(
        '<tool_call>{"name": "get_time", "arguments": {}} {"x": 1}</tool_call>.',
        ' {"x": 1}</tool_call>.',
        [("get_time", {})],
    ),
    "much white space": Entry("a" + " " * 200 + PARIS, "a" + " " * 136, [("get_weather", {"city": "Paris"})]),
}
