"""The cache of tokens changes nothing: every tokenizer gives what it gives for the whole text."""

import asyncio

import pytest
from dynamo_frontend import tokens
from dynamo_frontend.tokens import PromptTokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = ["the sea is wide and the fish are many", "tell me about the sea", "über  größe naïve", "a\n\nb\tc  d"]
SPECIALS = ["<s>", "</s>", "<|user|>", "<|user|>x"]


def trained(tokenizer: Tokenizer) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken("<strip>", lstrip=True, rstrip=True, special=True)])
    tokenizer.add_tokens([AddedToken("fish", normalized=True), AddedToken("WIDE", normalized=False, single_word=True)])
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer)


def metaspace(scheme: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="</s>", byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return trained(tokenizer)


def prepended() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="</s>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = trained(tokenizer)
    tokenizer.enable_truncation(5)
    return tokenizer


TOKENIZERS = {
    "byte level": byte_level(),
    "metaspace first": metaspace("first"),
    "metaspace always": metaspace("always"),
    "prepended": prepended(),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_one_by_one_spell_the_text(name: str) -> None:
    prompts = PromptTokenizer(TOKENIZERS[name])
    for text in ("the sea is wide", "über  größe", "a\n\nb"):
        ids = prompts.base.encode(text, add_special_tokens=False).ids
        spelled = [prompts.spelling[token_id] for token_id in ids]
        assert b"".join(one.data for one in spelled).decode().lstrip() == prompts.base.decode(ids).lstrip()
        assert all(one.text.encode() == one.data or "\\x" in one.text for one in spelled)


def test_bytes_that_are_no_character_are_told_as_bytes() -> None:
    prompts = PromptTokenizer(TOKENIZERS["byte level"])
    ids = prompts.base.encode("🌊", add_special_tokens=False).ids[-4:]
    assert [prompts.spelling[token_id] for token_id in ids] == [
        (f"\\x{byte:02x}", bytes([byte]), False) for byte in "🌊".encode()
    ]
    fallback = PromptTokenizer(Tokenizer(models.BPE({"<0xF0>": 0, "▁the": 1}, [], byte_fallback=True)))
    fallback.base.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ])  # fmt: skip
    assert fallback.spelling[0] == ("\\xf0", b"\xf0", False)
    assert fallback.spelling[1] == (" the", b" the", False)


PIECES = st.sampled_from(
    [*SPECIALS, "<strip>", " ", "  ", "\n", "fish", "WIDE", "the sea", " wide", "ß", "<", "|>", "x"]
)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(texts=st.lists(st.lists(PIECES, max_size=12).map("".join), min_size=1, max_size=4))
def test_the_cache_changes_nothing(name: str, texts: list[str]) -> None:
    async def check() -> None:
        prompts = PromptTokenizer(TOKENIZERS[name])
        for text in [*texts, "".join(texts), *texts]:
            expected = prompts.base.encode(text, add_special_tokens=False).ids
            assert await prompts.encode(text) == expected, text

    asyncio.run(check())


async def test_a_turn_that_is_known_is_not_tokenized_again(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = PromptTokenizer(byte_level())
    seen: list[str] = []
    encode = prompts._encode

    async def counted(texts: list[str], **kwargs: bool) -> list[list[int]]:
        seen.extend(texts)
        return await encode(texts, **kwargs)

    monkeypatch.setattr(prompts, "_encode", counted)
    await prompts.encode("<s>the sea<|user|>tell me")
    await prompts.encode("<s>the sea<|user|>tell me<|user|>more")
    assert seen == ["<s>the sea", "<|user|>tell me", "<|user|>more"]


async def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MAX_CACHED_CHARS", 400)
    prompts = PromptTokenizer(byte_level())
    for number in range(100):
        await prompts.encode(f"<s>the sea {number}<|user|>kept")
    assert prompts._num_cached_chars == sum(map(len, prompts._cache)) <= 400
    assert "<|user|>kept" in prompts._cache
    await prompts.encode("<s>" + "x" * 1000)
    assert prompts._num_cached_chars <= 400
