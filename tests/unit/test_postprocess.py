"""Stop strings and detokenizing, against naive oracles: the result doesn't depend on how the tokens were cut."""

from pathlib import Path

import dynamo_workers.tiny
import pytest
from dynamo_frontend.postprocess import ChoiceText, Detokenizer, StopMatcher
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

TOKENIZER = Tokenizer.from_file(str(Path(dynamo_workers.tiny.__file__).parent / "model" / "tokenizer.json"))


def oracle(text: str, stops: list[str], *, keep: bool) -> tuple[str, str | None]:
    """Earliest match wins; of those at one place the shortest, which is complete first."""
    found = [(text.find(stop), len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    at, length, stop = min(found)
    return text[: at + length if keep else at], stop


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
    whole, expected = oracle("".join(pieces), stops, keep=keep)
    if expected is not None and not any(len(s) != len(expected) for s in stops):
        assert (shown, stop) == (whole, expected)
    assert (stop is None) == (expected is None)
    # a longer stop string may begin earlier and be completed later than a shorter one: what is shown is a prefix
    assert "".join(pieces).startswith(shown)


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


def test_the_stop_string_can_be_kept() -> None:
    choice = ChoiceText(None, ["END"], keep_stop=True)
    assert choice.feed_text("abcENDdef") == "abcEND"
