"""The tiny model: a real language model that needs no download and no GPU, made from 64 kB of text.

It writes readable, if naive, English about everyday things, obeys every sampling option, and is fast enough for tests.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from dynamo_grpc import Context, Worker
from dynamo_grpc.v1 import inference_pb2
from dynamo_workers.tiny import sampling
from dynamo_workers.tiny.corpus import SPECIALS, paragraphs
from dynamo_workers.tiny.ngram import NgramModel, log_probabilities

HERE = Path(__file__).resolve().parent
#: An answer doesn't end by itself before this many tokens.
MIN_ANSWER = 64


class Tiny(Worker):
    """Serves the tiny model."""

    model_path = "model"
    model_name = "tiny"
    capabilities = ("n", "logprobs", "prompt_logprobs")

    async def start(self) -> None:
        self._model, self._tokenizer = await asyncio.to_thread(load)
        self._end = self._tokenizer.token_to_id("<|end|>")

    async def generate(
        self, request: inference_pb2.PreprocessedRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        num_prompt = request.resume.num_prompt_tokens or len(request.token_ids)
        prompt = list(request.token_ids[:num_prompt])
        topics = self._model.topic_weights(self._tokenizer.decode(prompt, skip_special_tokens=True))
        seed = request.sampling_options.seed if request.sampling_options.HasField("seed") else secrets.randbits(62)
        first = request.resume.choice_index
        num_choices = max(1, request.sampling_options.n)
        answers = {index: list(request.token_ids[num_prompt:]) for index in range(num_choices)}
        response = inference_pb2.GenerateResponse()
        if request.output_options.HasField("prompt_logprobs"):
            count = request.output_options.prompt_logprobs
            response.prompt_info.logprobs.CopyFrom(await self._prompt_logprobs(prompt, topics, count))
        while answers and not context.is_stopped():
            for index, answer in tuple(answers.items()):
                delta = self._step(request, prompt, answer, topics, seed, first + index)
                delta.index = index
                response.choices.append(delta)
                answer.append(delta.token_ids[0])
                if answer[-1] == self._end and not request.stop_conditions.ignore_eos:
                    del answers[index]
            yield response
            response = inference_pb2.GenerateResponse()

    async def _prompt_logprobs(
        self, prompt: Sequence[int], topics: Sequence[float], count: int
    ) -> inference_pb2.Logprobs:
        """How likely each token of the prompt was after those before it; nothing (0) is said of the first one."""
        told = inference_pb2.Logprobs(token_logprobs=[0.0])
        if count:
            told.top.add()
        for position in range(1, len(prompt)):
            logprobs = log_probabilities(self._model.probabilities(prompt[max(0, position - 8) : position], topics))
            told.token_logprobs.append(logprobs[prompt[position]])
            if count:
                told.top.append(sampling.top_logprobs(logprobs, count))
            await asyncio.sleep(0)  # others go on
        return told

    def _step(
        self,
        request: inference_pb2.PreprocessedRequest,
        prompt: list[int],
        answer: list[int],
        topics: Sequence[float],
        seed: int,
        choice: int,
    ) -> inference_pb2.ChoiceDelta:
        """The next token of one choice."""
        options = request.sampling_options
        probabilities = self._model.probabilities((prompt[-8:] + answer)[-8:], topics)
        if len(answer) < MIN_ANSWER or request.stop_conditions.ignore_eos:
            probabilities[self._end] = 0.0
            total = sum(probabilities)
            probabilities = [p / total for p in probabilities]
        logprobs = log_probabilities(probabilities)
        logits = sampling.adjust(logprobs, options, set(prompt), Counter(answer))
        position = len(prompt) + len(answer)
        token = sampling.draw(logits, options, sampling.chance(seed, choice, position))
        delta = inference_pb2.ChoiceDelta(token_ids=[token])
        if request.output_options.HasField("logprobs"):
            delta.logprobs.token_logprobs.append(logprobs[token])
            if request.output_options.logprobs:
                delta.logprobs.top.append(sampling.top_logprobs(logprobs, request.output_options.logprobs))
        return delta


@functools.cache
def load(folder: Path = HERE) -> tuple[NgramModel, Tokenizer]:
    """Read corpus and tokenizer, and count; once a process: neither is changed by its use."""
    tokenizer = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
    pairs = paragraphs((folder / "corpus.txt").read_text(encoding="utf-8"))
    topics = list(dict.fromkeys(tuple(keywords) for keywords, _ in pairs))
    number = {keywords: index for index, keywords in enumerate(topics)}
    encoded = [(tokenizer.encode(text).ids, number[tuple(keywords)]) for keywords, text in pairs]
    blank = tokenizer.encode("\n\n").ids
    special = {name: tokenizer.token_to_id(name) for name in SPECIALS}
    model = NgramModel(
        encoded,
        topics,
        tokenizer.get_vocab_size(),
        starts=[special["<|assistant|>"], *blank[-1:]],
        ends=[special["<|end|>"], *blank[:1]],
        never=[special[name] for name in SPECIALS if name != "<|end|>"],
    )
    return model, tokenizer
