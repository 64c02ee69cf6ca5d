"""DeepSeek V3, R1 and V3.1."""

from __future__ import annotations

from tests.corpora import Entry

BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEP, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
FENCED = f'{CALL}function{SEP}get_weather\n```json\n{{"city": "Paris"}}\n```{CALL_END}'
PLAIN = f'{CALL}get_weather{SEP}{{"city": "Paris 🌊", "places": [{{"a": "}}```"}}]}}{CALL_END}'

ENTRIES = {
    "fenced": Entry(BEGIN + FENCED + END, "", [("get_weather", {"city": "Paris"})]),
    "several fenced": Entry(
        f"I look.\n{BEGIN}{FENCED}\n{FENCED}{END}",
        "I look.",
        [("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Paris"})],
    ),
    "plain": Entry(
        f"{BEGIN}{PLAIN}{CALL}get_time{SEP}{{}}{CALL_END}{END}",
        "",
        [("get_weather", {"city": "Paris 🌊", "places": [{"a": "}```"}]}), ("get_time", {})],
    ),
    "text after": Entry(
        f"{BEGIN}{PLAIN}{END}\nSo.", "\nSo.", [("get_weather", {"city": "Paris 🌊", "places": [{"a": "}```"}]})]
    ),
    "no arguments": Entry(f"{BEGIN}{CALL}function{SEP}get_time\n{CALL_END}{END}", "", [("get_time", {})]),
    "cut": Entry(f'{BEGIN}{CALL}function{SEP}get_weather\n```json\n{{"ci', "", [("get_weather", '{"ci')], is_cut=True),
    "cut in the name": Entry(f"{BEGIN}{CALL}get_w", f"{BEGIN}{CALL}get_w", is_cut=True),
    "garbage": Entry(f"a{BEGIN}b{END}c", f"a{BEGIN}b{END}c"),
    "reasoning": Entry(
        f"They ask.\n</think>\n\n{BEGIN}{FENCED}{END}", "", [("get_weather", {"city": "Paris"})], "They ask.", True
    ),
    "no arguments, plain": Entry(f"{BEGIN}{CALL}get_time{SEP}{CALL_END}{END}", "", [("get_time", {})]),
    "null arguments": Entry(f"{BEGIN}{CALL}get_time{SEP}null{CALL_END}{END}", "", [("get_time", {})]),
    "an empty list": Entry(f"{BEGIN}{CALL}get_time{SEP}[]{CALL_END}{END}", "", [("get_time", {})]),
    "all in a line": Entry(
        f'{BEGIN}{CALL}function{SEP}get_time```json\n{{}}\n```{CALL_END}{CALL}function{SEP}get_weather {{"city": "x"}}'
        f"{CALL_END}{END}",
        "",
        [("get_time", {}), ("get_weather", {"city": "x"})],
    ),
    "a tool of that name": Entry(f'{BEGIN}{CALL}function{SEP}{{"a": 1}}{CALL_END}{END}', "", [("function", {"a": 1})]),
    "a call and a broken one": Entry(
        f"{BEGIN}{CALL}get_time{SEP}{{}}{CALL_END}{CALL}lost text{CALL_END}{END}tail",
        f"{CALL}lost text{CALL_END}{END}tail",
        [("get_time", {})],
    ),
}
