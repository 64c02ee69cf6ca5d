"""Time the parts of a token's path one by one, without sockets: `python benchmarks/micro.py`.

Prints microseconds for one token, or one request, the best of several rounds: what `run.py` shows as a whole shows its
place here.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from dynamo_frontend.answer import Writer
from dynamo_frontend.catalog import Model
from dynamo_frontend.parsers.families import REASONING_PARSERS, TOOL_PARSERS
from dynamo_frontend.parsers.tools import Tools
from dynamo_frontend.postprocess import Detokenizer, StopMatcher
from dynamo_frontend.preparation import prepare
from dynamo_frontend.preprocess import Part, prepare_chat, shown_of
from dynamo_frontend.record import Metrics, Record
from dynamo_frontend.relay import Relay
from dynamo_frontend.schemas import ChatRequest
from dynamo_frontend.shapes import ChatShape
from dynamo_frontend.wire import Wire
from load import PROMPT
from systems import model_folder
from worker import token

from dynamo_grpc import RouterMode
from dynamo_grpc.cards import load_model
from dynamo_grpc.generation import Generation
from dynamo_grpc.inbox import Inbox, LaneClient
from dynamo_grpc.lane import Lane, Sender
from dynamo_grpc.v1 import inference_pb2

STREAMS, TOKENS, ROUNDS = 64, 100, 7


def loaded() -> Model:
    """The benchmark's model as a frontend has it, without instances."""
    made = load_model(model_folder(), "bench", context_length=200_000)
    files = {file.name: made.files[file.sha256].read_bytes() for file in made.card.files}
    model = Model(made.card, instances=None, router=None)  # type: ignore[arg-type]
    model.preparation = prepare(made.card, files)
    return model


MODEL = loaded()
assert MODEL.preparation is not None
assert MODEL.preparation.tokenizer is not None
BASE = MODEL.preparation.tokenizer.base
CHAT = {"model": "bench", "stream": True, "max_tokens": TOKENS, "messages": [{"role": "user", "content": PROMPT}]}
ASKED = ChatRequest.model_validate(CHAT)


class Sink(asyncio.Transport):
    """Takes what is written."""

    def is_closing(self) -> bool:
        return False

    def write(self, data: Any) -> None: ...


def relay() -> Relay:
    """One for a request that has begun."""
    record = Record(Metrics(), "id", "chat")
    part = Part(inference_pb2.PreprocessedRequest(token_ids=[1, 2, 3]))
    context: Any = None
    made = Relay(MODEL, part, shown_of(ASKED), context, record, RouterMode.RoundRobin, None)
    record.output(1, 1)
    return made


def frames() -> list[bytes]:
    """What a worker sends for STREAMS requests that step together."""
    lane = Lane()
    made = []
    for step in range(TOKENS):
        for number in range(STREAMS):
            lane.put_token(number, step, token(step))
        made.append(lane.next_frame().SerializeToString())
    return made


# -- parts: each does its work for STREAMS x TOKENS tokens ------------------------------------------------------------


def enforce() -> None:
    for _ in range(STREAMS):
        generation = Generation("bench", inference_pb2.PreprocessedRequest(token_ids=[1]))
        generation.feed(token(0))
        for step in range(1, TOKENS):
            generation.feed_token(token(step))


def send() -> None:
    lane = Lane()
    senders = [Sender(None, lane, number) for number in range(STREAMS)]
    for step in range(TOKENS):
        for sender in senders:
            sender.put_token(step, token(step))
        lane.next_frame().SerializeToString()


def dispatch(data: list[bytes]) -> None:
    client = LaneClient.__new__(LaneClient)
    client._inboxes = {number: Inbox() for number in range(STREAMS)}
    for frame in data:
        client._dispatch(inference_pb2.DeliverFrame.FromString(frame))


def detokenize() -> None:
    for _ in range(STREAMS):
        detokenizer = Detokenizer(BASE, [1, 2, 3], skip_special_tokens=True)
        for step in range(TOKENS):
            detokenizer.feed(token(step))


