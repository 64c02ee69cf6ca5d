"""Serve `hello_world.backend.generate`: a greeting for each word."""

import asyncio
import os
from collections.abc import AsyncIterator

from dynamo_grpc import DistributedRuntime, dynamo_endpoint, dynamo_worker

NAMESPACE = os.environ.get("DYN_NAMESPACE", "hello_world")
DELAY_S = float(os.environ.get("HELLO_DELAY_S", "1"))


@dynamo_endpoint(str, str)
async def greet(request: str) -> AsyncIterator[str]:
    print(f"greeting {request}", flush=True)
    for word in request.split(","):
        await asyncio.sleep(DELAY_S)
        yield f"Hello {word}!"


@dynamo_worker()
async def main(runtime: DistributedRuntime) -> None:
    endpoint = runtime.namespace(NAMESPACE).component("backend").endpoint("generate")
    print(f"serving {endpoint}", flush=True)
    await endpoint.serve_endpoint(greet)


if __name__ == "__main__":
    asyncio.run(main())
