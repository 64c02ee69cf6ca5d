"""tiktoken's and sentencepiece's files give the ids that their libraries give, and text comes back byte by byte."""

from __future__ import annotations

import base64
import functools
import io
import json
from typing import Any

import pytest
import sentencepiece
import tiktoken
from dynamo_frontend.postprocess import Detokenizer
from dynamo_frontend.preparation import prepare
from dynamo_frontend.spelling import Spelling
from dynamo_frontend.tokens import PromptTokenizer
from dynamo_frontend.vocabularies import BytesTokenizer, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_grpc import ConfigurationError
from dynamo_grpc.v1 import model_card_pb2

WORDS = "the sea is wide and deep and the wind over the sea carries salt to every town by the shore"
PATTERN = r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"
ADDED = {"added_tokens_decoder": {"900": {"content": "<|end|>", "special": True}, "901": {"content": "<tool>"}}}


@functools.cache
def sentencepiece_file() -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS, WORDS.title()] * 50), model_writer=out, vocab_size=330, byte_fallback=True,
        model_type="bpe", minloglevel=2,
    )  # fmt: skip
    return out.getvalue()


def ranks() -> dict[bytes, int]:
    found = {bytes([byte]): byte for byte in range(256)}
    for merged in (b"th", b"the", b"an", b"and", b" s", b" se", b" sea", "é".encode(), "🌊".encode()[:2]):
        found[merged] = len(found)
    return found


def tiktoken_file() -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks().items())


def tekken_file() -> bytes:
    vocabulary = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in ranks().items()
    ]
    special = [{"rank": number, "token_str": text, "is_control": True} for number, text in enumerate(["<unk>", "<s>"])]
    about = {"pattern": PATTERN, "default_vocab_size": len(vocabulary) + 10, "default_num_special_tokens": 10}
    return json.dumps({"config": about, "vocab": vocabulary, "special_tokens": special}).encode()


FILES: dict[str, tuple[dict[str, bytes], dict[str, Any]]] = {
    "sentencepiece": ({"tokenizer.model": sentencepiece_file()}, ADDED),
    "tiktoken": ({"own.tiktoken": tiktoken_file()}, {**ADDED, "pat_str": PATTERN}),
    "tiktoken by another name": ({"tokenizer.model": tiktoken_file()}, {**ADDED, "pat_str": PATTERN}),
    "tekken": ({"tekken.json": tekken_file()}, {"add_bos_token": True}),
}


def made(name: str) -> BytesTokenizer:
    found = tokenizer_of(*FILES[name])
    assert isinstance(found, BytesTokenizer)
    return found


TEXTS = ["the sea is wide", "é 🌊\n\n  123456 ", "", " the", "<|end|>the<tool> sea", "x<|end|>"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("text", TEXTS)
def test_there_and_back(name: str, text: str) -> None:
    tokenizer = made(name)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    decoded = tokenizer.decode(ids, skip_special_tokens=False)
    if name == "sentencepiece":  # it makes one space of several, and puts one before
        assert decoded.replace(" ", "") == text.replace(" ", "").replace("\n", "")
    else:
        assert decoded == text
    detokenizer = Detokenizer(tokenizer, [], skip_special_tokens=False)
    streamed = "".join(map(detokenizer.feed, ids)) + detokenizer.flush()
    assert streamed.removeprefix(" ") == decoded.removeprefix(" ")
    skipped = tokenizer.decode(ids, skip_special_tokens=True)
    if name != "tekken":
        assert "<|end|>" not in skipped
    assert ("<tool>" in skipped) == ("<tool>" in text)


def test_the_ids_are_those_of_the_libraries() -> None:
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_file())
    encoding = tiktoken.Encoding("x", pat_str=PATTERN, mergeable_ranks=ranks(), special_tokens={})
    for text in ("the sea is wide", "é 🌊 123456", WORDS):
        assert made("sentencepiece").encode(text).ids == [model.bos_id(), *model.encode(text)]
        assert made("sentencepiece").decode(model.encode(text)) == model.decode(model.encode(text))
        assert made("tiktoken").encode(text).ids == encoding.encode(text)
        assert made("tekken").encode(text).ids == [1, *(number + 10 for number in encoding.encode(text))]


@pytest.mark.parametrize("name", FILES)
@given(text=st.text(max_size=20))
@settings(max_examples=60, deadline=None)
def test_streamed_text_is_the_whole_text(name: str, text: str) -> None:
    tokenizer = made(name)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    detokenizer = Detokenizer(tokenizer, [], skip_special_tokens=True)
    streamed = "".join(map(detokenizer.feed, ids)) + detokenizer.flush()
    whole = tokenizer.decode(ids)
    assert whole in (streamed, streamed.removeprefix(" "))


@pytest.mark.parametrize("name", FILES)
async def test_as_prompts_are_made(name: str) -> None:
    prompts = PromptTokenizer(made(name))
    text = "the sea<|end|>the sea<|end|>"
    assert await prompts.encode(text) == prompts.base.encode(text, add_special_tokens=False).ids
    spelled = Spelling(prompts.base)[prompts.base.encode("🌊", add_special_tokens=False).ids[-1]]
    assert spelled.data
    assert "🌊".encode().endswith(spelled.data)
    assert "\\x" in spelled.text


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"tokenizer.json": b"{"}, "tokenizer.json can't be read"),
        ({"tekken.json": b"{}"}, "tekken.json can't be read"),
        ({"tokenizer.model": b"\x00\x01"}, "tokenizer.model can't be read"),
        ({"own.tiktoken": tiktoken_file()}, "own.tiktoken: it doesn't say how text is split"),
        ({"own.tiktoken": b"AA== 0\n!!\n"}, "own.tiktoken"),
        ({"tokenizer.json": b"{}", "tokenizer_config.json": b"["}, "tokenizer_config.json of model 'm' is no JSON"),
    ],
)
def test_files_that_are_broken(files: dict[str, bytes], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as caught:
        prepare(model_card_pb2.ModelCard(name="m"), files)
    assert "'m'" in str(caught.value)


def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(
        ConfigurationError, match=r"needs the package sentencepiece: pip install 'dynamo-grpc\[tokenizers\]'"
    ):
        made("sentencepiece")
