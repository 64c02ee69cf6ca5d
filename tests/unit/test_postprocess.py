"""Stop strings and detokenizing, against naive oracles: the result doesn't depend on how the tokens were cut."""

from pathlib import Path

import dynamo_workers.tiny
import pytest
from dynamo_frontend.postprocess import ChoiceText, Detokenizer, StopMatcher
from dynamo_frontend.tokens import PromptTokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

TOKENIZER = Tokenizer.from_file(str(Path(dynamo_workers.tiny.__file__).parent / "model" / "tokenizer.json"))


def oracle(text: str, stops: list[str], *, keep: bool) -> tuple[str, str | None]:
    """What is complete first wins; of those that end at one place, the longest."""
    for end in range(len(text) + 1):
        if complete := [stop for stop in stops if text[:end].endswith(stop)]:
            stop = max(complete, key=len)
            return text[: end if keep else end - len(stop)], stop
    return text, None


@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
def test_stop_strings_across_pieces(pieces: list[str], stops: list[str], keep: bool) -> None:
    matcher, shown, stop = StopMatcher(stops, keep=keep), "", None
    for piece in pieces:
        text, stop = matcher.feed(piece)
        shown += text
        if stop is not None:
            break
    if stop is None:
        shown += matcher.release()
    assert (shown, stop) == oracle("".join(pieces), stops, keep=keep)


def test_nothing_of_a_stop_string_leaks() -> None:
    matcher = StopMatcher(["<|end|>"])
    assert [matcher.feed(piece)[0] for piece in ("Hi <", "|en", "d", "|", "> x")] == ["Hi ", "", "", "", ""]
    assert StopMatcher(["END"]).feed("abc")[0] == "abc"
    assert StopMatcher(["END"]).feed("abcE")[0] == "abc"


@given(st.text(max_size=40))
def test_detokenizing_gives_the_text(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    choice = ChoiceText(Detokenizer(TOKENIZER, [], skip_special_tokens=True))
    shown = [choice.feed_tokens([token_id])[0] for token_id in ids]
    shown.append(choice.end())
    assert "".join(shown) == TOKENIZER.decode(ids)
    for piece, so_far in zip(shown, range(len(shown)), strict=True):
        assert "\ufffd" not in piece or so_far == len(shown) - 1 or "\ufffd" in text


@pytest.mark.parametrize("sizes", [[1] * 40, [2] * 20, [3, 1, 5, 31], [40]])
def test_pieces_do_not_depend_on_how_tokens_are_cut(sizes: list[int]) -> None:
    ids = TOKENIZER.encode("The sea 🌊 covers most of the world. STOP here, 東京 and there.").ids
    choice, shown, at = ChoiceText(Detokenizer(TOKENIZER, [], skip_special_tokens=True), ["STOP"]), "", 0
    for size in sizes:
        text, _ = choice.feed_tokens(ids[at : at + size])
        shown, at = shown + text, at + size
        if choice.stop:
            break
    assert (shown, choice.stop) == ("The sea 🌊 covers most of the world. ", "STOP")
    assert choice.num_tokens == next(n for n in range(len(ids)) if "STOP" in TOKENIZER.decode(ids[:n]))


@given(
    st.text(st.sampled_from("ab sea🌊東é"), max_size=12),
    st.lists(st.text(st.sampled_from("ab sea🌊東é"), min_size=1, max_size=3), max_size=3),
    st.lists(st.integers(1, 5), max_size=30),
    st.booleans(),
)
def test_a_choice_is_its_text_up_to_the_stop(text: str, stops: list[str], sizes: list[int], keep: bool) -> None:
    ids = TOKENIZER.encode(text).ids
    choice = ChoiceText(Detokenizer(TOKENIZER, [], skip_special_tokens=True), stops, keep_stop=keep)
    shown, at = "", 0
    for size in (*sizes, len(ids)):
        if choice.stop is None:
            shown += choice.feed_tokens(ids[at : at + size])[0]
            at += size
    if choice.stop is None:
        shown += choice.end()
    assert (shown, choice.stop) == oracle(text, stops, keep=keep)


def test_an_unfinished_character_is_told_at_the_end() -> None:
    ids = TOKENIZER.encode("🌊").ids
    assert len(ids) > 1
    choice = ChoiceText(Detokenizer(TOKENIZER, [], skip_special_tokens=True))
    assert choice.feed_tokens(ids[:-1])[0] == ""
    assert choice.end() == TOKENIZER.decode(ids[:-1])


def test_stop_strings_wait_for_min_tokens() -> None:
    ids = TOKENIZER.encode("sea sea sea sea sea").ids
    choice = ChoiceText(Detokenizer(TOKENIZER, [], skip_special_tokens=True), ["sea"], min_tokens=4)
    shown = "".join(choice.feed_tokens([token_id])[0] for token_id in ids if choice.stop is None)
    assert choice.stop == "sea"
    assert shown.count("sea") == len(TOKENIZER.decode(ids[:3]).split())


def test_a_prompt_that_ends_in_a_broken_character_is_not_repeated() -> None:
    prompts = PromptTokenizer(TOKENIZER)
    half = TOKENIZER.encode("hi 🌊").ids[:-1]
    for prompt in (TOKENIZER.encode("The sea is wide \ufffd").ids, half, TOKENIZER.encode("fine").ids, []):
        seed = prompts.seed(prompt, skip_special_tokens=True)
        detokenizer = Detokenizer(TOKENIZER, seed, skip_special_tokens=True)
        assert "".join(map(detokenizer.feed, TOKENIZER.encode(" in the").ids)) == " in the"


def test_bytes_that_are_no_text_end_no_answer() -> None:
    fallback = Tokenizer(models.BPE({"<0xE6>": 0, "<0xB0>": 1, "<0xB4>": 2, "<0xDF>": 3, "▁the": 4, "a": 5}, []))
    fallback.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    detokenizer = Detokenizer(fallback, [5], skip_special_tokens=True, plain_seed=[5])
    shown = "".join(map(detokenizer.feed, [4, 0, 1, 2, 3, 4, 4])) + detokenizer.flush()
    assert shown.startswith(" the水")
    assert shown.endswith(" the the")
    assert "\ufffd" in shown


def test_the_stop_string_can_be_kept() -> None:
    choice = ChoiceText(None, ["END"], keep_stop=True)
    assert choice.feed_text("abcENDdef") == "abcEND"
