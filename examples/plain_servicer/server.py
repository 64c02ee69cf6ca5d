"""A servicer of the generated classes, on a grpc.aio server of your own; one call makes it a worker of the mesh."""

import asyncio
import os
from collections.abc import AsyncIterator
from importlib.resources import files

import grpc

from dynamo_grpc import register_server
from dynamo_grpc.v1 import inference_pb2, inference_pb2_grpc

# a folder with tokenizer.json, as downloaded from a model hub; that of the tiny model, to try it
MODEL_PATH = os.environ.get("MODEL_PATH") or str(files("dynamo_workers") / "tiny" / "model")


class Countdown(inference_pb2_grpc.InferenceServicer):
    async def Generate(
        self, request: inference_pb2.PreprocessedRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        count = min(len(request.token_ids), request.stop_conditions.max_tokens)
        for sequence, token_id in enumerate(request.token_ids[:count]):
            delta = inference_pb2.ChoiceDelta(token_ids=[token_id])
            if sequence + 1 == count:
                delta.finish.reason = inference_pb2.FINISH_REASON_LENGTH
            yield inference_pb2.GenerateResponse(sequence=sequence, choices=[delta])


async def main() -> None:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    inference_pb2_grpc.add_InferenceServicer_to_server(Countdown(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    async with register_server(server, port, MODEL_PATH, model_name="countdown") as runtime:
        print(f"serving model countdown at 127.0.0.1:{port}", flush=True)
        await runtime.wait_for_shutdown()  # SIGTERM or SIGINT


if __name__ == "__main__":
    asyncio.run(main())
