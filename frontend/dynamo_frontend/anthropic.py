"""Anthropic's Messages API: its body, as the chat that it asks for, and its errors."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import orjson
from pydantic import ConfigDict, Field

from dynamo_frontend.schemas import (
    Asked,
    Body,
    ChatRequest,
    Options,
    check_refused,
    content_of,
    joined,
    json_of,
    string_of,
    text_of,
    text_of_part,
)
from dynamo_grpc import InvalidRequestError, MeshError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class Turn(Body):
    """One turn."""

    model_config = ConfigDict(extra="allow")
    role: Literal["user", "assistant"]
    content: str | list[dict[str, Any]]


class Metadata(Options):
    """What the client says of itself."""

    model_config = ConfigDict(extra="allow")
    user_id: str | None = None


class InputTool(Body):
    """A tool that the model may call."""

    model_config = ConfigDict(extra="allow")
    type: Literal["custom"] = "custom"
    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    input_schema: dict[str, Any]


class ToolChoice(Body):
    """Whether the model must call a tool, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class ThinkingOptions(Body):
    """Whether the model thinks before it answers."""

    model_config = ConfigDict(extra="allow")
    type: Literal["enabled", "disabled", "adaptive"]


class MessagesRequest(Asked):
    """Body of /v1/messages, and of /v1/messages/count_tokens without max_tokens."""

    messages: list[Turn] = Field(min_length=1, max_length=4096)
    system: str | list[dict[str, Any]] | None = None
    max_tokens: int = Field(ge=1, lt=2**32)
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    tools: list[InputTool] | None = Field(None, max_length=1024)
    tool_choice: ToolChoice | None = None
    thinking: ThinkingOptions | None = None
    metadata: Metadata | None = None

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "service_tier": ("auto", "standard_only"),
        "mcp_servers": ([],),
        "container": (),
    }

    def to_chat(self) -> ChatRequest:
        """The chat that it asks for. One that ends with the assistant's turn goes on in it.

        Raises:
            UnsupportedError: content that isn't text.
            InvalidRequestError: a value is wrong; names it.
        """
        check_refused(self, self.refused)
        turns = [{"role": "system", "content": text_of(self.system, "system")}] if self.system else []
        for number, turn in enumerate(self.messages):
            turns += _turns(turn, f"messages.{number}.content")
        goes_on = turns[-1]["role"] == "assistant" and "tool_calls" not in turns[-1]
        is_thinking = None if self.thinking is None else self.thinking.type != "disabled"
        # templates of the families that can think or not know it by one of these names
        variables = None if is_thinking is None else {"enable_thinking": is_thinking, "thinking": is_thinking}
        choice = self.tool_choice
        return ChatRequest.of(
            model=self.model, messages=turns, stream=self.stream, stop=self.stop_sequences or None,
            max_completion_tokens=self.max_tokens, temperature=self.temperature, top_p=self.top_p,
            top_k=self.top_k, user=(self.metadata or Metadata()).user_id,
            tools=[_chat_tool(tool) for tool in self.tools] if self.tools else None,
            tool_choice=choice and _chat_choice(choice),
            parallel_tool_calls=False if choice and choice.disable_parallel_tool_use else None,
            chat_template_kwargs=variables, continue_final_message=goes_on or None,
        )  # fmt: skip


def _chat_tool(tool: InputTool) -> dict[str, Any]:
    function = {"name": tool.name, "parameters": tool.input_schema}
    return {"type": "function", "function": function | ({"description": tool.description} if tool.description else {})}


def _chat_choice(choice: ToolChoice) -> Any:
    if choice.type != "tool":
        return "required" if choice.type == "any" else choice.type
    if not choice.name:
        raise InvalidRequestError("name is missing: which tool?", param="tool_choice.name")
    return {"type": "function", "function": {"name": choice.name}}


def _turns(turn: Turn, where: str) -> list[dict[str, Any]]:
    """The turns of a chat that one is: what tools answered stands before what the user says then."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    turns: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    said: dict[str, Any] = {"role": turn.role}
    for number, block in enumerate(turn.content):
        place = f"{where}.{number}"
        match block.get("type"):
            case "tool_result":
                content = content_of(block.get("content") or "", f"{place}.content", _part)
                turns.append(
                    {"role": "tool", "tool_call_id": string_of(block, "tool_use_id", place), "content": content}
                )
            case "tool_use" if turn.role == "assistant":
                function = {
                    "name": string_of(block, "name", place),
                    "arguments": json_of(block.get("input") or {}, place),
                }
                call = {"id": string_of(block, "id", place), "type": "function", "function": function}
                said.setdefault("tool_calls", []).append(call)
            case "thinking":
                said["reasoning_content"] = said.get("reasoning_content", "") + string_of(block, "thinking", place)
            case "redacted_thinking":
                pass
            case _:
                shown.append(_part(block, place))
    if shown or len(said) > 1 or not turns:
        turns.append(said | ({"content": joined(shown)} if shown or len(said) == 1 else {}))
    return turns


def _part(block: Any, where: str) -> dict[str, Any]:
    """A block that is shown, as a part of a chat's message."""
    if isinstance(block, dict) and block.get("type") == "image":
        return {"type": "image_url", "image_url": {"url": _image(block, where)}, "where": where}
    return {"type": "text", "text": text_of_part(block, where), "where": where}


def _image(block: dict[str, Any], where: str) -> str:
    """A picture as a URL."""
    source = block.get("source")
    if not isinstance(source, dict):
        raise InvalidRequestError("the picture has no source", param=f"{where}.source")
    if source.get("type") == "url":
        return string_of(source, "url", f"{where}.source")
    kind, data = (string_of(source, key, f"{where}.source") for key in ("media_type", "data"))
    return f"data:{kind};base64,{data}"


class CountRequest(MessagesRequest):
    """Body of /v1/messages/count_tokens."""

    max_tokens: int = Field(1, ge=1, lt=2**32)


def error_body(error: MeshError, request_id: str) -> bytes:
    """An error as Anthropic's clients expect it."""
    default = "api_error" if error.http_status >= 500 else "invalid_request_error"
    where = f"{error.param}: " if error.param and error.param not in error.message else ""
    told = {"type": _TYPES.get(error.http_status, default), "message": f"{where}{error.message}"}
    return orjson.dumps({"type": "error", "error": told, "request_id": request_id})
