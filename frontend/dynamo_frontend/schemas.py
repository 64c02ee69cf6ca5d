"""OpenAI's request bodies: types only. Ranges are checked where the worker checks them (`dynamo_grpc.validation`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field, model_validator

from dynamo_grpc import InvalidRequestError, UnsupportedError


class Body(BaseModel):
    """What a client sends: types are what they are said to be, and what is null is left out."""

    model_config = ConfigDict(strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if isinstance(values, dict) and None in values.values():
            return {name: value for name, value in values.items() if value is not None}
        return values

    def unknown(self) -> list[str]:
        """Fields that nobody knows, for the warning."""
        found = list(self.model_extra or ())
        for name in self.model_fields_set:
            if isinstance(value := getattr(self, name, None), Options):
                found += [f"{name}.{inner}" for inner in value.unknown()]
        return sorted(found)


class Options(Body):
    """Options within a body; those that nobody knows are told."""

    model_config = ConfigDict(extra="allow")


class StreamOptions(Options):
    """What a stream tells besides its text."""

    include_usage: bool = False
    continuous_usage_stats: bool = Field(False, description="Every event has the usage so far.")
    merge_events: bool = Field(
        False, description="Send what is there as one event: fewer, larger events in place of one for each token."
    )


class TextPart(Body):
    """A part of a message."""

    model_config = ConfigDict(extra="allow")
    type: str = Field(
        description="text, image_url, video_url, audio_url or input_audio: what it is stands in the field of that name."
    )
    text: str | None = None


Role = Literal["system", "developer", "user", "assistant", "tool"]


class Message(Body):
    """One turn of a chat; templates may know more fields than these."""

    model_config = ConfigDict(extra="allow")
    role: Role
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class JsonSchema(Options):
    """What `response_format` of type json_schema holds."""

    name: str = ""
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Options):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Asked(Body):
    """What the bodies of all endpoints that generate have in common."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(max_length=256)
    stream: bool = False

    #: Options that are refused for now, unless they ask for what happens anyway.
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {}

    def unknown(self) -> list[str]:
        return [name for name in super().unknown() if name not in self.refused]

    def forget(self) -> None:
        """Let go of the conversation, once it is prepared: pictures are large, and an answer takes its time."""
        for name in ("messages", "input"):
            if isinstance(value := getattr(self, name, None), list):
                value.clear()


def text_of(content: str | list[dict[str, Any]], where: str, types: Collection[str] = ("text",)) -> str:
    """The text of a message's content, whole or in parts.

    Raises:
        UnsupportedError: a part is of no type of text; names its place.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequestError("content is a string or a list of parts", param=where)
    return "".join(text_of_part(part, f"{where}.{number}", types) for number, part in enumerate(content))


def text_of_part(part: Any, where: str, types: Collection[str] = ("text",)) -> str:
    """The text of one part.

    Raises:
        UnsupportedError: it is of no type of text; names its place.
    """
    if not isinstance(part, dict):
        raise InvalidRequestError("a part of content is an object", param=where)
    text = part.get("text")
    if part.get("type") not in types or not isinstance(text, str):
        raise UnsupportedError(f"content of type {part.get('type')!r} is not supported here", param=where)
    return text


def content_of(content: Any, where: str, part_of: Callable[[Any, str], dict[str, Any]]) -> Any:
    """Content of another API as chats have it.

    Args:
        part_of: makes a chat's part of one of its parts; by its place.
    """
    if not isinstance(content, list):
        return text_of(content, where)
    return joined([part_of(part, f"{where}.{number}") for number, part in enumerate(content)])


def joined(parts: list[dict[str, Any]]) -> Any:
    """A chat's parts where some are no text, else their text."""
    return parts if any(part["type"] != "text" for part in parts) else "".join(part["text"] for part in parts)


def string_of(values: Mapping[str, Any], key: str, where: str) -> str:
    """A string that must be there.

    Raises:
        InvalidRequestError: it isn't, or is something else; names its place.
    """
    value = values.get(key)
    if not isinstance(value, str):
        raise InvalidRequestError(f"{key} must be a string", param=f"{where}.{key}")
    return value


def json_of(value: Any, param: str) -> str:
    """A client's value as JSON.

    Raises:
        InvalidRequestError: it is nested too deeply.
    """
    try:
        return orjson.dumps(value).decode()
    except TypeError as error:  # of what JSON gave, nothing else can be wrong
        raise InvalidRequestError(f"{param} is nested too deeply: {error}", param=param) from None


