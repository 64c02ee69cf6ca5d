"""A model's worker from plain functions: the handler gets a dict of what was asked, and yields token ids."""

import asyncio
import os
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any

from dynamo_grpc import Context, DistributedRuntime, ModelInput, ModelType, dynamo_worker, register_llm

# a folder with tokenizer.json, as downloaded from a model hub; that of the tiny model, to try it
MODEL_PATH = os.environ.get("MODEL_PATH") or str(files("dynamo_workers") / "tiny" / "model")


async def backwards(request: dict[str, Any], context: Context) -> AsyncIterator[dict[str, Any]]:
    # a model goes on behind all token_ids; what is made from the prompt alone has to know where that ends
    num_prompt = request.get("resume", {}).get("num_prompt_tokens") or len(request["token_ids"])
    num_given = len(request["token_ids"]) - num_prompt  # elsewhere, before another worker was lost
    prompt = [token_id for token_id in request["token_ids"][:num_prompt] if token_id not in request["eos_token_ids"]]
    token_ids = prompt[::-1][num_given:]
    for token_id in token_ids[:-1]:
        if context.is_stopped():
            return
        yield {"token_ids": [token_id], "index": 0}
        await asyncio.sleep(0.01)
    yield {"token_ids": token_ids[-1:], "index": 0, "finish_reason": "stop"}


@dynamo_worker()
async def main(runtime: DistributedRuntime) -> None:
    endpoint = runtime.endpoint("dynamo.backwards.generate")
    await register_llm(ModelInput.Tokens, ModelType.Chat | ModelType.Completions, endpoint, MODEL_PATH, "backwards")
    print("serving dynamo.backwards.generate", flush=True)
    await endpoint.serve_endpoint(backwards, health_check_payload={"token_ids": [1]})


if __name__ == "__main__":
    asyncio.run(main())
