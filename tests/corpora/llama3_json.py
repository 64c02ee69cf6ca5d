"""Llama 3."""

from __future__ import annotations

from tests.corpora import Entry

ENTRIES = {
    "one call": Entry(
        '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [("get_weather", {"city": "Paris"})]
    ),
    "behind the tag": Entry(
        '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}',
        "",
        [("get_weather", {"city": "Paris"})],
    ),
    "several": Entry(
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}; '
        '{"name": "get_time", "parameters": {}}',
        "",
        [("get_weather", {"city": "Paris"}), ("get_time", {})],
    ),
    "several lines": Entry(
        '{"name": "get_time", "parameters": {}}\n{"name": "get_time", "parameters": {}}',
        "",
        [("get_time", {}), ("get_time", {})],
    ),
    "text before and after": Entry(
        'I look.\n{"name": "get_weather", "parameters": {"city": "Zürich 🌊", "days": 3}}\nSo much.',
        "I look.\nSo much.",
        [("get_weather", {"city": "Zürich 🌊", "days": 3})],
    ),
    "other JSON": Entry('{"answer": 42, "name": "get_weather"}', '{"answer": 42, "name": "get_weather"}'),
    "another name": Entry(
        'Say:\n\n{"name": "Ada", "parameters": {}}\n{x', 'Say:\n\n{"name": "Ada", "parameters": {}}\n{x'
    ),
    "nested": Entry(
        '{"name": "get_weather", "parameters": {"city": "a\\"};{", "places": [{"b": [[]]}]}}',
        "",
        [("get_weather", {"city": 'a"};{', "places": [{"b": [[]]}]})],
    ),
    "code behind the tag": Entry("<|python_tag|>print(1)", "<|python_tag|>print(1)"),
    "a call and JSON": Entry(
        '{"name": "get_time", "parameters": {}}; {"answer": 1}', '; {"answer": 1}', [("get_time", {})]
    ),
    "cut": Entry(
        '{"name": "get_weather", "parameters": {"city": "Pa', "", [("get_weather", '{"city": "Pa')], is_cut=True
    ),
    "cut in the name": Entry('{"name": "get_w', '{"name": "get_w', is_cut=True),
    "plain": Entry("Sets are { } and\nlists [ ].", "Sets are { } and\nlists [ ]."),
    "a list": Entry(
        '<|python_tag|>[{"name": "get_time", "parameters": {}}, {"name": "get_weather", "parameters": {"city": "x"}}]',
        "",
        [("get_time", {}), ("get_weather", {"city": "x"})],
    ),
    "a list of others": Entry('See:\n[{"name": "Ada"}]\n[1]', 'See:\n[{"name": "Ada"}]\n[1]'),
}
