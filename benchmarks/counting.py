"""A worker whose every answer is known beforehand: after a prompt that ends with token n come the letters n, n + 1 …"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import dynamo_workers.tiny as tiny

from dynamo_grpc import Context, Worker
from dynamo_grpc.v1 import inference_pb2

LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
#: Seconds between two tokens.
STEP_S = float(os.environ.get("COUNTING_STEP_S", "0.01"))
_LIMIT = int(os.environ.get("COUNTING_MAX_CONCURRENT", "0"))


def expected(first: str, num: int) -> str:
    """The answer to a prompt that ends with the letter `first`."""
    start = LETTERS.index(first) + 1
    return "".join(LETTERS[(start + count) % len(LETTERS)] for count in range(num))


class Counting(Worker):
    """Goes on with the alphabet from the last token that it is given, whoever gave it."""

    model_path = Path(tiny.__file__).parent / "model"
    model_name = "counting"
    max_concurrent = _LIMIT or None
    max_queued = _LIMIT or None

    async def start(self) -> None:
        _, tokenizer = await asyncio.to_thread(tiny.load)
        self._ids = [tokenizer.token_to_id(letter) for letter in LETTERS]
        self._place = {token_id: place for place, token_id in enumerate(self._ids)}

    async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> AsyncIterator[int]:
        place = self._place[request.token_ids[-1]]
        while not context.is_stopped():
            await asyncio.sleep(STEP_S)
            place = (place + 1) % len(LETTERS)
            yield self._ids[place]
