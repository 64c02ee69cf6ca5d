"""Greets each word of a list: an endpoint that serves no model."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

from dynamo_grpc import DistributedRuntime, dynamo_endpoint, dynamo_worker

#: Seconds before each greeting.
DELAY_S = float(os.environ.get("HELLO_DELAY_S", "1"))


@dynamo_endpoint(str, str)
async def greet(request: str) -> AsyncIterator[str]:
    """Yield one greeting for each word of `request`, which is separated by commas."""
    for word in request.split(","):
        await asyncio.sleep(DELAY_S)
        yield f"Hello {word.strip()}!"


@dynamo_worker()
async def main(runtime: DistributedRuntime) -> None:
    """Serve `hello_world.backend.generate` until SIGTERM."""
    await runtime.endpoint("hello_world.backend.generate").serve_endpoint(greet)
