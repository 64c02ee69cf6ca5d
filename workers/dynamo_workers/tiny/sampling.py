"""From a distribution to a token: bias, penalties, temperature, cut-offs, and a draw that can be repeated. Pure."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from dynamo_grpc.v1 import inference_pb2


def adjust(
    logprobs: Sequence[float], options: inference_pb2.SamplingOptions, prompt: set[int], answer: Counter[int]
) -> list[float]:
    """Apply logit_bias and the penalties.

    Args:
        logprobs: the model's, one for each token id.
        prompt: token ids in the prompt.
        answer: how often each token id is in the answer so far.
    """
    logits = list(logprobs)
    if options.HasField("repetition_penalty") and options.repetition_penalty != 1.0:
        for token in prompt | answer.keys():
            logits[token] *= options.repetition_penalty if logits[token] < 0 else 1 / options.repetition_penalty
    for token, count in answer.items():
        logits[token] -= options.presence_penalty + options.frequency_penalty * count
    for token, bias in options.logit_bias.items():
        logits[token] += bias
    return logits


def draw(logits: Sequence[float], options: inference_pb2.SamplingOptions, chance: float) -> int:
    """Pick a token id.

    Args:
        chance: from 0 up to but not including 1; equal chances give equal tokens.
    """
    if options.HasField("temperature") and options.temperature == 0.0:
        return max(range(len(logits)), key=logits.__getitem__)
    temperature = options.temperature if options.HasField("temperature") else 1.0
    top = max(logits)
    # temperatures near 0 underflow to the most likely token alone, as they should
    weights = {t: w for t, logit in enumerate(logits) if (w := math.exp((logit - top) / temperature)) > 0.0}
    if options.min_p > 0:
        weights = {t: w for t, w in weights.items() if w >= options.min_p}  # the largest weight is 1
    ranked = sorted(weights, key=lambda t: (-weights[t], t))
    if options.top_k > 0:
        ranked = ranked[: options.top_k]
    if options.HasField("top_p") and options.top_p < 1.0:
        ranked = _nucleus(ranked, weights, options.top_p)
    point = chance * sum(weights[t] for t in ranked)
    for token in ranked:
        point -= weights[token]
        if point < 0:
            return token
    return ranked[-1]


def _nucleus(ranked: Sequence[int], weights: Mapping[int, float], top_p: float) -> Sequence[int]:
    """The fewest tokens whose probabilities add up to top_p."""
    wanted, reached = top_p * sum(weights[t] for t in ranked), 0.0
    for count, token in enumerate(ranked, start=1):
        reached += weights[token]
        if reached >= wanted:
            return ranked[:count]
    return ranked


def chance(seed: int, choice: int, position: int) -> float:
    """A number from 0 up to 1 that depends on nothing else, so that an answer can go on at another worker."""
    digest = hashlib.blake2b(f"{seed}/{choice}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def top_logprobs(logprobs: Sequence[float], count: int) -> inference_pb2.TopLogprobs:
    """The `count` most likely tokens, most likely first."""
    best = sorted(range(len(logprobs)), key=lambda t: (-logprobs[t], t))[:count]
    return inference_pb2.TopLogprobs(token_ids=best, logprobs=[logprobs[t] for t in best])
