"""Take three numbers, then stop the request. With --middle through the proxy, with --kill at once."""

import argparse
import asyncio

from dynamo_grpc import Context, DistributedRuntime, dynamo_worker


@dynamo_worker()
async def main(runtime: DistributedRuntime, middle: bool, kill: bool) -> None:
    client = await runtime.endpoint(f"demo.{'middle' if middle else 'server'}.generate").client()
    await client.wait_for_instances()
    context = Context()
    count = 0
    async with await client.generate("dummy_request", context=context) as stream:
        async for response in stream:
            print(f"got {response.data()}", flush=True)
            count += 1
            if count == 3:
                if kill:
                    context.kill()
                else:
                    context.stop_generating()
                break
    print("stopped", flush=True)
    await asyncio.sleep(0.5)  # the gentle stop is on its way


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--middle", action="store_true", help="call the proxy")
    parser.add_argument("--kill", action="store_true", help="end the request at once, not gently")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.middle, arguments.kill))
