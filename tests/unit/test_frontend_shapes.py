"""Request schemas and error envelopes."""

import json
import re
from typing import Any

import pytest
from dynamo_frontend import envelope
from dynamo_frontend.app import Frontend
from dynamo_frontend.schemas import ChatRequest, CompletionRequest, check_refused
from dynamo_frontend.settings import FrontendSettings
from pydantic import ValidationError

from dynamo_grpc import (
    ContextLengthError,
    HttpError,
    InvalidRequestError,
    MeshError,
    ModelNotFoundError,
    NoInstancesError,
    OverloadedError,
    UnsupportedError,
)
from dynamo_grpc.status import BY_REASON

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def error_of(schema: Any, body: Any) -> MeshError:
    with pytest.raises((ValidationError, MeshError)) as caught:
        check_refused(schema.model_validate(body), schema.refused)
    told, is_unexpected = envelope.to_mesh_error(caught.value)
    assert not is_unexpected
    return told


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 0}, "n"),
        ({"stop": 5}, "stop"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ],
)
def test_wrong_chat_bodies_name_the_field(change: dict[str, Any], param: str) -> None:
    told = error_of(ChatRequest, {**CHAT, **change})
    assert told.http_status == 400
    assert told.param == param


def test_what_changes_nothing_is_accepted() -> None:
    body = ChatRequest.model_validate(
        {**CHAT, "tools": [], "response_format": {"type": "text"}, "made_up": 1, "tool_choice": "none"}
    )
    check_refused(body, ChatRequest.refused)
    assert body.unknown() == ["made_up"]


def test_wrong_completion_bodies() -> None:
    assert error_of(CompletionRequest, {"model": "m"}).param == "prompt"
    assert error_of(CompletionRequest, {"model": "m", "prompt": "x", "suffix": "y"}).param == "suffix"


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (InvalidRequestError("x", param="p"), 400, "invalid_request_error", None),
        (ContextLengthError("x"), 400, "invalid_request_error", "context_length_exceeded"),
        (UnsupportedError("x"), 400, "invalid_request_error", "unsupported_value"),
        (ModelNotFoundError("x"), 404, "invalid_request_error", "model_not_found"),
        (OverloadedError("x"), 503, "service_unavailable", "overloaded"),
        (NoInstancesError("x", retry_after_s=1.2), 503, "service_unavailable", "no_instances"),
        (HttpError(429, "x"), 429, "rate_limit_error", None),
        (HttpError(418, "x"), 418, "invalid_request_error", None),
    ],
)
def test_the_envelope_is_openais(error: MeshError, status: int, kind: str, code: str | None) -> None:
    body = json.loads(envelope.body(error, "r1"))["error"]
    assert (error.http_status, body["type"], body["code"], body["message"]) == (status, kind, code, "x")
    wait_s = b"2" if error.retry_after_s else b"1" if code == "overloaded" else None
    assert envelope.headers(error) == ([(b"retry-after", wait_s)] if wait_s else [])


def test_our_own_mistakes_are_not_the_clients() -> None:
    told, is_unexpected = envelope.to_mesh_error(ValueError("secret"))
    assert (told.http_status, is_unexpected) == (500, True)
    assert "secret" not in envelope.body(told, "r1").decode()


def test_the_openapi_document_is_whole() -> None:
    document = Frontend(FrontendSettings()).app.openapi()
    text = json.dumps(document)
    known = set(document["components"]["schemas"])
    assert set(re.findall(r'"#/components/schemas/([^"]+)"', text)) <= known
    assert "#/$defs/" not in text
    assert "422" not in document["paths"]["/v1/models/{name}"]["get"]["responses"]
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChatRequest")
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}


#: OpenAI's type and code of each error, by its reason; clients look at both.
TOLD = {
    "CANCELLED": ("invalid_request_error", None),
    "CARD_MISMATCH": ("invalid_request_error", None),
    "CONFIGURATION": ("server_error", "configuration"),
    "CONTEXT_LENGTH_EXCEEDED": ("invalid_request_error", "context_length_exceeded"),
    "DEADLINE_EXCEEDED": ("server_error", "deadline_exceeded"),
    "DRAINING": ("service_unavailable", "draining"),
    "ENDPOINT_NOT_FOUND": ("invalid_request_error", None),
    "ENGINE_SHUTDOWN": ("service_unavailable", "engine_shutdown"),
    "FILE_NOT_FOUND": ("invalid_request_error", None),
    "HANDLER_OUTPUT": ("server_error", "handler_output"),
    "HTTP": ("invalid_request_error", None),
    "INSTANCE_LOST": ("service_unavailable", "instance_lost"),
    "INTERNAL": ("server_error", "internal"),
    "INVALID_NAME": ("invalid_request_error", None),
    "INVALID_REQUEST": ("invalid_request_error", None),
    "MODEL_NOT_FOUND": ("invalid_request_error", "model_not_found"),
    "NOT_READY": ("service_unavailable", "not_ready"),
    "NO_INSTANCES": ("service_unavailable", "no_instances"),
    "OVERLOADED": ("service_unavailable", "overloaded"),
    "REGISTRY": ("service_unavailable", "registry"),
    "RESPONSE_TIMEOUT": ("server_error", "response_timeout"),
    "SLOW_READER": ("invalid_request_error", None),
    "STREAM_INCOMPLETE": ("server_error", "stream_incomplete"),
    "TOO_LARGE": ("invalid_request_error", "request_too_large"),
    "UNSUPPORTED": ("invalid_request_error", "unsupported_value"),
    "WRONG_INSTANCE": ("service_unavailable", "wrong_instance"),
}


def test_what_errors_are_called() -> None:
    assert set(TOLD) == set(BY_REASON)
    for reason, cls in BY_REASON.items():
        error = cls(422, "x") if issubclass(cls, HttpError) else cls("x")  # type: ignore[arg-type,call-arg]
        told = json.loads(envelope.body(error, "id"))["error"]
        assert (told["type"], told["code"]) == TOLD[reason], reason
    full = OverloadedError("x")
    full.http_status = 429
    assert json.loads(envelope.body(full, "id"))["error"]["type"] == "rate_limit_error"
