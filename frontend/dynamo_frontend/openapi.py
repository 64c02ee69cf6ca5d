"""/openapi.json: what FastAPI can't know because bodies are read and answers written without it."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_TEMPLATE = "#/components/schemas/{model}"


def _object(required: Mapping[str, Any], **optional: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": {**required, **optional}}


_TEXT, _NUMBER, _LIST = {"type": "string"}, {"type": "integer"}, {"type": "array", "items": {}}
_MAYBE = {"anyOf": [_TEXT, {"type": "null"}]}
_ERROR = _object({"message": _TEXT, "type": _TEXT, "param": _MAYBE, "code": _MAYBE, "request_id": _TEXT})
_OPENAI_USAGE = _object({"prompt_tokens": _NUMBER, "completion_tokens": _NUMBER, "total_tokens": _NUMBER})
_NAMED_USAGE = _object({"input_tokens": _NUMBER, "output_tokens": _NUMBER})

#: What is answered with 200, by path; others answer any JSON object.
_ANSWERS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": _object(
        {"id": _TEXT, "object": _TEXT, "created": _NUMBER, "model": _TEXT, "choices": _LIST, "usage": _OPENAI_USAGE}
    ),
    "/v1/completions": _object(
        {"id": _TEXT, "object": _TEXT, "created": _NUMBER, "model": _TEXT, "choices": _LIST, "usage": _OPENAI_USAGE}
    ),
    "/v1/responses": _object(
        {"id": _TEXT, "object": _TEXT, "status": _TEXT, "model": _TEXT, "output": _LIST, "usage": _NAMED_USAGE}
    ),
    "/v1/messages": _object(
        {"id": _TEXT, "type": _TEXT, "role": _TEXT, "model": _TEXT, "content": _LIST, "usage": _NAMED_USAGE}
    ),
    "/v1/embeddings": _object(
        {
            "object": _TEXT,
            "data": _LIST,
            "model": _TEXT,
            "usage": _object({"prompt_tokens": _NUMBER, "total_tokens": _NUMBER}),
        }
    ),
    "/v1/messages/count_tokens": _object({"input_tokens": _NUMBER}),
    "/tokenize": _object({"count": _NUMBER, "tokens": {"type": "array", "items": _NUMBER}}),
    "/detokenize": _object({"prompt": _TEXT}),
    "/v1/models": _object({"object": _TEXT, "data": _LIST}),
    "/v1/models/{name}": _object({"id": _TEXT, "object": _TEXT, "created": _NUMBER, "owned_by": _TEXT}),
    "/busy_threshold": {"type": "object"},
    "/debug/requests": _object({"num_running": _NUMBER, "requests": _LIST, "errors": _LIST}),
    "/debug/route": _object({"model": _TEXT, "router_mode": _TEXT, "chosen": _LIST, "workers": _LIST}),
    "/health": _object({"status": _TEXT, "version": _TEXT, "models": _LIST, "endpoints": _LIST, "instances": _LIST}),
    "/live": _object({"status": _TEXT}),
}
_ERRORS = {
    "400": "The request is wrong: `param` names the field.",
    "404": "There is no such model: the message names those there are.",
    "408": "The client doesn't send its body, or doesn't read its answer.",
    "412": "No worker serves the model card that the request was prepared with.",
    "413": "The body is too large.",
    "499": "The request was cancelled.",
    "500": "Something broke; the log has the cause under `request_id`.",
    "503": "No worker, or none with room: `Retry-After` says when to come back. Or the status of --overload-status.",
    "504": "The request's time is over, or its worker is stuck.",
}


def describe(app: FastAPI, bodies: Mapping[str, type[BaseModel]], streams: Set[str]) -> dict[str, Any]:
    """The document.

    Args:
        bodies: what POST takes, by path.
        streams: paths that answer with an event stream when they are asked to.
    """
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, schemas = models_json_schema([(body, "validation") for body in bodies.values()], ref_template=_TEMPLATE)
    named_error = _object({"type": _TEXT, "error": _object({"type": _TEXT, "message": _TEXT}), "request_id": _TEXT})
    document["components"] = {
        "schemas": {**schemas["$defs"], "Error": _object({"error": _ERROR}), "MessagesError": named_error}
    }
    for path, methods in document["paths"].items():
        error = "MessagesError" if path.startswith("/v1/messages") else "Error"
        for method, about in methods.items():
            if method == "post" and path in bodies:
                content = {"application/json": {"schema": _ref(bodies[path].__name__)}}
                about["requestBody"] = {"required": True, "content": content}
            about["responses"] = _responses(path, error, is_stream=path in streams)
    return document


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _TEMPLATE.format(model=name)}


def _responses(path: str, error: str, *, is_stream: bool) -> dict[str, Any]:
    if path == "/metrics":
        return {"200": {"description": "Metrics.", "content": {"text/plain": {"schema": _TEXT}}}}
    content: dict[str, Any] = {"application/json": {"schema": _ANSWERS[path]}}
    if is_stream:
        content["text/event-stream"] = {"schema": _object({"data": _TEXT}, event=_TEXT)}  # each event
    responses = {"200": {"description": "The answer.", "content": content}}
    if path in ("/health", "/live"):
        return {**responses, "503": {**responses["200"], "description": "Nothing can be served now."}}
    told = {"application/json": {"schema": _ref(error)}}
    return {**responses, **{code: {"description": text, "content": told} for code, text in _ERRORS.items()}}
