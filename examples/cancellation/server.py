"""Count to a thousand, unless somebody stops it."""

import asyncio
from collections.abc import AsyncIterator

from dynamo_grpc import Context, DistributedRuntime, dynamo_worker


class DemoServer:
    async def generate(self, request: str, context: Context) -> AsyncIterator[int]:
        for number in range(1000):
            if context.is_stopped():  # a gentle stop is asked for; a kill or a vanished client cancels the task itself
                print(f"stopped at {number}", flush=True)
                raise asyncio.CancelledError
            await asyncio.sleep(0.1)
            print(f"sending {number}", flush=True)
            yield number


@dynamo_worker()
async def main(runtime: DistributedRuntime) -> None:
    print("serving demo.server.generate", flush=True)
    await runtime.namespace("demo").component("server").endpoint("generate").serve_endpoint(DemoServer().generate)


if __name__ == "__main__":
    asyncio.run(main())
