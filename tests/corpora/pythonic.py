"""Llama 3.2 and 4."""

from __future__ import annotations

from tests.corpora import Entry

ENTRIES = {
    "one call": Entry('[get_weather(city="Paris")]', "", [("get_weather", {"city": "Paris"})]),
    "several": Entry(
        "[get_weather(city='Paris', days=3), get_time()]",
        "",
        [("get_weather", {"city": "Paris", "days": 3}), ("get_time", {})],
    ),
    "in tokens": Entry("<|python_start|>[get_time()]<|python_end|>", "", [("get_time", {})]),
    "values": Entry(
        "[get_weather(city='it\\'s \\u00e9\\x41 🌊 \"x\"', days=-1.5e3, units=None, places=[{'a': True, \"b\": (1, [])}, {}, "
        "{1: {}}],)]",
        "",
        [
            (
                "get_weather",
                {
                    "city": 'it\'s éA 🌊 "x"',
                    "days": -1500.0,
                    "units": None,
                    "places": [{"a": True, "b": [1, []]}, {}, {"1": {}}],
                },
            )
        ],
    ),
    "long strings": Entry(
        "[write_file(path=\"\", content='''a \"b\"\n\\n\\d''', overwrite=False)]",
        "",
        [("write_file", {"path": "", "content": 'a "b"\n\n\\d', "overwrite": False})],
    ),
    "text before and after": Entry("I look:\n\n[get_time()]\n\nDone [1].", "I look:\n\nDone [1].", [("get_time", {})]),
    "a link": Entry("[get_weather](http://x) and [a(b)]", "[get_weather](http://x) and [a(b)]"),
    "a list": Entry("Look:\n[1, 2]\n[x()]", "Look:\n[1, 2]\n[x()]"),
    "broken within": Entry("[get_weather(city=where, days=1)] x", "city=where, days=1)] x", [("get_weather", {})]),
    "cut": Entry('[get_weather(city="Pa', "", [("get_weather", '{"city": "Pa')], is_cut=True),
    "cut in a number": Entry("[get_weather(days=12", "", [("get_weather", '{"days": 12')], is_cut=True),
    "cut in a name": Entry("[get_wea", "[get_wea", is_cut=True),
    "without brackets": Entry("<|python_start|>get_time()<|python_end|>\nSo.", "\nSo.", [("get_time", {})]),
    "by position": Entry('[get_weather("Paris", 3)]', "", [("get_weather", {"city": "Paris", "days": 3})]),
    "too many": Entry("[get_time(1)] x", "1)] x", [("get_time", {})]),
    "numbers": Entry(
        "[get_weather(places=[.5, 5., +5, 1_000, -0, 1e3, 0x])]",
        "0x])]",
        [("get_weather", '{"places": [0.5, 5.0, 5, 1000, 0, 1000.0, ')],
    ),
    "strings beside each other": Entry(
        "[get_weather(city='a' \"b\"\n + 'c', days=1)]", "", [("get_weather", {"city": "abc", "days": 1})]
    ),
    "a call within": Entry("[get_weather(get_time())]", "get_time())]", [("get_weather", {})]),
    "more than values": Entry(
        '[get_weather(city="x", days=3*2)] y', "*2)] y", [("get_weather", {"city": "x", "days": 3})]
    ),
    "unpacked": Entry('[get_weather(city="x", **more)]', "**more)]", [("get_weather", {"city": "x"})]),
    "cut in a key": Entry('[get_weather(city="x", da', "", [("get_weather", '{"city": "x"')], is_cut=True),
}
