"""Between protobuf messages and plain Python values.

The generated classes are the data model; what is here only shows them as dicts and JSON values for code that wants
those. `google.protobuf.json_format` could serve for dicts, but it turns 64-bit integers into strings and fixed floats
into rounded ones, and costs ten times as much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from google.protobuf import json_format, struct_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from dynamo_grpc.errors import InvalidRequestError
from dynamo_grpc.v1 import inference_pb2

_M = TypeVar("_M", bound=Message)
_MAX_EXACT = 2**53


def set_fields(message: Message) -> dict[str, Any]:
    """Only the fields that were set, by name: `SamplingParams(**set_fields(request.sampling_options))`.

    Nested messages stay messages, repeated fields become lists, maps become dicts.
    """
    return {field.name: _shallow(field, value) for field, value in message.ListFields()}


def _shallow(field: FieldDescriptor, value: Any) -> Any:
    if _is_map(field):
        return dict(value)
    return list(value) if field.is_repeated else _plain_float(field, value)


def _plain_float(field: FieldDescriptor, value: Any) -> Any:
    # 0.7 as a 32-bit float reads 0.699999988: give back the shortest number that is the same float.
    if field.cpp_type == FieldDescriptor.CPPTYPE_FLOAT and math.isfinite(value):
        return float(f"{value:.7g}")
    return value


def _is_map(field: FieldDescriptor) -> bool:
    return bool(field.message_type is not None and field.message_type.GetOptions().map_entry)


def prompt_text(request: inference_pb2.PreprocessedRequest) -> str:
    """The prompt of a request to a worker that takes text: its `text`, or the text of its last message."""
    if request.HasField("text") or not request.messages:
        return request.text
    return "".join(part.text.text for part in request.messages[-1].content)


def chat_turn(message: inference_pb2.ChatMessage) -> dict[str, Any]:
    """A message of a chat as OpenAI's API has it; content that is one text is a string."""
    turn: dict[str, Any] = {"role": message.role}
    parts = [_chat_part(part) for part in message.content]
    if len(parts) == 1 and parts[0]["type"] == "text":
        turn["content"] = parts[0]["text"]
    elif parts or not message.tool_calls:
        turn["content"] = parts
    more = {"name": message.name, "tool_call_id": message.tool_call_id, "reasoning_content": message.reasoning}
    turn |= {name: value for name, value in more.items() if value}
    if message.tool_calls:
        turn["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return turn


def _chat_part(part: inference_pb2.MessageContent) -> dict[str, Any]:
    kind = part.WhichOneof("part") or "text"
    if kind == "text":
        return {"type": "text", "text": part.text.text}
    told = {"url": getattr(part, kind).url}
    if kind == "image_url" and part.image_url.detail:
        told["detail"] = part.image_url.detail
    return {"type": kind, kind: told}


def to_dict(message: Message) -> dict[str, Any]:
    """A message as a dict: proto field names, only what was set, enums by number, Struct and Value as JSON values."""
    return {field.name: _deep(field, value) for field, value in message.ListFields()}


def _deep(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None and _is_map(field):
        inner = field.message_type.fields_by_name["value"]
        return {key: _deep_one(inner, item) for key, item in value.items()}
    if field.is_repeated:
        return [_deep_one(field, item) for item in value] if field.message_type else list(value)
    return _deep_one(field, value)


def _deep_one(field: FieldDescriptor, value: Any) -> Any:
    if isinstance(value, struct_pb2.Struct):
        return from_struct(value)
    if isinstance(value, struct_pb2.Value):
        return from_value(value)
    if isinstance(value, Message):
        return to_dict(value)
    return _plain_float(field, value)


def from_dict(values: Mapping[str, Any], message: _M) -> _M:
    """Fill `message` from a dict as `to_dict` gives it; None counts as unset. Returns the message.

    Raises:
        InvalidRequestError: a name that the message doesn't have, or a value of the wrong type.
    """
    kept = {key: value for key, value in values.items() if value is not None}
    try:
        return json_format.ParseDict(_without_none(kept), message)
    except json_format.ParseError as error:
        raise InvalidRequestError(f"no {message.DESCRIPTOR.name}: {error}") from error


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(item) for item in value]
    return value


def to_value(value: Any, path: str = "") -> struct_pb2.Value:
    """A JSON value as a protobuf Value.

    Raises:
        TypeError: something in it is no JSON value, or an integer too large for a JSON number (2^53 and up).
    """
    match value:
        case None:
            return struct_pb2.Value(null_value=struct_pb2.NULL_VALUE)
        case bool():
            return struct_pb2.Value(bool_value=value)
        case int() if abs(value) >= _MAX_EXACT:
            raise TypeError(f"{path or 'the value'} is {value}, too large for a JSON number: send it as a string")
        case int() | float():
            return struct_pb2.Value(number_value=value)
        case str():
            return struct_pb2.Value(string_value=value)
        case Mapping():
            fields = {str(key): to_value(item, f"{path}.{key}") for key, item in value.items()}
            return struct_pb2.Value(struct_value=struct_pb2.Struct(fields=fields))
        case list() | tuple():
            items = [to_value(item, f"{path}[{index}]") for index, item in enumerate(value)]
            return struct_pb2.Value(list_value=struct_pb2.ListValue(values=items))
    raise TypeError(f"{path or 'the value'} is a {type(value).__name__}, which JSON doesn't have")


def from_value(value: struct_pb2.Value) -> Any:
    """A protobuf Value as a JSON value; whole numbers come back as int."""
    match value.WhichOneof("kind"):
        case "number_value":
            number = value.number_value
            return int(number) if number.is_integer() and abs(number) < _MAX_EXACT else number
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return from_struct(value.struct_value)
        case "list_value":
            return [from_value(item) for item in value.list_value.values]
        case _:
            return None


def from_struct(value: struct_pb2.Struct) -> dict[str, Any]:
    """A protobuf Struct as a dict of JSON values."""
    return {key: from_value(item) for key, item in value.fields.items()}


def to_struct(values: Mapping[str, Any]) -> struct_pb2.Struct:
    """A dict of JSON values as a protobuf Struct."""
    return to_value(values).struct_value
