"""The service: text in, text out, as completions are over HTTP.

The tensors are those that Triton's language models and Dynamo have: `text_input` (BYTES) and `streaming` (BOOL) in,
`text_output` and `finish_reason` (BYTES, an element for each choice) out. All other options of a completion come as
parameters of the request, or as one JSON object in the tensor `sampling_parameters`.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Any

import orjson
from google.protobuf.message import Message

from dynamo_frontend.asking import Asking, Relays
from dynamo_frontend.catalog import Model
from dynamo_frontend.choices import echoes, select_completion
from dynamo_frontend.ingress import Ingress
from dynamo_frontend.oip import open_inference_pb2 as pb
from dynamo_frontend.oip import open_inference_pb2_grpc as pb_grpc
from dynamo_frontend.pieces import Piece, join
from dynamo_frontend.preprocess import naming, prepare_completion, shown_of
from dynamo_frontend.record import Record
from dynamo_frontend.schemas import CompletionRequest
from dynamo_frontend.serving import told_of
from dynamo_frontend.writing import whole
from dynamo_grpc import Context, InvalidRequestError, MeshError, UnsupportedError, __version__
from dynamo_grpc.metadata import printable
from dynamo_grpc.requests import Running
from dynamo_grpc.v1 import model_card_pb2

SERVICE = "inference.GRPCInferenceService"
_PLATFORM = "dynamo-grpc"
_VERSION = "1"
#: Name, data type, shape; and for inputs, whether it may be left out.
_INPUTS = (
    ("text_input", "BYTES", (1,), False),
    ("streaming", "BOOL", (1,), True),
    ("sampling_parameters", "BYTES", (1,), True),
)
_OUTPUTS = (("text_output", "BYTES", (-1,)), ("finish_reason", "BYTES", (-1,)))
_TYPES = {"BYTES": pb.TYPE_STRING, "BOOL": pb.TYPE_BOOL}
#: Parameters that say something of the transport, not of the answer.
_TRANSPORT = ("triton_enable_empty_final_response",)
#: So many requests of one stream run at once.
_MAX_IN_STREAM = 1_000
#: Metadata by which a client wants a failure to end the stream, with its status.
_ENDS_STREAM = "triton_grpc_error"


class OpenInferenceService(pb_grpc.GRPCInferenceServiceServicer):
    """The Open Inference Protocol over all models of the mesh."""

    def __init__(self, ingress: Ingress) -> None:
        self._ingress = ingress

    async def ServerLive(self, request: Any, context: Any) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> pb.ServerReadyResponse:
        ingress = self._ingress
        return pb.ServerReadyResponse(ready=bool(ingress.catalog().ready()) and not ingress.is_draining)

    async def ModelReady(self, request: Any, context: Any) -> pb.ModelReadyResponse:
        known = self._ingress.catalog().lookup(request.name)
        return pb.ModelReadyResponse(ready=known is not None and known.is_ready)

    async def ServerMetadata(self, request: Any, context: Any) -> pb.ServerMetadataResponse:
        extensions = ["model_configuration", "model_repository", "parameters"]
        return pb.ServerMetadataResponse(name=_PLATFORM, version=__version__, extensions=extensions)

    async def ModelMetadata(self, request: Any, context: Any) -> pb.ModelMetadataResponse:
        tensor = pb.ModelMetadataResponse.TensorMetadata
        name = await self._name(request, context)
        return pb.ModelMetadataResponse(
            name=name,
            versions=[_VERSION],
            platform=_PLATFORM,
            inputs=[tensor(name=name, datatype=kind, shape=shape) for name, kind, shape, _ in _INPUTS],
            outputs=[tensor(name=name, datatype=kind, shape=shape) for name, kind, shape in _OUTPUTS],
        )

    async def ModelConfig(self, request: Any, context: Any) -> pb.ModelConfigResponse:
        config = pb.ModelConfig(name=await self._name(request, context), platform=_PLATFORM, backend=_PLATFORM)
        for name, kind, shape, is_optional in _INPUTS:
            config.input.add(name=name, data_type=_TYPES[kind], dims=shape, optional=is_optional)
        for name, kind, shape in _OUTPUTS:
            config.output.add(name=name, data_type=_TYPES[kind], dims=shape)
        config.model_transaction_policy.decoupled = True
        return pb.ModelConfigResponse(config=config)

    async def RepositoryIndex(self, request: Any, context: Any) -> pb.RepositoryIndexResponse:
        response = pb.RepositoryIndexResponse()
        for model in sorted(self._ingress.catalog().all(), key=lambda model: model.card.name):
            if model.is_ready or not request.ready:
                state, reason = ("READY", "") if model.is_ready else ("UNAVAILABLE", "no worker answers")
                response.models.add(name=model.card.name, version=_VERSION, state=state, reason=reason)
        return response

    async def _name(self, request: Any, context: Any) -> str:
        """The model's own name, for one that can be asked."""
        names: list[str] = []

        async def work(running: Running) -> None:
            names.append((await self._ingress.catalog().find(request.name)).card.name)

        await self._ingress.requests.serve(context, f"{SERVICE}/ModelMetadata", "", work)
        return names[0]

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        responses: list[pb.ModelInferResponse] = []

        async def work(running: Running) -> None:
            async def send(response: pb.ModelInferResponse, *, is_last: bool) -> None:
                responses.append(response)

            await self._infer(request, running, running.context, send, "model_infer")

        await self._ingress.requests.serve(context, f"{SERVICE}/ModelInfer", request.id, work)
        return responses[0]

    async def ModelStreamInfer(self, request_iterator: AsyncIterator[Any], context: Any) -> None:
        async def work(running: Running) -> None:
            ends_stream = "true" in dict(context.invocation_metadata() or ()).get(_ENDS_STREAM, "")
            self._ingress.num_streams += 1
            try:
                answer = partial(self._infer_in_stream, running)
                stream = _Stream(running, answer, ends_stream=ends_stream)
                with self._ingress.stall_watch(running, lambda: stream.num_sent):
                    await stream.run(request_iterator)
            finally:
                self._ingress.num_streams -= 1

        await self._ingress.requests.serve(context, f"{SERVICE}/ModelStreamInfer", "", work)

    async def _infer_in_stream(self, running: Running, request: Any, send: Any) -> None:
        """One request of a stream."""
        context = Context(printable(request.id) or None, timeout_s=running.context.remaining_s())
        try:
            await self._infer(request, running, context, send, "model_stream_infer", may_stream=True)
        finally:
            context.kill()  # what still runs for it ends with it

    async def _infer(
        self, request: Any, running: Running, context: Context, send: Any, label: str, *, may_stream: bool = False
    ) -> None:
        async def work(record: Record, model: Model) -> None:
            asked = _Asked(request)
            record.is_stream = asked.body.stream
            if asked.body.stream and not may_stream:
                raise InvalidRequestError("streaming is for ModelStreamInfer", param="streaming")
            await self._answer(asked, record, model, context, send)

        await self._ingress.account(running, label, request.model_name, work, context=context)

    async def _answer(self, asked: _Asked, record: Record, model: Model, context: Context, send: Any) -> None:
        body = asked.body
        model.check_type(model_card_pb2.MODEL_TYPE_COMPLETIONS, "completions of a text")
        model.router.check_room()
        with naming("text_input"):
            parts = await prepare_completion(body, model)
            shown = shown_of(body)
        with Asking(model, parts, shown, context, record, self._ingress.router_mode) as asking:
            if body.stream:
                await self._stream(asked, asking(), [piece for part in parts for piece in echoes(part)], send)
            else:
                pieces = select_completion(body, await whole(asking, record.begin_again), parts)
                await send(asked.response(pieces), is_last=True)

    @staticmethod
    async def _stream(asked: _Asked, relays: Relays, waiting: list[Piece], send: Any) -> None:
        """A response for all that has come since the last one; `waiting` stands before the first."""

        def show(pieces: list[Piece]) -> bool:
            waiting.extend(pieces)
            return pieces[-1].finish is not None  # the last ones wait for the end

        async def rest() -> None:
            if waiting:
                response = asked.response(join(waiting))
                waiting.clear()
                await send(response, is_last=False)

        await relays.run(show, rest)
        await send(asked.response(join(waiting)), is_last=True)


