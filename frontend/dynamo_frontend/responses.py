"""OpenAI's Responses API: its body, as the chat that it asks for. Nothing is stored."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from dynamo_frontend.schemas import (
    Asked,
    Body,
    ChatRequest,
    Options,
    check_refused,
    content_of,
    json_of,
    string_of,
    text_of,
    text_of_part,
)
from dynamo_grpc import InvalidRequestError, UnsupportedError

_LOGPROBS = "message.output_text.logprobs"
#: What `include` may ask for; what is encrypted is nothing, as nothing is kept.
_INCLUDED = (_LOGPROBS, "reasoning.encrypted_content")
_TEXTS = ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text")
#: Items of one input.
_MAX_ITEMS = 4096


class InputItem(Body):
    """One item of the input: a turn, a call or what a tool answered."""

    model_config = ConfigDict(extra="allow")
    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] = "user"
    content: str | list[dict[str, Any]] | None = None


class TextOptions(Options):
    """How the text is to be."""

    format: dict[str, Any] = Field(default_factory=lambda: {"type": "text"})


class FunctionTool(Body):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow")
    type: Literal["function"]
    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(Body):
    """Which function."""

    type: Literal["function"]
    name: str


class ReasoningOptions(Options):
    """How much is thought before the answer."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


class ResponsesRequest(Asked):
    """Body of /v1/responses."""

    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=2**32)
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[str] | None = None
    text: TextOptions | None = None
    tools: list[FunctionTool] | None = Field(None, max_length=1024)
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    store: bool | None = None

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "previous_response_id": (),
        "conversation": (),
        "prompt": (),
        "background": (False,),
        "truncation": ("disabled",),
        "max_tool_calls": (),
        "service_tier": ("auto", "default"),
    }

    def to_chat(self) -> ChatRequest:
        """The chat that it asks for.

        Raises:
            UnsupportedError: a kind of input that isn't text.
            InvalidRequestError: a value is wrong; names it.
        """
        check_refused(self, self.refused)
        turns = [{"role": "developer", "content": self.instructions}] if self.instructions else []
        items = [InputItem(content=self.input)] if isinstance(self.input, str) else self.input
        if not items:
            raise InvalidRequestError("the input is empty", param="input")
        if len(items) > _MAX_ITEMS:
            raise InvalidRequestError(f"the input has {len(items)} items: at most {_MAX_ITEMS}", param="input")
        turns += _turns(items)
        wanted = (self.text or TextOptions()).format
        json_of(wanted, "text.format")  # it is told again with the answer
        if wanted.get("type") == "json_schema":
            if "schema" not in wanted:
                raise InvalidRequestError("schema is missing", param="text.format.schema")
            wanted = {"type": "json_schema", "json_schema": wanted}
        if unknown := [one for one in self.include or () if one not in _INCLUDED]:
            raise UnsupportedError(f"include: {unknown[0][:64]!r} is not supported here", param="include")
        has_logprobs = _LOGPROBS in (self.include or ())
        if self.top_logprobs and not has_logprobs:
            raise InvalidRequestError(f"top_logprobs goes with include: [{_LOGPROBS!r}]", param="top_logprobs")
        choice: Any = self.tool_choice
        if isinstance(choice, FunctionChoice):
            choice = {"type": "function", "function": {"name": choice.name}}
        return ChatRequest.of(
            model=self.model, messages=turns, stream=self.stream, response_format=wanted,
            max_completion_tokens=self.max_output_tokens, temperature=self.temperature, top_p=self.top_p,
            logprobs=has_logprobs or None, top_logprobs=self.top_logprobs if has_logprobs else None,
            tools=[_chat_tool(tool) for tool in self.tools] if self.tools else None, tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls,
            reasoning_effort=self.reasoning.effort if self.reasoning else None,
            user=self.user, metadata=self.metadata,
        )  # fmt: skip


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_unset=True)}


def _turns(items: list[InputItem]) -> list[dict[str, Any]]:
    """The turns of a chat; what the assistant thought, said and called is one."""
    turns: list[dict[str, Any]] = []
    for number, item in enumerate(items):
        where, extra = f"input.{number}", item.model_extra or {}
        if item.type == "message":
            turn = {"role": item.role, "content": content_of(item.content or "", f"{where}.content", _part)}
            if item.role == "assistant" and turns and turns[-1]["role"] == "assistant" and "content" not in turns[-1]:
                turns[-1] |= turn
            else:
                turns.append(turn)
        elif item.type == "reasoning":
            key = "content" if item.content else "summary"
            thoughts = item.content or extra.get("summary") or ""
            _assistant(turns)["reasoning_content"] = text_of(thoughts, f"{where}.{key}", _TEXTS)
        elif item.type == "function_call":
            name, arguments, call_id = (string_of(extra, key, where) for key in ("name", "arguments", "call_id"))
            call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            _assistant(turns).setdefault("tool_calls", []).append(call)
        elif item.type == "function_call_output":
            output = content_of(extra.get("output", ""), f"{where}.output", _part)
            turns.append({"role": "tool", "tool_call_id": string_of(extra, "call_id", where), "content": output})
        else:
            raise UnsupportedError(f"input of type {item.type!r} is not supported here", param=where)
    return turns


def _part(part: Any, where: str) -> dict[str, Any]:
    """A part of content as a chat's."""
    if isinstance(part, dict) and part.get("type") == "input_image":
        told = {"url": string_of(part, "image_url", where), "detail": part.get("detail") or "auto"}
        return {"type": "image_url", "image_url": told, "where": where}
    return {"type": "text", "text": text_of_part(part, where, _TEXTS), "where": where}


def _assistant(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's turn that goes on, or a new one."""
    if not turns or turns[-1]["role"] != "assistant":
        turns.append({"role": "assistant"})
    return turns[-1]
