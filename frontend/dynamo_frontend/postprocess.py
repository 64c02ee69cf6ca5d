"""From tokens back to text, one choice at a time: incremental detokenizing and stop strings. No I/O.

The text doesn't depend on how the tokens were cut into outputs: everything is fed token by token.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class StopMatcher:
    """Finds the first stop string in a stream of text, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str], *, keep: bool = False) -> None:
        self._stops, self._keep = tuple(stops), keep
        self._starts = tuple({stop[0] for stop in stops})
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """Take text; gives what can be shown, and the stop string that ended it, if one did."""
        if not self._held and not any(start in text for start in self._starts):
            return text, None  # no stop string begins here
        self._held += text
        # what is complete first wins, whatever comes behind it: so it doesn't depend on how the text was cut
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            end, at, stop = min(found)
            shown, self._held = self._held[: end if self._keep else at], ""
            return shown, stop
        keep_from = len(self._held) - self._viable_suffix()
        shown, self._held = self._held[:keep_from], self._held[keep_from:]
        return shown, None

    def _viable_suffix(self) -> int:
        """Length of the longest end of the text that is a beginning of a stop string."""
        longest = max(len(stop) for stop in self._stops) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0

    def release(self) -> str:
        """What was held back, when no stop string can come any more."""
        held, self._held = self._held, ""
        return held


class Detokenizer:
    """Text of one choice, without broken characters.

    Args:
        seed: ids that it is decoded behind, and that are not shown (`PromptTokenizer.seed`).
        plain_seed: the same where a decoder has to begin again.
    """

    def __init__(
        self, tokenizer: Tokenizer, seed: Sequence[int], *, skip_special_tokens: bool, plain_seed: Sequence[int] = ()
    ) -> None:
        self._tokenizer, self._skip, self._plain_seed = tokenizer, skip_special_tokens, list(plain_seed)
        self._stream = DecodeStream(list(seed), skip_special_tokens)
        self._pending: list[int] = []

    def feed(self, token_id: int) -> str:
        """The text that a token completes; empty in the middle of a character."""
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
        self._stream = DecodeStream([*seed], self._skip)
        whole = decode([*seed, *self._pending, token_id], skip_special_tokens=self._skip)
        return whole[len(decode(seed, skip_special_tokens=self._skip)) :]

    def flush(self) -> str:
        """What is left of an unfinished character, at the end."""
        text = self._tokenizer.decode(self._pending, skip_special_tokens=self._skip) if self._pending else ""
        self._pending.clear()
        return text


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
        self._early = StopMatcher(())
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
        matcher = self._matcher if self.num_tokens >= self._min_tokens else self._early
        shown, self.stop = matcher.feed(text)
        return shown

    def end(self) -> str:
        """The rest of the text, when the choice has ended without a stop string."""
        rest = self._feed(self._detokenizer.flush()) if self._detokenizer else ""
        if self.stop is None:
            rest += self._matcher.release()
        return rest
