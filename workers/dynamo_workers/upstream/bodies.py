"""From a request of the mesh to the body that OpenAI's API takes. Pure."""

from __future__ import annotations

import json
from typing import Any

from google.protobuf.struct_pb2 import Value

from dynamo_grpc.messages import from_value
from dynamo_grpc.v1 import inference_pb2 as pb

_SAMPLING = ("n", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed")
#: What OpenAI's API doesn't have, under the names that open servers took for it.
_EXTENSIONS = ("top_k", "min_p", "repetition_penalty")
_URLS = ("image_url", "video_url", "audio_url")


def body_of(request: pb.PreprocessedRequest, model: str) -> dict[str, Any]:
    """The options of a chat, or of a completion where the prompt is a text; `extra_body` has what isn't OpenAI's."""
    options, stop = request.sampling_options, request.stop_conditions
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    extra: dict[str, Any] = {}
    for name in _SAMPLING:
        if options.HasField(name):  # type: ignore[arg-type]
            body[name] = _plain(getattr(options, name))
    for name in _EXTENSIONS:
        if options.HasField(name):  # type: ignore[arg-type]
            extra[name] = _plain(getattr(options, name))
    if options.logit_bias:
        body["logit_bias"] = {str(token_id): _plain(bias) for token_id, bias in options.logit_bias.items()}
    if stop.HasField("max_tokens"):
        body["max_tokens"] = stop.max_tokens
    if stop.stop:
        body["stop"] = list(stop.stop)
    for name in ("min_tokens", "ignore_eos"):
        if stop.HasField(name):  # type: ignore[arg-type]
            extra[name] = getattr(stop, name)
    if stop.stop_token_ids:
        extra["stop_token_ids"] = list(stop.stop_token_ids)
    if request.HasField("guided_decoding"):
        _guide(request.guided_decoding, body, extra)
    if user := from_value(request.extensions.fields["user"]) if "user" in request.extensions else None:
        body["user"] = user
    if request.HasField("text"):
        body["prompt"] = request.text
    else:
        body["messages"] = [_turn(message) for message in request.messages]
        if request.HasField("tools"):
            body |= from_value(Value(struct_value=request.tools))
    return body | ({"extra_body": extra} if extra else {})


def _plain(value: float) -> float:
    """A number as it was before it became one of 32 bits."""
    return value if isinstance(value, int) else float(f"{value:.7g}")


def _guide(guided: pb.GuidedDecoding, body: dict[str, Any], extra: dict[str, Any]) -> None:
    match guided.WhichOneof("constraint"):
        case "json_object":
            body["response_format"] = {"type": "json_object"}
        case "json_schema":
            schema = {"name": "answer", "schema": json.loads(guided.json_schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        case "regex":
            extra["guided_regex"] = guided.regex
        case "choice":
            extra["guided_choice"] = list(guided.choice.choices)
        case "grammar":
            extra["guided_grammar"] = guided.grammar


def _turn(message: pb.ChatMessage) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role}
    parts = [_part(part) for part in message.content]
    if len(parts) == 1 and parts[0]["type"] == "text":
        turn["content"] = parts[0]["text"]
    elif parts or not message.tool_calls:
        turn["content"] = parts
    if message.name:
        turn["name"] = message.name
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    if message.reasoning:
        turn["reasoning_content"] = message.reasoning
    if message.tool_calls:
        turn["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return turn


def _part(part: pb.MessageContent) -> dict[str, Any]:
    kind = part.WhichOneof("part") or "text"
    if kind == "text":
        return {"type": "text", "text": part.text.text}
    told = {"url": getattr(part, kind).url}
    if kind == "image_url" and part.image_url.detail:
        told["detail"] = part.image_url.detail
    return {"type": kind, kind: told}
