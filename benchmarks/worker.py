"""A worker that costs nothing: token ids at a fixed pace, with the tiny model's tokenizer."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import dynamo_workers.tiny

from dynamo_grpc import Context, Worker
from dynamo_grpc.v1 import inference_pb2

DELAY_S = float(os.environ.get("BENCH_DELAY_S", "0"))


class Pacer(Worker):
    """Yields one token each BENCH_DELAY_S seconds."""

    model_path = Path(dynamo_workers.tiny.__file__).parent / "model"
    model_name = "bench"

    async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> AsyncIterator[int]:
        for index in range(request.stop_conditions.max_tokens):
            if DELAY_S:
                await asyncio.sleep(DELAY_S)
            yield 300 + index * 37 % 1500
