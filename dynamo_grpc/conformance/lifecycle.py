"""Rules about calls and the process: cancel, deadline, stop, deliveries, health, what it tells of itself, drain."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from dynamo_grpc.cards import checksum
from dynamo_grpc.conformance.rule import Broken, NotSeen, Rules
from dynamo_grpc.conformance.target import CALL_S, Seen, Target
from dynamo_grpc.services import INFERENCE
from dynamo_grpc.v1 import control_pb2, inference_pb2, model_card_pb2

rules = Rules()
#: How long a request may go on after a gentle stop: it may finish its sentence.
_STOP_S = 10.0
#: What runs while it drains takes about so long: enough to be interrupted, and soon at its end.
_DRAIN_S = 3.0
#: A deadline that an answer to a long request doesn't keep.
_DEADLINE_S = 0.3
#: A health stream that says nothing new for so long stays open.
_QUIET_S = 0.3
#: An answer that is over so soon can't be cancelled in its middle.
_LEAST_S = 0.5


@rules.rule(is_for_vectors=True)
async def describe(target: Target) -> None:
    """Control.Describe tells the model's card (name, input, types, checksum)."""
    card = target.card
    if not card.checksum:
        raise Broken("Control.Describe is not implemented, or its card has no checksum")
    if not (card.name and card.model_input and card.model_types):
        raise Broken(f"the card has name {card.name!r}, {card.model_input=}, {list(card.model_types)=}")


@rules.rule(is_for_vectors=True)
async def card_checksum(target: Target) -> None:
    """The card's checksum is that of the card (`dynamo-grpc card` makes one)."""
    if not target.card.checksum:
        raise NotSeen("there is no checksum")
    if (right := checksum(target.card)) != target.card.checksum:
        raise Broken(f"the card says {target.card.checksum}, and its checksum is {right}")


@rules.rule(is_for_vectors=True)
async def files(target: Target) -> None:
    """Control.GetFile gives each file of the card, by its hash."""
    if not target.card.files:
        raise NotSeen("the card has no files")
    for file in target.card.files:
        try:
            call = target.control.GetFile(control_pb2.GetFileRequest(sha256=file.sha256), timeout=CALL_S)
            data = b"".join([piece.data async for piece in call])
        except grpc.aio.AioRpcError as error:
            raise Broken(f"{file.name}: {error.code().name}: {error.details()}") from None
        if (hashlib.sha256(data).hexdigest(), len(data)) != (file.sha256, file.size_bytes):
            raise Broken(f"{file.name} came with {len(data)} bytes, and another hash or size than the card says")
    call = target.control.GetFile(control_pb2.GetFileRequest(sha256="0" * 64), timeout=CALL_S)
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            return
        raise Broken(f"a file that isn't there is {error.code().name}, not NOT_FOUND") from None
    raise Broken("a file that isn't there was given")


@rules.rule(is_for_vectors=True)
async def health(target: Target) -> None:
    """grpc.health.v1: "" and dynamo_grpc.v1.Inference are SERVING, others NOT_FOUND."""
    for service, wanted in (("", "SERVING"), (INFERENCE, "SERVING"), ("no.such.Service", "NOT_FOUND")):
        if (came := await target.serves(service)) != wanted:
            raise Broken(f"Check of {service!r} gave {came}, not {wanted}")


@rules.rule(is_for_vectors=True)
async def health_watch(target: Target) -> None:
    """Health.Watch tells the state at once and stays open."""
    call = target.health.Watch(health_pb2.HealthCheckRequest())
    try:
        async with asyncio.timeout(5.0):
            first = await call.read()
    except (TimeoutError, grpc.aio.AioRpcError):
        raise Broken("nothing came") from None
    if first is grpc.aio.EOF or first.status != health_pb2.HealthCheckResponse.SERVING:
        raise Broken("it didn't begin with SERVING")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_QUIET_S):
            await call.read()
            raise Broken("it ended, or told a change that isn't one")
    call.cancel()


@contextlib.asynccontextmanager
async def _running(target: Target, **kwargs: Any) -> AsyncIterator[Any]:
    """A call whose first output has come, of an answer that takes its time."""
    call = target.inference.Generate(target.ask_long(), **kwargs)
    try:
        async with asyncio.timeout(CALL_S):
            first = await call.read()
        if first is grpc.aio.EOF:
            raise NotSeen(f"a long request ended with {(await call.code()).name} and no output")
        yield call
    finally:
        call.cancel()
        await _until_idle(target)


async def _until_idle(target: Target) -> None:
    """Wait until nothing runs that could spoil what comes next; how long that takes is judged elsewhere."""
    with contextlib.suppress(NotSeen):
        await target.wait_idle(CALL_S)


