"""A proxy between client and server. It hands no context on, and the stop reaches the server all the same."""

import asyncio
from collections.abc import AsyncIterator

from dynamo_grpc import Client, DistributedRuntime, dynamo_worker


class MiddleServer:
    def __init__(self, backend: Client) -> None:
        self.backend = backend

    async def generate(self, request: str) -> AsyncIterator[int]:
        async for response in await self.backend.generate(request):
            yield response.data()


@dynamo_worker()
async def main(runtime: DistributedRuntime) -> None:
    backend = await runtime.endpoint("demo.server.generate").client()
    await backend.wait_for_instances()
    print("serving demo.middle.generate", flush=True)
    await runtime.endpoint("demo.middle.generate").serve_endpoint(MiddleServer(backend).generate)


if __name__ == "__main__":
    asyncio.run(main())
