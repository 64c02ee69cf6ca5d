"""Long strings that are left out of the parser come back in their places: the value is the parser's own."""

from __future__ import annotations

import json
import re
from typing import Any

import orjson
import pytest
from dynamo_frontend import large_json
from hypothesis import given, settings
from hypothesis import strategies as st

URL = "data:image/png;base64," + "QUJD" * 30_000
DATA = "QUJD" * 30_000


def picture(url: str) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "x"}],
    }


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What the parser was given."""
    seen: list[bytes] = []

    def loads(body: bytes) -> Any:
        seen.append(body)
        return orjson.loads(body)

    class Watched:
        JSONDecodeError = orjson.JSONDecodeError

    Watched.loads = staticmethod(loads)  # type: ignore[attr-defined]
    monkeypatch.setattr(large_json, "orjson", Watched)
    return seen


LEFT_OUT = [
    {"model": "m", "messages": [picture(URL)]},
    {"messages": [picture(URL), picture(URL[:-4]), picture("data:image/png;base64,QUJD")]},
    {"content": [{"source": {"type": "base64", "media_type": "image/png", "data": DATA}}]},
    {"a": ['a "quote"', "data", '\\"data:', URL, {"data": {"data": "short"}}], "b": "é"},
    [[[[URL]]]],
    {"text": "say " + DATA + "é🌊", "more": ["é" * 50_000, "x" * 65_536]},
    ["x" * 30_000, "y" * 40_000, {"z": "z" * 66_000}, "x" * 40_000],
    URL,
]


@pytest.mark.parametrize("value", LEFT_OUT, ids=range(len(LEFT_OUT)))
@pytest.mark.parametrize("indent", [None, 2])
def test_long_strings_are_left_out(value: object, indent: int | None, parsed: list[bytes]) -> None:
    body = json.dumps(value, indent=indent, ensure_ascii=False).encode()
    assert large_json.loads(body) == value
    assert len(parsed) == 1
    assert len(parsed[0]) < 120_000


TAKEN_WHOLE = [
    {URL: 1},
    {"a": {URL: URL}},
    {"text": f'"{URL}"'},
    {"text": f'say "{DATA}" and "{DATA}"'},
    {"text": DATA + "\\"},
    {"text": ", a string" + DATA},
    {"a": "x", "numbers": [1] * 40_000, "b": "y"},
    {"text": [0] * 200_000, "url": URL},
    {"text": [0] * 20_000, "url": URL},
]


@pytest.mark.parametrize("value", TAKEN_WHOLE, ids=range(len(TAKEN_WHOLE)))
def test_what_is_no_such_string_is_parsed(value: object, parsed: list[bytes]) -> None:
    body = json.dumps(value).encode()
    assert large_json.loads(body) == value
    assert parsed[-1] == body


def test_a_field_that_comes_twice_is_its_last() -> None:
    body = f'{{"data": "{DATA}", "data": 1, "url": "{URL}"}}'.encode()
    assert large_json.loads(body) == {"data": 1, "url": URL}


@pytest.mark.parametrize(
    "body",
    [
        f'{{"a": "{URL}',
        f'{{"a": "{URL}"',
        f'{{"a": "x"{URL}"}}',
        f'{{"a" "{URL}"}}',
        f'{{"a": "{URL}\n"}}',
        f'{{"data" : {DATA}"}}',
        f'{{"a": "{DATA}",}}',
        f'{{"a": "{DATA}\udcff"}}',
    ],
)
def test_broken_bodies(body: str) -> None:
    data = body.encode(errors="surrogateescape")
    with pytest.raises(orjson.JSONDecodeError) as expected:
        orjson.loads(data)
    with pytest.raises(orjson.JSONDecodeError, match=re.escape(str(expected.value))):
        large_json.loads(data)


TEXT = st.text(max_size=5) | st.sampled_from([URL, DATA, "x" * 40_000, "é" * 33_000, URL + '"', "\\" + URL, ":" + DATA])
VALUES = st.recursive(
    TEXT | st.none() | st.integers(-9, 9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["data", "url", "x", URL]), inner),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(VALUES, st.booleans())
def test_any_value_is_the_parsers_own(value: object, is_ascii: bool) -> None:
    assert large_json.loads(json.dumps(value, ensure_ascii=is_ascii).encode()) == value
