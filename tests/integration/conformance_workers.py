"""Right workers, and one that passes on to one, to do something wrong by the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2_grpc

from dynamo_grpc import Context, ModelInput, ModelType, Worker
from dynamo_grpc.v1 import control_pb2_grpc, inference_pb2, inference_pb2_grpc

from .front import FOLDER


class Right(Worker):
    """Says the tokens of its prompt again and again."""

    model_path = FOLDER
    model_name = "right"
    capabilities = ("n", "logprobs")
    max_concurrent = 10
    max_queued = 10

    async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> AsyncIterator[Any]:
        num_prompt = request.resume.num_prompt_tokens or len(request.token_ids)
        prompt, wants = request.token_ids[:num_prompt], request.output_options.HasField("logprobs")
        for number in range(len(request.token_ids) - num_prompt, 100_000):
            token = prompt[number % len(prompt)]
            for index in range(max(1, request.sampling_options.n)):
                top = [{"token_id": i, "logprob": -1.0} for i in range(request.output_options.logprobs)]
                more = {"log_probs": [-1.0], "top_logprobs": [top]} if wants else {}
                yield {"token_ids": [token], "index": index, **more}
            await asyncio.sleep(0.001)
            if context.is_stopped():
                return


class RightText(Worker):
    """Says the words of its prompt again and again."""

    model_name = "right-text"
    model_input = ModelInput.Text

    async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> AsyncIterator[Any]:
        words = request.text.split()
        for number in range(request.stop_conditions.max_tokens):
            yield words[number % len(words)] + " "
            await asyncio.sleep(0.001)
            if context.is_stopped():
                return
        yield {"finish_reason": "length"}


class RightVectors(Worker):
    """Makes vectors."""

    model_path = FOLDER
    model_name = "right-vectors"
    model_type = ModelType.Embedding

    async def generate(self, request: inference_pb2.EmbedRequest, context: Context) -> Any:
        return [[float(len(one.token_ids)), 1.0] for one in request.inputs]


# -- a worker that passes all on to a right one, and changes what it says on the way --------------------------------------


class Wrong(inference_pb2_grpc.InferenceServicer, control_pb2_grpc.ControlServicer, health_pb2_grpc.HealthServicer):
    """Passes everything on; subclasses break one rule each."""

    base: type[Worker] = Right
    after_deadlines = False

    def __init__(self, address: str) -> None:
        self.channel = grpc.aio.insecure_channel(address)
        self.inference: Any = inference_pb2_grpc.InferenceStub(self.channel)
        self.control: Any = control_pb2_grpc.ControlStub(self.channel)
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)
        self.kept: list[Any] = []
        self.num = 0

    def request(self, request: Any) -> Any:
        return request

    def outputs(self, outputs: list[Any], request: Any) -> Iterable[Any]:
        """What is told of the outputs that came together: all of a short stream at its end, one of a long one."""
        return outputs

    def error(self, code: grpc.StatusCode, details: status_pb2.Status, request: Any) -> tuple[Any, Any]:
        return code, details

    def metadata(self, context: Any) -> tuple[Any, ...]:
        return tuple(context.invocation_metadata() or ())

    async def Generate(self, request: Any, context: Any) -> Any:
        asked = inference_pb2.PreprocessedRequest()
        asked.CopyFrom(request)
        timeout_s = context.time_remaining()
        call = self.inference.Generate(
            self.request(asked),
            metadata=self.metadata(context),
            timeout=None if self.after_deadlines else timeout_s,
        )
        is_short = request.stop_conditions.max_tokens < 100
        outputs: list[Any] = []
        goes_on = False
        try:
            # shielded: a cancel of the task that reads would be a cancel of the call
            while (output := await asyncio.shield(asyncio.ensure_future(call.read()))) is not grpc.aio.EOF:
                outputs.append(output)
                if not is_short:
                    for changed in self.outputs(outputs, request):
                        yield changed
                    outputs = []
            for changed in self.outputs(outputs, request) if is_short else ():
                yield changed
            context.set_trailing_metadata(tuple(await call.trailing_metadata() or ()))
        except grpc.aio.AioRpcError as error:
            await self._abort(context, error, request)
        except asyncio.CancelledError:
            goes_on = self.goes_on_after(is_late=timeout_s is not None)  # calls that the kit cancels have none
            raise
        finally:
            if goes_on:
                self.kept.append(asyncio.ensure_future(cancel_later(call)))
            else:
                call.cancel()

    def goes_on_after(self, *, is_late: bool) -> bool:
        """Whether the work goes on when the client has cancelled the call, or its deadline has passed."""
        return False

    async def _abort(self, context: Any, error: grpc.aio.AioRpcError, request: Any) -> None:
        trailers = dict(tuple(error.trailing_metadata() or ()))
        details = status_pb2.Status.FromString(trailers.pop("grpc-status-details-bin", b""))
        code, changed = self.error(error.code(), details, request)
        if changed is not None:
            trailers["grpc-status-details-bin"] = changed.SerializeToString()
        await context.abort(code, error.details() or "", tuple(trailers.items()))

    async def _once(self, call: Any, context: Any, request: Any) -> Any:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            await self._abort(context, error, request)

    async def GenerateOnce(self, request: Any, context: Any) -> Any:
        return await self._once(self.inference.GenerateOnce(request), context, request)

    async def Embed(self, request: Any, context: Any) -> Any:
        return await self._once(self.inference.Embed(request), context, request)

    async def Deliver(self, request: Any, context: Any) -> Any:
        call = self.inference.Deliver(request)
        await call.initial_metadata()
        await context.send_initial_metadata(())
        try:
            async for frame in call:
                for changed in self.frame(frame):
                    yield changed
        finally:
            call.cancel()

    def frame(self, frame: Any) -> Iterable[Any]:
        return [frame]

    async def Describe(self, request: Any, context: Any) -> Any:
        return await self.control.Describe(request)

    async def GetFile(self, request: Any, context: Any) -> Any:
        try:
            async for piece in self.control.GetFile(request):
                yield piece
        except grpc.aio.AioRpcError as error:
            await self._abort(context, error, request)

    async def Stop(self, request: Any, context: Any) -> Any:
        return await self.control.Stop(request)

    async def Drain(self, request: Any, context: Any) -> Any:
        return await self.control.Drain(request)

    async def Check(self, request: Any, context: Any) -> Any:
        return await self._once(self.health.Check(request), context, request)

    async def Watch(self, request: Any, context: Any) -> Any:
        async for status in self.health.Watch(request):
            yield status


async def cancel_later(call: Any) -> None:
    """After longer than it may go on, and before the next rule."""
    try:
        await asyncio.sleep(1.6)
    finally:
        call.cancel()
