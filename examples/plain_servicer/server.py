"""A servicer of the generated classes, on a grpc.aio server of your own; one call makes it a worker of the mesh.

It says its prompt back, a token at a time. `Worker` does the checks, limits and counts of this and check.py for you;
this is for servers that are there already.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from importlib.resources import files

import grpc
from check import RefusedError, check, refuse

from dynamo_grpc import register_server
from dynamo_grpc.cards import load_model
from dynamo_grpc.v1 import inference_pb2 as pb
from dynamo_grpc.v1 import inference_pb2_grpc, model_card_pb2

# a folder with tokenizer.json, as downloaded from a model hub; that of the tiny model, to try it
MODEL_PATH = os.environ.get("MODEL_PATH") or str(files("dynamo_workers") / "tiny" / "model")


class Countdown(inference_pb2_grpc.InferenceServicer):
    def __init__(self, card: model_card_pb2.ModelCard) -> None:
        self.card, self.num_requests = card, 0

    async def Generate(
        self, request: pb.PreprocessedRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        try:
            check(request, self.card)
        except RefusedError as error:
            await refuse(context, error)
        self.num_requests += 1
        try:
            async for output in self.answer(request):
                yield output
        finally:
            self.num_requests -= 1

    def count(self) -> int:
        return self.num_requests

    async def answer(self, request: pb.PreprocessedRequest) -> AsyncIterator[pb.GenerateResponse]:
        num_prompt = request.resume.num_prompt_tokens or len(request.token_ids)
        num_given = len(request.token_ids) - num_prompt  # elsewhere, before another worker was lost
        usage, sequence, ends = pb.Usage(prompt_tokens=num_prompt, completion_tokens=num_given), 0, False
        for token_id in request.token_ids[num_given:num_prompt]:
            delta = limit(token_id, usage.completion_tokens - num_given, request, self.card)
            usage.completion_tokens += len(delta.token_ids)
            ends = delta.HasField("finish")
            yield pb.GenerateResponse(sequence=sequence, choices=[delta], usage=usage if ends else None)
            if ends:
                return
            sequence += 1
            await asyncio.sleep(0.005)  # a cancel of the call ends it here
        delta = pb.ChoiceDelta(finish=pb.FinishInfo(reason=pb.FINISH_REASON_STOP))
        yield pb.GenerateResponse(sequence=sequence, choices=[delta], usage=usage)


def limit(
    token_id: int, num_tokens: int, request: pb.PreprocessedRequest, card: model_card_pb2.ModelCard
) -> pb.ChoiceDelta:
    """A token as what is new in the answer, and the answer's end, if it is that."""
    stop, delta = request.stop_conditions, pb.ChoiceDelta()
    eos = () if stop.ignore_eos else request.eos_token_ids or card.eos_token_ids
    if num_tokens >= stop.min_tokens and (token_id in eos or token_id in stop.stop_token_ids_hidden):
        delta.finish.reason, delta.finish.stop_token_id = pb.FINISH_REASON_STOP, token_id
        return delta
    delta.token_ids.append(token_id)
    room = card.context_length - len(request.token_ids)
    if num_tokens + 1 >= stop.min_tokens and token_id in stop.stop_token_ids:
        delta.finish.reason, delta.finish.stop_token_id = pb.FINISH_REASON_STOP, token_id
    elif num_tokens + 1 >= (min(stop.max_tokens, room) if stop.HasField("max_tokens") else room):
        delta.finish.reason = pb.FINISH_REASON_LENGTH
    return delta


async def main() -> None:
    servicer = Countdown(load_model(MODEL_PATH, "countdown").card)
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    async with register_server(
        server, port, MODEL_PATH, model_name="countdown", count_requests=servicer.count
    ) as runtime:
        print(f"serving model countdown at 127.0.0.1:{port}", flush=True)
        await runtime.wait_for_shutdown()  # SIGTERM or SIGINT


if __name__ == "__main__":
    asyncio.run(main())