class _Stream:
    """The requests of one ModelStreamInfer call: they run beside each other, and each fails for itself.

    Args:
        infer: answers one of them, by what it is given to send with.

    Attributes:
        num_sent: so many messages were sent.
    """

    def __init__(self, running: Running, infer: Callable[[Any, Any], Awaitable[None]], *, ends_stream: bool) -> None:
        self._running, self._infer, self._ends_stream = running, infer, ends_stream
        self._lock = asyncio.Lock()
        self.num_sent = 0
        self._slots = asyncio.Semaphore(_MAX_IN_STREAM)

    async def run(self, requests: AsyncIterator[Any]) -> None:
        """Until the client sends no more, and all is answered."""
        try:
            async with asyncio.TaskGroup() as tasks:
                async for request in requests:
                    await self._slots.acquire()
                    tasks.create_task(self._answer(request))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _answer(self, request: Any) -> None:
        async def send(response: pb.ModelInferResponse, *, is_last: bool) -> None:
            response.parameters["triton_final_response"].bool_param = is_last
            await self._send(pb.ModelStreamInferResponse(infer_response=response))

        try:
            await self._infer(request, send)
        except MeshError as error:
            if self._ends_stream:
                raise
            failed = pb.ModelStreamInferResponse(error_message=error.message)
            failed.infer_response.id, failed.infer_response.model_name = request.id, request.model_name
            failed.infer_response.parameters["triton_final_response"].bool_param = True
            await self._send(failed)
        finally:
            self._slots.release()

    async def _send(self, message: Message) -> None:
        async with self._lock:  # two writes at once are an error
            await self._running.sender.send(message)
            self.num_sent += 1


