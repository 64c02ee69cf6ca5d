"""/v1/embeddings: texts or token lists to vectors."""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Any, ClassVar, Literal

import orjson
from pydantic import Field

from dynamo_frontend.catalog import Model
from dynamo_frontend.prompts import check_can_prepare, check_token_ids, prompts_of, tokenize_all
from dynamo_frontend.record import Record
from dynamo_frontend.schemas import Asked, check_refused
from dynamo_grpc import Context, HandlerEndedError, InvalidRequestError, RouterMode, UnsupportedError
from dynamo_grpc.v1 import inference_pb2 as pb
from dynamo_grpc.v1 import model_card_pb2
from dynamo_grpc.validation import MAX_INPUTS, check_embed

#: Values that are written without a turn for others: some milliseconds.
_TURN_VALUES = 50_000


class EmbeddingsRequest(Asked):
    """Body of /v1/embeddings."""

    input: str | list[int] | list[str] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, lt=2**32)
    user: str | None = None
    stream: bool = Field(False, description="There is nothing to stream: false.")
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {"truncate_prompt_tokens": ()}


async def prepare_embeddings(request: EmbeddingsRequest, model: Model) -> pb.EmbedRequest:
    """The request to send; checked."""
    if request.stream:
        raise UnsupportedError("embeddings come in one piece: leave stream out", param="stream")
    check_refused(request, request.refused)
    card = model.card
    message = pb.EmbedRequest(
        model=card.name, mdc_sum=card.checksum, dimensions=request.dimensions, priority=request.priority
    )
    if request.user:
        message.extensions["user"] = request.user
    prompts = prompts_of(request.input)
    if len(prompts) > MAX_INPUTS:
        raise InvalidRequestError(f"{len(prompts)} inputs: at most {MAX_INPUTS}", param="input")
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    takes_text = card.model_input == model_card_pb2.MODEL_INPUT_TEXT
    if not takes_text:
        check_can_prepare(model)
    tokens = iter(() if takes_text else await tokenize_all(model, texts))
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise InvalidRequestError("the input is empty", param=f"input.{number}")
        if isinstance(prompt, list):
            check_token_ids(prompt, f"input.{number}")
            message.inputs.add(token_ids=prompt)
        elif takes_text:
            message.inputs.add(text=prompt)
        else:
            message.inputs.add(token_ids=next(tokens))
    check_embed(message, card)
    return message


async def ask(
    message: pb.EmbedRequest,
    model: Model,
    context: Context,
    record: Record,
    mode: RouterMode,
    instance_id: int | None = None,
) -> pb.EmbedResponse:
    """Have a prepared request answered.

    Raises:
        HandlerEndedError: the worker gave fewer vectors than there are inputs, or more.
    """
    record.prepared()
    async with model.router.embed(message, context, mode, instance_id) as answers:
        record.routed(answers.instance.instance_id)
        try:
            taken = await answers.take()
        finally:
            record.num_retries += answers.num_retries
        record.output(answers.instance.instance_id, 0)
    if not taken or len((answer := taken[0]).embeddings) != len(message.inputs):
        raise HandlerEndedError(f"the worker gave no {len(message.inputs)} vectors")
    record.prompt_tokens = answer.usage.prompt_tokens
    return answer


async def prepare_embed(request: pb.EmbedRequest, model: Model) -> pb.EmbedRequest:
    """The request to send for a client's own message: texts as token ids where the model takes these; checked."""
    message = pb.EmbedRequest()
    message.CopyFrom(request)
    card = model.card
    for number, one in enumerate(message.inputs):
        if one.HasField("text") and not one.text and not one.token_ids:
            raise InvalidRequestError("the input is empty", param=f"inputs.{number}.text")
    if card.model_input != model_card_pb2.MODEL_INPUT_TEXT and (with_text := [i for i in message.inputs if i.text]):
        check_can_prepare(model)
        for one, token_ids in zip(with_text, await tokenize_all(model, [i.text for i in with_text]), strict=True):
            if not one.token_ids:  # both is refused below
                one.ClearField("text")
                one.token_ids.extend(token_ids)
    check_embed(message, card)
    message.model, message.mdc_sum = card.name, card.checksum
    return message


async def body_of(answer: pb.EmbedResponse, request: EmbeddingsRequest) -> bytes:
    """The answer as OpenAI has it; the loop gets its turns while a large one is written."""
    rows: list[bytes] = []
    num_written = 0
    for index, vector in enumerate(answer.embeddings):
        values = _packed(vector) if request.encoding_format == "base64" else list(vector.values)
        rows.append(orjson.dumps({"object": "embedding", "index": index, "embedding": values}))
        num_written += len(vector.values)
        if num_written > _TURN_VALUES:
            num_written = 0
            await asyncio.sleep(0)
    num = answer.usage.prompt_tokens
    rest = {"model": request.model, "usage": {"prompt_tokens": num, "total_tokens": num}}
    return b'{"object":"list","data":[' + b",".join(rows) + b"]," + orjson.dumps(rest)[1:]


def _packed(vector: pb.Embedding) -> str:
    """Its values as base64 of little-endian 32-bit floats."""
    return base64.b64encode(struct.pack(f"<{len(vector.values)}f", *vector.values)).decode()