async def _need_slow(target: Target) -> None:
    """See that an answer can be cut in the middle.

    Raises:
        NotSeen: it is there at once.
    """
    if target.quick_s is None:
        seen = await target.read(target.ask_long(), timeout_s=_LEAST_S)
        target.quick_s = seen.took_s if seen.code is grpc.StatusCode.OK else 0.0
        await _until_idle(target)
    if target.quick_s:
        raise NotSeen(f"its longest answer is over in {target.quick_s:.2f} s: nothing to interrupt")


@rules.rule()
async def load(target: Target) -> None:
    """Control.Describe counts the requests that run."""
    await _need_slow(target)
    async with _running(target):
        if (num := await target.num_requests()) != 1:
            raise Broken(f"num_requests was {num} while one request ran")


@rules.rule()
async def cancel(target: Target) -> None:
    """Cancelling the call ends its work, within 1 s."""
    await _need_slow(target)
    async with _running(target) as call:
        call.cancel()
        await target.until_idle("a cancel")


@rules.rule()
async def deadline(target: Target) -> None:
    """The call's deadline ends its work, within 1 s."""
    await _need_slow(target)
    seen = await target.read(target.ask_long(), timeout_s=_DEADLINE_S)
    if seen.code is not grpc.StatusCode.CANCELLED:  # some servers reset the stream a moment before we notice
        seen.need(grpc.StatusCode.DEADLINE_EXCEEDED, f"a deadline of {_DEADLINE_S:g} s")
    await target.until_idle("a deadline")


@rules.rule()
async def stop(target: Target) -> None:
    """Control.Stop ends a request gently: OK, with a finish reason and the usage; where it is implemented."""
    try:
        unknown = await target.control.Stop(control_pb2.StopRequest(request_id="nobody's"), timeout=5.0)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            raise NotSeen("it is not implemented") from None
        raise Broken(f"Stop ended with {error.code().name}") from None
    if unknown.found:
        raise Broken("it found a request that nobody sent")
    await _need_slow(target)
    async with _running(target, metadata=(("x-request-id", "conformance-stop"),)) as call:
        answer = await target.control.Stop(control_pb2.StopRequest(request_id="conformance-stop"), timeout=5.0)
        if not answer.found:
            raise Broken("it didn't find a running request by its x-request-id")
        try:
            async with asyncio.timeout(_STOP_S):
                seen = await target.finish(call)
        except TimeoutError:
            raise Broken(f"the request went on for {_STOP_S:g} s after its stop") from None
        if seen.code is not grpc.StatusCode.OK or len(seen.finishes()) != 1 or len(seen.usages) != 1:
            counts = f"{len(seen.finishes())} finishes and {len(seen.usages)} usages"
            raise Broken(f"the stopped request ended with {seen.status}, {counts}")
        if seen.finishes()[0].reason == inference_pb2.FINISH_REASON_UNSPECIFIED:
            raise Broken("the stopped request ended without a reason")


@rules.rule()
async def delivery(target: Target) -> None:
    """Outputs of requests that name a delivery come by it, whole; where Deliver is implemented."""
    name = f"conformance-{os.getpid()}"
    lane = target.inference.Deliver(inference_pb2.DeliverRequest(delivery=name))
    frames: list[inference_pb2.DeliverFrame] = []
    reading = asyncio.ensure_future(_read_all(lane, frames))
    metadata_there = asyncio.ensure_future(lane.initial_metadata())
    await asyncio.wait((reading, metadata_there), timeout=5.0, return_when=asyncio.FIRST_COMPLETED)
    metadata_there.cancel()
    try:
        if lane.done():
            if (code := await lane.code()) is grpc.StatusCode.UNIMPLEMENTED:
                raise NotSeen("it is not implemented")
            raise Broken(f"Deliver ended at once with {code.name}")
        alone = await target.read(target.ask())
        seen = await target.read(target.ask(), metadata=(("x-delivery", name), ("x-delivery-id", "7")))
        told = int(seen.trailers.get("x-delivery-outputs", 0))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5.0):
                while _count(frames) < told:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        _check_delivered(seen, frames, told, alone)
    finally:
        lane.cancel()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def _read_all(lane: Any, frames: list[inference_pb2.DeliverFrame]) -> None:
    async for frame in lane:
        frames.append(frame)  # noqa: PERF401 - others look at it meanwhile


def _count(frames: list[inference_pb2.DeliverFrame]) -> int:
    return sum(len(frame.outputs) + len(frame.tokens.ids) for frame in frames)