class _Asked:
    """A request as a completion.

    Raises:
        InvalidRequestError, UnsupportedError: it isn't one that could be answered; says which part.
    """

    def __init__(self, request: Any) -> None:
        self._request = request
        tensors = dict(_tensors(request))
        if "text_input" not in tensors:
            raise InvalidRequestError("give the prompt as text_input, a tensor of type BYTES", param="text_input")
        options = {name: _value(parameter) for name, parameter in request.parameters.items()}
        if packed := tensors.get("sampling_parameters"):
            options |= _json_object(packed)
        for name in _TRANSPORT:
            options.pop(name, None)
        if taken := options.keys() & {"model", "prompt", "stream"}:
            raise InvalidRequestError(f"{min(taken)} is no parameter: the request has it", param=min(taken))
        self._wanted = [output.name for output in request.outputs] or [name for name, *_ in _OUTPUTS]
        if unknown := set(self._wanted) - {name for name, *_ in _OUTPUTS}:
            raise InvalidRequestError(f"there is no output {min(unknown)!r}: there are text_output and finish_reason")
        text = tensors["text_input"]
        fixed = {"model": request.model_name, "prompt": text, "stream": tensors.get("streaming", False)}
        try:
            self.body = CompletionRequest.model_validate({**options, **fixed})
        except ValueError as error:
            raise told_of(error, request.id) from None
        if unknown_options := self.body.unknown():
            raise InvalidRequestError(f"there is no parameter {unknown_options[0]!r}", param=unknown_options[0])
        if self.body.stream and (self.body.n or 1) > 1:
            raise UnsupportedError("a stream has one choice: leave n or streaming out", param="n")

    def response(self, pieces: Sequence[Piece]) -> pb.ModelInferResponse:
        """The response with an element for each choice."""
        request = self._request
        response = pb.ModelInferResponse(model_name=request.model_name, model_version=_VERSION, id=request.id)
        values = {
            "text_output": [piece.text.encode() for piece in pieces] or [b""],
            "finish_reason": [(piece.finish or "").encode() for piece in pieces] or [b""],
        }
        for name in self._wanted:
            elements = values[name]
            response.outputs.add(name=name, datatype="BYTES", shape=[len(elements)])
            response.raw_output_contents.append(b"".join(struct.pack("<I", len(e)) + e for e in elements))
        return response


def _tensors(request: Any) -> Iterator[tuple[str, Any]]:
    """The inputs by name: text, or a truth value; each has one element."""
    known = {name: kind for name, kind, *_ in _INPUTS}
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequestError(f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs")
    for number, tensor in enumerate(request.inputs):
        name = tensor.name
        if name not in known:
            raise InvalidRequestError(f"there is no input {name!r}: there are {', '.join(known)}", param=name)
        if tensor.datatype != known[name]:
            raise InvalidRequestError(f"{name} is of type {tensor.datatype}: it must be {known[name]}", param=name)
        if any(size != 1 for size in tensor.shape):
            raise InvalidRequestError(f"{name} has the shape {list(tensor.shape)}: it has one element", param=name)
        yield name, _element(tensor, raw[number] if raw else None)


def _element(tensor: Any, raw: bytes | None) -> Any:
    if tensor.datatype == "BOOL":
        values = [bool(raw[0])] if raw else list(tensor.contents.bool_contents)
    elif raw is not None:
        size = struct.unpack("<I", raw[:4])[0] if len(raw) >= 4 else -1
        values = [raw[4:]] if size == len(raw) - 4 else []
    else:
        values = list(tensor.contents.bytes_contents)
    if len(values) != 1:
        raise InvalidRequestError(f"{tensor.name} must have one element", param=tensor.name)
    try:
        return values[0].decode() if isinstance(values[0], bytes) else values[0]
    except UnicodeDecodeError:
        raise InvalidRequestError(f"{tensor.name} is no UTF-8", param=tensor.name) from None


def _value(parameter: Any) -> Any:
    kind = parameter.WhichOneof("parameter_choice")
    return getattr(parameter, kind) if kind else None


def _json_object(text: str) -> dict[str, Any]:
    try:
        values = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"sampling_parameters is no JSON: {error}", param="sampling_parameters") from None
    if not isinstance(values, dict):
        raise InvalidRequestError("sampling_parameters must be a JSON object", param="sampling_parameters")
    return values
