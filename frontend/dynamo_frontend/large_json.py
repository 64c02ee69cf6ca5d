"""JSON of large bodies. A parser looks at each character of a string; those of megabytes, pictures, stay out of it."""

from __future__ import annotations

import secrets
from typing import Any

import orjson

#: Bytes of a string that is left out.
_LONG = 64 * 1024
#: All the rest is looked through for where they were: bytes of it, and values, one more than commas.
_MAX_REST, _MAX_COMMAS = 256 * 1024, 10_000
#: What may follow the quote that ends a string.
_BEHIND = b" \t\r\n,:]}"
#: Stands for a string that was left out; nobody can write it into a body.
_MARK = secrets.token_hex(16)


def loads(body: bytes | bytearray) -> Any:
    """The value of a body; long strings without escapes are taken as they stand.

    Raises:
        orjson.JSONDecodeError: it is no JSON. (A control character other than a newline in a long string goes through.)
    """
    places = _long_strings(body)
    if not places or len(body) - sum(end - start for start, end in places) > _MAX_REST:
        return orjson.loads(body)
    pieces: list[bytes | bytearray] = []
    left_out, at = {}, 0
    for number, (start, end) in enumerate(places):
        mark = f"{_MARK}{number}"
        pieces += [body[at:start], mark.encode()]
        left_out[mark], at = memoryview(body)[start:end], end
    rest = b"".join([*pieces, body[at:]])
    if rest.count(b",") > _MAX_COMMAS:
        return orjson.loads(body)
    try:
        root = [orjson.loads(rest)]
        _put_back(root, {mark: str(text, "utf-8") for mark, text in left_out.items()})
    except (KeyError, ValueError):  # one is a key, or no UTF-8; or it is no JSON, and the parser says where
        return orjson.loads(body)
    return root[0]


def _long_strings(body: bytes | bytearray) -> list[tuple[int, int]]:
    """Where those begin and end that have no escapes. One look at every half of such a length meets all of them."""
    found: list[tuple[int, int]] = []
    at, end = _LONG // 2, 0
    while at < len(body):
        start = body.rfind(b'"', end, at) + 1
        end = body.find(b'"', at)
        if end < 0:
            break
        if start and end - start >= _LONG and _is_string(body, start, end):
            found.append((start, end))
        at = end + _LONG // 2
    return found


def _is_string(body: bytes | bytearray, start: int, end: int) -> bool:
    """Whether a string without escapes is between two quotes, if the body is JSON: the first may end another one."""
    begins = body[start] not in _BEHIND and body[start - 2 : start - 1] != b"\\"
    return begins and body.find(b"\\", start, end) < 0 and body.find(b"\n", start, end) < 0


def _put_back(root: list[Any], left_out: dict[str, str]) -> None:
    """Put each string where its mark is.

    Raises:
        KeyError: one is nowhere: it was a key, or the value of a field that came twice.
    """
    waiting: list[Any] = [root]
    while waiting:
        value = waiting.pop()
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(inner, str):
                if inner.startswith(_MARK):
                    value[key] = left_out.pop(inner)
            elif isinstance(inner, dict | list):
                waiting.append(inner)
    if left_out:
        raise KeyError(next(iter(left_out)))
