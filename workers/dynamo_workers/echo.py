"""Says back what it was told: a worker to try things with."""

from __future__ import annotations

from collections.abc import AsyncIterator

from dynamo_grpc import Context, Worker
from dynamo_grpc.v1 import inference_pb2


class Echo(Worker):
    """Streams the prompt's tokens, one at a time, with the tiny model's tokenizer."""

    model_path = "tiny/model"
    model_name = "echo"

    async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> AsyncIterator[int]:
        num_prompt = request.resume.num_prompt_tokens or len(request.token_ids)
        num_given = len(request.token_ids) - num_prompt  # elsewhere, before its worker was lost
        for token_id in request.token_ids[num_given:num_prompt]:
            if context.is_stopped():
                return
            yield token_id
