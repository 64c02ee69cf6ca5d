"""What single tokens say, as text and as bytes: for log probabilities, which name tokens one by one."""

from __future__ import annotations

import re
from typing import NamedTuple

from dynamo_frontend.vocabularies import AnyTokenizer, BytesTokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_REPLACEMENT = "\ufffd"


def _alphabet() -> dict[str, int]:
    """How byte-level tokenizers write bytes: printable ones as they are, the others as characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shown = {chr(byte): byte for byte in printable}
    return shown | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTES = _alphabet()


class Spelled(NamedTuple):
    """One token: its text, where bytes that are no whole character are escaped, and its bytes."""

    text: str
    data: bytes
    is_special: bool = False


class Spelling:
    """Tokens of one tokenizer, each looked at once."""

    def __init__(self, tokenizer: AnyTokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, Spelled] = {}
        self._special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}

    def __getitem__(self, token_id: int) -> Spelled:
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = self._spell(token_id)
        return found

    def _spell(self, token_id: int) -> Spelled:
        # some decoders leave out the space before the first token: what it says is seen behind another one
        alone = self._tokenizer.decode([token_id], skip_special_tokens=False)
        text = self._tokenizer.decode([token_id, token_id], skip_special_tokens=False)[len(alone) :]
        if _REPLACEMENT not in text:
            return Spelled(text, text.encode(), token_id in self._special)
        raw = self._tokenizer.id_to_token(token_id) or ""
        if isinstance(self._tokenizer, BytesTokenizer):
            data = self._tokenizer.say(token_id)
        elif match := _BYTE.fullmatch(raw):
            data = bytes([int(match[1], 16)])
        elif raw and all(char in _BYTES for char in raw):
            data = bytes(_BYTES[char] for char in raw)
        else:
            return Spelled(text, text.encode())
        return Spelled(_escaped(data), data)


def _escaped(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "".join(chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}" for byte in data)
