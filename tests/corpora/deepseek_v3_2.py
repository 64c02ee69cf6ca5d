"""DeepSeek V3.2."""

from __future__ import annotations

from tests.corpora import Entry

D = "｜DSML｜"
PARIS = (
    f'<{D}function_calls>\n<{D}invoke name="get_weather">\n<{D}parameter name="city" string="true">Paris</{D}parameter>\n'
    f'<{D}parameter name="days" string="false">3</{D}parameter>\n</{D}invoke>\n'
)

ENTRIES = {
    "one call": Entry(f"{PARIS}</{D}function_calls>", "", [("get_weather", {"city": "Paris", "days": 3})]),
    "several with text": Entry(
        f'I look.\n\n{PARIS}<{D}invoke name="get_time">\n</{D}invoke>\n</{D}function_calls>\nSo.',
        "I look.\nSo.",
        [("get_weather", {"city": "Paris", "days": 3}), ("get_time", {})],
    ),
    "nested": Entry(
        f'<{D}function_calls><{D}invoke name="get_weather"><{D}parameter name="places" string="false">'
        f'[{{"a": "🌊"}}]</{D}parameter></{D}invoke></{D}function_calls>',
        "",
        [("get_weather", {"places": [{"a": "🌊"}]})],
    ),
    "cut": Entry(
        f'<{D}function_calls>\n<{D}invoke name="get_weather">\n<{D}parameter name="city" string="true">P',
        "",
        [("get_weather", '{"city": "P')],
        is_cut=True,
    ),
    "garbage": Entry(f"a <{D}function_calls> b", f"a <{D}function_calls> b"),
    "reasoning": Entry(
        f"Hm.</think>{PARIS}</{D}function_calls>", "", [("get_weather", {"city": "Paris", "days": 3})], "Hm.", True
    ),
    "lines in a value": Entry(
        f'<{D}function_calls><{D}invoke name="write_file"><{D}parameter name="content" string="true">\nline\n</{D}parameter>'
        f"</{D}invoke></{D}function_calls>",
        "",
        [("write_file", {"content": "\nline\n"})],
    ),
    "a tag left out": Entry(
        f'<{D}function_calls><{D}invoke name="get_weather"><{D}parameter name="city" string="true">Paris</{D}invoke>'
        f"</{D}function_calls>\nSo.",
        "\nSo.",
        [("get_weather", {"city": "Paris"})],
    ),
    "a call and a broken one": Entry(
        f'{PARIS}<{D}invoke name="lost\ntext</{D}invoke></{D}function_calls>',
        f'\n<{D}invoke name="lost\ntext</{D}invoke></{D}function_calls>',
        [("get_weather", {"city": "Paris", "days": 3})],
    ),
}
