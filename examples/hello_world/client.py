"""Call `hello_world.backend.generate` again and again; a restart of the server is only a pause."""

import asyncio
import os

from dynamo_grpc import DistributedRuntime, MeshError, dynamo_worker

NAMESPACE = os.environ.get("DYN_NAMESPACE", "hello_world")
LONGEST_S = 5.0


@dynamo_worker()
async def main(runtime: DistributedRuntime) -> None:
    client = await runtime.namespace(NAMESPACE).component("backend").endpoint("generate").client()
    await client.wait_for_instances()
    backoff_s = 0.1
    while True:
        try:
            async for item in await client.generate("world,sun,moon,star"):
                print(item.data(), flush=True)
            backoff_s = 0.1
        except MeshError as error:
            print(f"{error}; trying again in {backoff_s:g} s", flush=True)
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, LONGEST_S)


if __name__ == "__main__":
    asyncio.run(main())