def check_refused(asked: BaseModel, refused: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse options that would have no effect.

    Raises:
        UnsupportedError: names the option.
    """
    extra = asked.model_extra
    if not extra:
        return
    for name, harmless in refused.items():
        value = extra.get(name)
        if value is not None and value not in harmless:
            raise UnsupportedError(f"{name} is not supported here", param=name)


class Sampling(Asked):
    """What chat and completions have in common; the second half are extensions that most engines know."""

    _places: dict[str, str] = {}

    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, lt=2**32)
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = Field(None, ge=1, le=128)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[Annotated[int, Field(strict=False)], float] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    response_format: ResponseFormat | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = Field(None, ge=0, lt=2**32)
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool = True
    guided_json: str | dict[str, Any] | None = Field(None, description="A JSON schema that the answer follows.")
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(None, min_length=1)
    guided_grammar: str | None = None
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)

    @property
    def places(self) -> Mapping[str, str]:
        """Where parts of messages stand in the client's request, if that is another API's."""
        return self._places


class Function(Body):
    """A function that a model may call."""

    model_config = ConfigDict(extra="allow")
    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema.")


class Tool(Body):
    """A tool that a model may call."""

    model_config = ConfigDict(extra="allow")
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """Which function."""

    name: str


class ToolName(Body):
    """Which tool."""

    type: Literal["function"]
    function: FunctionName


class Calling(Body):
    """What a model may call."""

    tools: list[Tool] | None = Field(None, max_length=1024)
    tool_choice: Literal["none", "auto", "required"] | ToolName | None = None
    parallel_tool_calls: bool | None = None


class Templated(Calling):
    """How a chat becomes a prompt."""

    chat_template: str | None = Field(None, description="Name of another template of the model than its default.")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    add_generation_prompt: bool = Field(True, description="End the prompt with what begins the assistant's turn.")
    continue_final_message: bool = Field(False, description="The answer goes on in the last message.")
    documents: list[dict[str, Any]] | None = Field(None, description="For models that answer by them.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables that the model's template knows.")

    @model_validator(mode="after")
    def _one_ending(self) -> Self:
        if (
            self.continue_final_message
            and self.add_generation_prompt
            and "add_generation_prompt" in self.model_fields_set
        ):
            raise ValueError("give add_generation_prompt or continue_final_message, not both")
        return self


class ChatRequest(Sampling, Templated):
    """Body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**32)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "functions": ([],),
        "function_call": ("none", "auto"),
        "audio": (),
        "modalities": (["text"],),
        "prediction": (),
        "web_search_options": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
    }

    @classmethod
    def of(cls, **values: Any) -> ChatRequest:
        """One from another API's request; None is unset. A part's `where`, its place there, goes into `places`."""
        places = {}
        for number, turn in enumerate(values["messages"]):
            content = turn.get("content")
            for index, part in enumerate(content if isinstance(content, list) else ()):
                places[f"messages.{number}.content.{index}"] = part.pop("where")
        made = cls.model_validate({name: value for name, value in values.items() if value is not None})
        made._places = places
        return made


class CompletionRequest(Sampling):
    """Body of /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(None, ge=0, lt=2**32)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    best_of: int | None = Field(None, ge=1, le=128)

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "suffix": ("",),
        "messages": (),
        "tools": ([],),
        "tool_choice": ("none",),
        "reasoning_effort": (),
        "max_completion_tokens": (),
        "top_logprobs": (),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "service_tier": ("auto", "default"),
        "store": (False,),
    }


class TokenizeRequest(Templated):
    """Body of /tokenize: a prompt, or a chat as the model's template writes it."""

    model: str
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool = True


class BusyRequest(BaseModel):
    """Body of POST /busy_threshold: what isn't given stays, null takes a threshold away."""

    model_config = ConfigDict(extra="forbid")

    model: str
    active_decode_blocks_threshold: float | None = Field(None, ge=0, le=1)
    active_prefill_tokens_threshold: int | None = Field(None, ge=0)
    active_requests_threshold: int | None = Field(None, ge=0)


class RouteRequest(Body):
    """Body of POST /debug/route: a request, or its model alone."""

    model_config = ConfigDict(extra="allow")

    model: str


class DetokenizeRequest(Body):
    """Body of /detokenize."""

    model: str
    tokens: list[int]
