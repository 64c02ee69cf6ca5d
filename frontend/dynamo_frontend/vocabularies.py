"""Tokenizers that aren't in a tokenizer.json: tiktoken's and sentencepiece's files, through their own libraries.

They have the methods of `tokenizers.Tokenizer` that are used here, so nothing else knows of them. The tokens of both
are bytes, so text comes back byte by byte: no token depends on those before it.
"""

from __future__ import annotations

import base64
import codecs
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from tokenizers import AddedToken, Tokenizer

from dynamo_grpc import ConfigurationError

_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")
#: How families split text whose files don't say it.
_PATTERNS = {
    "QWenTokenizer": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
}
_WHITE = "▁"


class Encoded(NamedTuple):
    """The token ids of a text."""

    ids: list[int]


class BytesTokenizer(ABC):
    """A tokenizer whose tokens are bytes.

    Args:
        added: tokens that aren't the library's, or that it doesn't look for in text, by id.
        first: tokens that stand before a whole text.
        last: and behind it.
    """

    def __init__(self, added: Mapping[int, AddedToken], first: Sequence[int], last: Sequence[int]) -> None:
        self._added, self._first, self._last = dict(added), list(first), list(last)
        self._ids = {token.content: number for number, token in added.items()}
        contents = sorted((re.escape(content) for content in self._ids if content), key=len, reverse=True)
        self._splits = re.compile(f"({'|'.join(contents)})" if contents else r"(?!)")

    @abstractmethod
    def encode_text(self, text: str) -> list[int]:
        """The ids of text without added tokens."""

    @abstractmethod
    def bytes_of(self, token_id: int) -> bytes:
        """What a token that isn't added says."""

    @abstractmethod
    def size(self) -> int:
        """So many ids there are, without those that are added."""

    def trimmed(self, text: str, token_ids: Sequence[int]) -> str:
        """A whole text, without what encoding had put before it."""
        return text

    def is_special(self, token_id: int) -> bool:
        """Whether a token is left out where special ones are."""
        return token_id in self._added and self._added[token_id].special

    def say(self, token_id: int) -> bytes:
        """What a token says; nothing where there is none: vocabularies of models are larger than their tokenizers'."""
        if token_id in self._added:
            return self._added[token_id].content.encode()
        return self.bytes_of(token_id) if 0 <= token_id < self.size() else b""

    # as tokenizers.Tokenizer has them

    def no_truncation(self) -> None:  # noqa: B027 - nothing is to be done
        """It never truncates."""

    no_padding = no_truncation

    def get_vocab(self) -> dict[str, int]:
        """All tokens, by what they say."""
        return {self.say(number).decode(errors="replace"): number for number in (*range(self.size()), *self._added)}

    def get_added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The added tokens by id."""
        return self._added

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoded:
        """The ids of a text; added tokens in it are found."""
        ids: list[int] = []
        for piece in self._splits.split(text):
            if piece in self._ids:
                ids.append(self._ids[piece])
            elif piece:
                ids += self.encode_text(piece)
        return Encoded([*self._first, *ids, *self._last] if add_special_tokens else ids)

    def encode_batch_fast(self, texts: Iterable[str], add_special_tokens: bool = True) -> list[Encoded]:
        """As `encode`, for several."""
        return [self.encode(text, add_special_tokens) for text in texts]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        shown = [number for number in token_ids if not (skip_special_tokens and self.is_special(number))]
        return self.trimmed(b"".join(map(self.say, shown)).decode(errors="replace"), shown)

    def id_to_token(self, token_id: int) -> str | None:
        """What a token says, as text."""
        return self.say(token_id).decode(errors="replace")


#: What turns text into token ids and back.
AnyTokenizer: TypeAlias = Tokenizer | BytesTokenizer


class ByteStream:
    """Decodes tokens one after another, as `tokenizers.decoders.DecodeStream` does."""

    def __init__(self, *, skip_special_tokens: bool) -> None:
        self._skips = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, tokenizer: BytesTokenizer, token_id: int) -> str | None:
        """The text that a token completes; None in the middle of a character."""
        if self._skips and tokenizer.is_special(token_id):
            return ""
        return self._decoder.decode(tokenizer.say(token_id)) or None


class Tiktoken(BytesTokenizer):
    """tiktoken's.

    Args:
        ranks: the tokens' bytes by rank.
        pattern: how text is split.
        offset: ids are ranks and this.
    """

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        pattern: str,
        added: Mapping[int, AddedToken],
        first: Sequence[int] = (),
        offset: int = 0,
    ) -> None:
        tiktoken = _library("tiktoken")
        super().__init__(added, first, ())
        self._encoding = tiktoken.Encoding("model", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens={})
        self._offset = offset

    def encode_text(self, text: str) -> list[int]:
        ids = self._encoding.encode_ordinary(text)
        return [number + self._offset for number in ids] if self._offset else list(ids)

    def bytes_of(self, token_id: int) -> bytes:
        if token_id < self._offset:
            return b""
        try:
            return bytes(self._encoding.decode_single_token_bytes(token_id - self._offset))
        except KeyError:
            return b""

    def size(self) -> int:
        return int(self._encoding.n_vocab) + self._offset


class SentencePiece(BytesTokenizer):
    """sentencepiece's; bytes that stand for characters that it doesn't know come back as these characters."""

    def __init__(self, data: bytes, added: Mapping[int, AddedToken], config: Mapping[str, Any]) -> None:
        self._model = _library("sentencepiece").SentencePieceProcessor(model_proto=data)
        begins, ends = config.get("add_bos_token", True), config.get("add_eos_token", False)
        bos, eos = self._model.bos_id(), self._model.eos_id()
        control = {
            number: AddedToken(self._model.id_to_piece(number), special=True, normalized=False)
            for number in range(self._model.get_piece_size())
            if self._model.is_control(number)
        }
        super().__init__({**control, **added}, [bos] if begins and bos >= 0 else (), [eos] if ends and eos >= 0 else ())

    def encode_text(self, text: str) -> list[int]:
        return list(self._model.encode(text))

    def bytes_of(self, token_id: int) -> bytes:
        piece = self._model.id_to_piece(token_id)
        if self._model.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        if self._model.is_unknown(token_id):
            return " \u2047 ".encode()
        return bytes(piece.replace(_WHITE, " ").encode())

    def trimmed(self, text: str, token_ids: Sequence[int]) -> str:
        first = next((number for number in token_ids if not self.is_special(number)), None)
        is_put = first is not None and first not in self._added and self._model.id_to_piece(first).startswith(_WHITE)
        return text.removeprefix(" ") if is_put else text

    def size(self) -> int:
        return int(self._model.get_piece_size())


def tokenizer_of(files: Mapping[str, bytes], config: Mapping[str, Any]) -> AnyTokenizer | None:
    """The tokenizer in a model's files, by name; None where there is none.

    Args:
        config: what tokenizer_config.json says.

    Raises:
        ConfigurationError: its file can't be read; says which.
    """
    for name, read in _READERS:
        for found in sorted(files):
            if re.fullmatch(name, found):
                try:
                    return read(files[found], config)
                except ConfigurationError as error:
                    raise ConfigurationError(f"{found}: {error}") from error
                except Exception as error:  # the libraries raise plain ones
                    raise ConfigurationError(f"{found} can't be read: {error}") from error
    return None


def _read_json(data: bytes, config: Mapping[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(data.decode())


def _read_model(data: bytes, config: Mapping[str, Any]) -> BytesTokenizer:
    if _TIKTOKEN_LINE.match(data):  # some models give tiktoken's files this name
        return _read_tiktoken(data, config)
    return SentencePiece(data, _added(config), config)


def _read_tiktoken(data: bytes, config: Mapping[str, Any]) -> BytesTokenizer:
    pattern = config.get("pat_str") or _PATTERNS.get(config.get("tokenizer_class", ""))
    if pattern is None:
        raise ConfigurationError(
            "it doesn't say how text is split: put the pattern into tokenizer_config.json, as pat_str"
        )
    lines = (line.split() for line in data.splitlines() if line)
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    added = _added(config)
    return Tiktoken(ranks, pattern, added, _first(config, added))


def _read_tekken(data: bytes, config: Mapping[str, Any]) -> BytesTokenizer:
    told = json.loads(data)
    about = told["config"]
    num_special = about["default_num_special_tokens"]
    vocabulary = told["vocab"][: about["default_vocab_size"] - num_special]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in vocabulary}
    added = {
        entry["rank"]: AddedToken(entry["token_str"], special=bool(entry.get("is_control", True)), normalized=False)
        for entry in told.get("special_tokens") or ()
    }
    return Tiktoken(ranks, about["pattern"], added, _first({"bos_token": "<s>", **config}, added), num_special)


def _added(config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """The tokens that a configuration adds."""
    told: Mapping[str, Mapping[str, Any]] = config.get("added_tokens_decoder") or {}
    return {
        int(number): AddedToken(one["content"], special=bool(one.get("special", False)), normalized=False)
        for number, one in told.items()
    }


def _first(config: Mapping[str, Any], added: Mapping[int, AddedToken]) -> list[int]:
    """What stands before a whole text, if a configuration wants something there."""
    bos = config.get("bos_token")
    content = bos.get("content") if isinstance(bos, Mapping) else bos
    found = [number for number, token in added.items() if token.content == content]
    return found[:1] if config.get("add_bos_token", False) else []


def _library(name: str) -> Any:
    try:
        return __import__(name)
    except ModuleNotFoundError:
        raise ConfigurationError(f"this needs the package {name}: pip install 'dynamo-grpc[tokenizers]'") from None


_READERS = (
    (r"tokenizer\.json", _read_json),
    (r"tekken\.json", _read_tekken),
    (r"tokenizer\.model", _read_model),
    (r"[^/]*\.tiktoken|tiktoken\.model", _read_tiktoken),
)
