"""From tokens back to text, one choice at a time: incremental detokenizing and stop strings. No I/O.

The text doesn't depend on how the tokens were cut into outputs: everything is fed token by token.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from dynamo_frontend.marks import first_of, viable_suffix
from dynamo_frontend.parsers.base import Parser
from dynamo_frontend.parsers.said import Arguments, Call, Reasoning, Said, Text
from dynamo_frontend.vocabularies import AnyTokenizer, BytesTokenizer, ByteStream


class StopMatcher:
    """Finds the first stop string in a stream of text, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str], *, keep: bool = False) -> None:
        self._stops, self._keep = tuple(stops), keep
        self._starts = tuple({stop[0] for stop in stops})
        self._held = ""

    def feed(self, text: str, *, counts: bool = True) -> tuple[str, str | None]:
        """Take text; gives what can be shown, and the stop string that ended it, if one did.

        Args:
            counts: a stop string that is complete in this text ends it.
        """
        if not self._held and not any(start in text for start in self._starts):
            return text, None  # no stop string begins here
        self._held += text
        if counts and (found := first_of(self._held, self._stops)):
            shown, self._held = self._held[: found.end if self._keep else found.start], ""
            return shown, found.mark
        keep_from = len(self._held) - viable_suffix(self._held, self._stops)
        shown, self._held = self._held[:keep_from], self._held[keep_from:]
        return shown, None

    def release(self) -> str:
        """What was held back, when no stop string can come any more."""
        held, self._held = self._held, ""
        return held


class Detokenizer:
    """Text of one choice, without broken characters.

    Args:
        seed: ids that it is decoded behind, and that are not shown (`PromptTokenizer.seed`).
        plain_seed: the same where a decoder has to begin again.
        kept: special tokens that are shown though others are skipped.
    """

    def __init__(
        self,
        tokenizer: AnyTokenizer,
        seed: Sequence[int],
        *,
        skip_special_tokens: bool,
        plain_seed: Sequence[int] = (),
        kept: Mapping[int, str] | None = None,
    ) -> None:
        self._kept = kept if skip_special_tokens and kept else {}
        self._tokenizer, self._skip, self._plain_seed = tokenizer, skip_special_tokens, list(plain_seed)
        self._stream = _stream(tokenizer, seed, skip_special_tokens=skip_special_tokens)
        self._pending: list[int] = []

    def feed(self, token_id: int) -> str:
        """The text that a token completes; empty in the middle of a character."""
        if token_id in self._kept:
            rest = self.flush()
            if rest:  # what was begun ends here
                self._stream = _stream(self._tokenizer, self._plain_seed, skip_special_tokens=self._skip)
            return rest + self._kept[token_id]
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except Exception:  # a plain one: bytes that are no text changed what was decoded before them
            text = self._begin_again(token_id)
        if text is None:
            self._pending.append(token_id)
            return ""
        if self._pending:
            self._pending.clear()
        return text

    def _begin_again(self, token_id: int) -> str:
        """The text of what is pending with a token, broken as it is."""
        seed, decode = self._plain_seed, self._tokenizer.decode
        self._stream = _stream(self._tokenizer, seed, skip_special_tokens=self._skip)
        whole = decode([*seed, *self._pending, token_id], skip_special_tokens=self._skip)
        return whole[len(decode(seed, skip_special_tokens=self._skip)) :]

    def flush(self) -> str:
        """What is left of an unfinished character, at the end."""
        text = self._tokenizer.decode(self._pending, skip_special_tokens=self._skip) if self._pending else ""
        self._pending.clear()
        return text


def _stream(tokenizer: AnyTokenizer, seed: Sequence[int], *, skip_special_tokens: bool) -> Any:
    if isinstance(tokenizer, BytesTokenizer):
        return ByteStream(skip_special_tokens=skip_special_tokens)
    return DecodeStream(list(seed), skip_special_tokens)


