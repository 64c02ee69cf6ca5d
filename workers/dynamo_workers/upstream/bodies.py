"""From a request of the mesh to the body that OpenAI's API takes. Pure."""

from __future__ import annotations

import json
from typing import Any

from dynamo_grpc.messages import chat_turn, from_struct, from_value, to_dict
from dynamo_grpc.v1 import inference_pb2 as pb

_SAMPLING = ("n", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed")
_STOPS = ("max_tokens", "stop")
#: What OpenAI's API doesn't have, under the names that open servers took for it.
_EXTENSIONS = ("top_k", "min_p", "repetition_penalty")
_STOP_EXTENSIONS = ("min_tokens", "ignore_eos", "stop_token_ids")


def body_of(request: pb.PreprocessedRequest, model: str) -> dict[str, Any]:
    """The options of a chat, or of a completion where the prompt is a text; `extra_body` has what isn't OpenAI's."""
    options, stops = to_dict(request.sampling_options), to_dict(request.stop_conditions)
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    body |= {name: options[name] for name in _SAMPLING if name in options}
    body |= {name: stops[name] for name in _STOPS if name in stops}
    extra = {name: options[name] for name in _EXTENSIONS if name in options}
    extra |= {name: stops[name] for name in _STOP_EXTENSIONS if name in stops}
    if bias := options.get("logit_bias"):
        body["logit_bias"] = {str(token_id): value for token_id, value in bias.items()}
    if request.HasField("guided_decoding"):
        _guide(request.guided_decoding, body, extra)
    if user := from_value(request.extensions.fields["user"]) if "user" in request.extensions else None:
        body["user"] = user
    if request.HasField("text"):
        body["prompt"] = request.text
    else:
        body["messages"] = [chat_turn(message) for message in request.messages]
        if request.HasField("tools"):
            body |= from_struct(request.tools)
    return body | ({"extra_body": extra} if extra else {})


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