def stop_strings() -> None:
    for _ in range(STREAMS):
        matcher = StopMatcher(["</end>", "\n\nUser:"])
        for _ in range(TOKENS):
            matcher.feed(" word")


#: How each family begins a call with a long text in its arguments.
CALLS = {
    "hermes": '<tool_call>{"name": "write", "arguments": {"text": "',
    "llama3_json": '{"name": "write", "parameters": {"text": "',
    "mistral": '[TOOL_CALLS]write{"text": "',
    "pythonic": '[write(text="',
    "qwen3_coder": "<tool_call><function=write><parameter=text>",
    "deepseek_v3": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>write<｜tool▁sep｜>{"text": "',
    "deepseek_v3_2": '<｜DSML｜function_calls><｜DSML｜invoke name="write">'
    '<｜DSML｜parameter name="text" string="true">',
    "harmony": '<|channel|>commentary to=functions.write<|message|>{"text": "',
}


def parse(family: str, begun: str) -> None:
    """Read text, or the arguments of a call, token by token."""
    tools = Tools({"write": {"properties": {"text": {"type": "string"}}}})
    for _ in range(STREAMS):
        parser = TOOL_PARSERS[family](tools, REASONING_PARSERS["qwen3"])
        parser.feed(begun)
        for _ in range(TOKENS):
            parser.feed(" word")


def chunk() -> None:
    shape = ChatShape("id", ASKED, None)
    made = relay()
    pieces = made.feed([token(step) for step in range(TOKENS)])
    for _ in range(STREAMS):
        for piece in pieces:
            shape.event(piece)


def write() -> None:
    writers = [Writer(None, (), Wire(Sink(), asyncio.get_running_loop())) for _ in range(STREAMS)]  # type: ignore[arg-type]
    data = b"x" * 200
    for writer in writers:
        writer.is_started = True
    for _ in range(TOKENS):
        for writer in writers:
            writer.add(data)
        for writer in writers:
            assert writer._wire is not None
            writer._wire.flush()


async def prepare_request() -> None:
    for _ in range(STREAMS):
        await prepare_chat(ChatRequest.model_validate(CHAT), MODEL)


async def handler() -> None:
    async def generate() -> AsyncIterator[int]:
        for step in range(TOKENS):
            yield token(step)

    for _ in range(STREAMS):
        async for _item in generate():
            pass


async def main() -> None:
    """Time all."""
    data = frames()
    sync: dict[str, Callable[[], object]] = {
        "worker: limits and stop ids": enforce,
        "worker: into frames, packed": send,
        "frontend: unpacked, into inboxes": lambda: dispatch(data),
        "frontend: detokenize": detokenize,
        "frontend: two stop strings (if asked for)": stop_strings,
        "frontend: JSON of the event": chunk,
        "frontend: written to a socket that costs nothing": write,
    }
    for family, begun in CALLS.items():
        sync[f"frontend: {family}, text"] = functools.partial(parse, family, "")
        sync[f"frontend: {family}, arguments"] = functools.partial(parse, family, begun)
    sync["frontend: reasoning"] = functools.partial(parse, "none", "<think>")
    for name, part in sync.items():
        best = min(_timed(part) for _ in range(ROUNDS))
        print(f"{name:<52} {best / STREAMS / TOKENS * 1e6:6.2f} µs a token")
    for name, work, count in (
        ("worker: a generator alone", handler, STREAMS * TOKENS),
        ("frontend: template, tokens (cached), checks", prepare_request, STREAMS),
    ):
        best = 1e9
        for _ in range(ROUNDS):
            started = time.perf_counter()
            await work()
            best = min(best, time.perf_counter() - started)
        print(f"{name:<52} {best / count * 1e6:6.2f} µs a {'token' if count > STREAMS else 'request'}")


def _timed(part: Callable[[], object]) -> float:
    started = time.perf_counter()
    part()
    return time.perf_counter() - started


if __name__ == "__main__":
    asyncio.run(main())