def _check_delivered(seen: Seen, frames: list[inference_pb2.DeliverFrame], told: int, alone: Seen) -> None:
    if _count(frames) != told:
        raise Broken(f"{_count(frames)} outputs came by the delivery; the trailer x-delivery-outputs said {told}")
    tokens: dict[int, list[int]] = {}
    for frame in frames:
        if wrong := ({output.id for output in frame.outputs} | set(frame.tokens.ids)) - {7}:
            raise Broken(f"the delivery had outputs for the requests {sorted(wrong)}; only 7 was asked")
        for output in frame.outputs:
            response = output.response
            tokens[response.sequence] = [t for d in response.choices for t in d.token_ids]
        for sequence, token in zip(frame.tokens.sequences, frame.tokens.token_ids, strict=True):
            tokens[sequence] = [token]
    for own in seen.outputs:
        tokens[own.sequence] = [t for d in own.choices for t in d.token_ids]
    if sorted(tokens) != list(range(len(tokens))):
        raise Broken(f"both lanes together had the outputs {sorted(tokens)}")
    merged = [token for sequence in sorted(tokens) for token in tokens[sequence]]
    if merged != alone.tokens():
        raise Broken(f"by the delivery the answer was {merged}, without it {alone.tokens()}")


@rules.rule(is_for_vectors=True)
async def embed(target: Target) -> None:
    """Embed gives a vector for each input, all of one length."""
    if model_card_pb2.MODEL_TYPE_EMBEDDING not in target.card.model_types:
        raise NotSeen("the model makes no embeddings")
    request = inference_pb2.EmbedRequest(model=target.model)
    for number in (3, 5, 8):
        prompt = target.prompt(number)
        request.inputs.add(token_ids=prompt.token_ids, text=prompt.text if target.takes_text else None)
    try:
        answer = await target.inference.Embed(request, timeout=CALL_S)
    except grpc.aio.AioRpcError as error:
        raise Broken(f"it ended with {error.code().name}: {error.details()}") from None
    lengths = [len(embedding.values) for embedding in answer.embeddings]
    if len(lengths) != 3 or len(set(lengths)) != 1 or not lengths[0]:
        raise Broken(f"3 inputs gave vectors of the lengths {lengths}")


@rules.rule(is_for_vectors=True)
async def embed_nothing(target: Target) -> None:
    """Embed without an input is INVALID_ARGUMENT."""
    if model_card_pb2.MODEL_TYPE_EMBEDDING not in target.card.model_types:
        raise NotSeen("the model makes no embeddings")
    try:
        await target.inference.Embed(inference_pb2.EmbedRequest(model=target.model), timeout=CALL_S)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
            return
        raise Broken(f"it ended with {error.code().name}: {error.details()}") from None
    raise Broken("it was answered")


@rules.rule(is_last=True)
async def drain(target: Target) -> None:
    """On SIGTERM or Control.Drain: NOT_SERVING, new requests UNAVAILABLE, the running one ends well."""
    watch = target.health.Watch(health_pb2.HealthCheckRequest())
    await watch.read()
    first = await target.read(target.ask())
    size = max(30, min(target.room, int(_DRAIN_S * 8 / max(first.took_s, 0.001))))
    call = target.inference.Generate(target.ask(size, size))
    try:
        async with asyncio.timeout(CALL_S):
            await call.read()
            await _tell_to_drain(target)
            change = await watch.read()
            if change is grpc.aio.EOF or change.status != health_pb2.HealthCheckResponse.NOT_SERVING:
                raise Broken("health didn't change to NOT_SERVING")
            new = await target.read(target.ask())
            new.need(grpc.StatusCode.UNAVAILABLE, "a new request", "DRAINING")
            seen = await target.finish(call)
    except TimeoutError:
        raise Broken(f"it had not drained after {CALL_S:g} s") from None
    except grpc.aio.AioRpcError as error:
        raise Broken(f"its health service ended with {error.code().name} before it said NOT_SERVING") from None
    finally:
        call.cancel()
        watch.cancel()
    if seen.code is grpc.StatusCode.OK:
        if len(seen.finishes()) != 1 or len(seen.usages) != 1:
            raise Broken(f"the request that ran ended with {len(seen.finishes())} finishes, {len(seen.usages)} usages")
    elif (seen.code, seen.reason()) != (grpc.StatusCode.UNAVAILABLE, "ENGINE_SHUTDOWN"):
        told = seen.reason() or "no reason in its details"
        raise Broken(f"the request that ran ended with {seen.status} ({told}), not whole and not ENGINE_SHUTDOWN")


async def _tell_to_drain(target: Target) -> None:
    if target.pid is not None:
        try:
            os.kill(target.pid, signal.SIGTERM)
        except OSError as error:
            raise NotSeen(f"process {target.pid} can't be told to leave: {error}") from None
        return
    try:
        await target.control.Drain(control_pb2.DrainRequest(), timeout=5.0)
    except grpc.aio.AioRpcError as error:
        text = f"Control.Drain ended with {error.code().name}; with --pid it is told by SIGTERM"
        raise NotSeen(text) from None