class ChoiceText:
    """One choice from tokens (or text) to what is shown, up to a stop string."""

    def __init__(
        self,
        detokenizer: Detokenizer | None,
        stops: Sequence[str] = (),
        *,
        keep_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops, keep=keep_stop)
        self._has_stops = bool(stops)
        self._min_tokens = min_tokens if detokenizer else 0  # text can't be counted in tokens
        self.num_tokens = 0
        self.stop: str | None = None

    @property
    def has_detokenizer(self) -> bool:
        """Whether tokens can be shown; else the worker gives text."""
        return self._detokenizer is not None

    def feed_tokens(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """Take tokens; gives the text to show, and how many of the tokens count (fewer when a stop string ended it)."""
        shown = []
        for count, token_id in enumerate(token_ids, start=1):
            shown.append(self.feed_token(token_id))
            if self.stop is not None:
                return "".join(shown), count
        return "".join(shown), len(token_ids)

    def feed_token(self, token_id: int) -> str:
        """Take one token; gives the text to show."""
        if self._detokenizer is None:
            return ""
        self.num_tokens += 1
        text = self._detokenizer.feed(token_id)
        return self._feed(text) if text and self._has_stops else text

    def feed_text(self, text: str) -> str:
        """Take text from a worker that detokenizes itself."""
        return self._feed(text)

    def _feed(self, text: str) -> str:
        shown, self.stop = self._matcher.feed(text, counts=self.num_tokens >= self._min_tokens)
        return shown

    def end(self) -> str:
        """The rest of the text, when the choice has ended without a stop string."""
        rest = self._feed(self._detokenizer.flush()) if self._detokenizer else ""
        if self.stop is None:
            rest += self._matcher.release()
        return rest


class ReadText(ChoiceText):
    """One choice whose text is read: it may hold calls of tools and reasoning.

    Args:
        one_call: the client wants no other than the first.
        marks: special tokens that the parser sees and nobody else.

    Attributes:
        num_reasoning: so many of its tokens were reasoning.
        called: names of the tools that it called.
    """

    def __init__(
        self,
        parser: Parser,
        detokenizer: Detokenizer | None,
        stops: Sequence[str] = (),
        *,
        one_call: bool = False,
        marks: Collection[str] = (),
        **options: Any,
    ) -> None:
        super().__init__(detokenizer, stops, **options)
        self._marks = tuple(marks)
        self._parser, self._one_call = parser, one_call
        self._said: list[Said] = []
        self._is_text = True
        self.num_reasoning = 0
        self.called: list[str] = []

    def feed_token(self, token_id: int) -> str:
        was_in_reasoning = self._parser.is_in_reasoning
        text = self._read(super().feed_token(token_id))
        self.num_reasoning += was_in_reasoning or self._parser.is_in_reasoning
        return text

    def feed_text(self, text: str) -> str:
        return self._read(super().feed_text(text))

    def end(self) -> str:
        rest = super().end()
        return self._keep(self._parser.feed(rest) + self._parser.end())

    @property
    def is_in_call(self) -> bool:
        """Whether a call has begun that isn't known to be whole."""
        return self._parser.is_in_call

    def take(self) -> Sequence[Said]:
        """What was said since it was asked last; nothing where it was text alone."""
        if self._is_text:  # the most of all answers
            self._said.clear()
            return ()
        said, self._said, self._is_text = self._said, [], True
        return said

    def _read(self, text: str) -> str:
        said = self._parser.feed(text) if text else []
        if self.stop is not None:
            said += self._parser.end()
        return self._keep(said)

    def _without_marks(self, said: Said) -> Said:
        """What is said, without marks that turned out to be none."""
        if type(said) is not Text and type(said) is not Reasoning:
            return said
        text = said.text
        for mark in self._marks:
            if mark in text:
                text = text.replace(mark, "")
        return type(said)(text)

    def _keep(self, said: list[Said]) -> str:
        """Keep what is told; gives the text of the answer in it."""
        text = ""
        for one in map(self._without_marks, said) if self._marks else said:
            if type(one) is Text:
                text += one.text
            else:
                self._is_text = False
                if isinstance(one, (Call, Arguments)) and one.index and self._one_call:
                    continue
                if isinstance(one, Call):
                    self.called.append(one.name)
            self._said.append(one)
        return text
