"""The language model itself: what follows what in a short text, weighted by what the prompt is about.

Counts of the longest matching context are mixed with those of shorter ones (Jelinek-Mercer interpolation), and a
paragraph counts the more, the more of its topic's keywords are in the prompt. Pure Python, no I/O.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

#: Longest context, in tokens.
ORDER = 4
#: How much more a context counts than the next shorter one.
_LONGER = 12.0
#: Probability that is spread over the whole vocabulary.
_FLOOR = 1e-4
#: How much more paragraphs about the prompt's subject count.
_TOPIC = 1_000.0
_WORDS = re.compile(r"[^\W\d_]+")


class NgramModel:
    """Token probabilities from a text.

    Args:
        paragraphs: token ids and topic number of each paragraph.
        keywords: of each topic.
        starts: tokens after which a paragraph may begin (the assistant's turn, a blank line).
        ends: tokens that may follow a paragraph (the end, a blank line).
        never: tokens that the model doesn't produce.
    """

    def __init__(
        self,
        paragraphs: Sequence[tuple[Sequence[int], int]],
        keywords: Sequence[Sequence[str]],
        vocab_size: int,
        starts: Sequence[int],
        ends: Sequence[int],
        never: Sequence[int],
    ) -> None:
        self.vocab_size = vocab_size
        self._num_topics = len(keywords)
        self._topics_of: dict[str, list[int]] = defaultdict(list)
        for topic, words in enumerate(keywords):
            for word in words:
                self._topics_of[word].append(topic)
        # next tokens of each context, with the topic they are from
        self._next: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
        for tokens, topic in paragraphs:
            for start in starts:
                for end in ends:
                    self._learn([start, *tokens, end], topic)
        floor = [1.0] * vocab_size
        for token, _ in self._next[()]:
            floor[token] += 1.0
        for token in (*never, *starts):
            floor[token] = 0.0
        total = sum(floor)
        self._floor = [_FLOOR * count / total for count in floor]

    def _learn(self, tokens: Sequence[int], topic: int) -> None:
        for position in range(1, len(tokens)):
            for length in range(min(ORDER, position) + 1):
                self._next[tuple(tokens[position - length : position])].append((tokens[position], topic))

    def topic_weights(self, prompt: str) -> list[float]:
        """How much each topic counts for a prompt: words near its end say more."""
        weights = [1.0] * self._num_topics
        words = _WORDS.findall(prompt.lower())[-400:]
        for distance, word in enumerate(reversed(words)):
            singular = word.removesuffix("s")
            for topic in {*self._topics_of.get(word, ()), *self._topics_of.get(singular, ())}:
                weights[topic] += _TOPIC * 0.5 ** (distance / 20)
        return weights

    def probabilities(self, context: Sequence[int], topic_weights: Sequence[float]) -> list[float]:
        """The probability of each token id to come next; they add up to 1, none is below 0."""
        found: list[tuple[float, Mapping[int, float]]] = []
        weight = 1.0
        for length in range(min(ORDER, len(context)) + 1):
            nexts = self._next.get(tuple(context[len(context) - length :]))
            if nexts is None:
                break
            counts: dict[int, float] = defaultdict(float)
            for token, topic in nexts if length else ():  # without any context only the floor speaks
                counts[token] += topic_weights[topic]
            if counts:
                found.append((weight, counts))
            weight *= _LONGER
        probabilities = list(self._floor)
        if not found:
            return [p / _FLOOR for p in probabilities]
        scale = (1.0 - _FLOOR) / sum(weight for weight, _ in found)
        for weight, counts in found:
            share = weight * scale / sum(counts.values())
            for token, count in counts.items():
                probabilities[token] += share * count
        return probabilities


def log_probabilities(probabilities: Sequence[float]) -> list[float]:
    """Natural logarithms; -inf for what can't be."""
    return [math.log(p) if p > 0 else -math.inf for p in probabilities]
