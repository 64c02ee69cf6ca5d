"""Tools that a request offers, and how its answer is read; checked before the model is asked, and afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dynamo_frontend.catalog import Model
from dynamo_frontend.parsers.base import Parser
from dynamo_frontend.parsers.families import Family
from dynamo_frontend.parsers.forced import Forced, schema_of
from dynamo_frontend.parsers.tools import Tools
from dynamo_frontend.schemas import Calling, json_of
from dynamo_grpc import InvalidRequestError, UnsupportedError
from dynamo_grpc.errors import HandlerOutputError
from dynamo_grpc.messages import to_struct
from dynamo_grpc.v1 import inference_pb2, model_card_pb2


@dataclass(frozen=True, slots=True)
class Offer:
    """The tools that a model may call.

    Attributes:
        tools: as the client told them.
        must_call: one must be called.
        is_named: the client named the one.
        is_parallel: several may be called.
    """

    tools: Sequence[dict[str, Any]] = ()
    must_call: bool = False
    is_named: bool = False
    is_parallel: bool = True
    functions: Tools = field(default_factory=lambda: Tools({}))

    def check(self, model: Model) -> None:
        """Refuse tools that the model can't be told of, or whose calls nobody can read.

        Raises:
            UnsupportedError: says what is missing.
        """
        if not self.tools:
            return
        card, preparation = model.card, model.preparation
        if card.model_input == model_card_pb2.MODEL_INPUT_TEXT:
            if "tools" not in card.capabilities:
                text = f"model {card.name!r} does not support tools: its worker does not declare the capability 'tools'"
                raise UnsupportedError(text, param="tools")
            return
        assert preparation is not None
        templates = [preparation.template, *preparation.named.values()]
        if not any(template and "tools" in template.variables for template in templates):
            raise UnsupportedError(f"the chat template of model {card.name!r} knows no tools", param="tools")
        if preparation.family.tools is None:
            text = f"nobody knows how model {card.name!r} writes calls: start its worker with --tool-call-parser"
            raise UnsupportedError(text, param="tools")

    def put_into(self, message: inference_pb2.PreprocessedRequest) -> None:
        """Tell a worker that takes messages."""
        if not self.tools:
            return
        choice: Any = "required" if self.must_call else "auto"
        if self.is_named:
            choice = {"type": "function", "function": {"name": self.functions.names[0]}}
        told = {"tools": list(self.tools), "tool_choice": choice, "parallel_tool_calls": self.is_parallel}
        message.tools.CopyFrom(to_struct(told))

    def constrain(self, message: inference_pb2.PreprocessedRequest, model: Model) -> bool:
        """Hold a worker that can be held to calling, if a call is required; whether it is."""
        takes_tokens = model.card.model_input != model_card_pb2.MODEL_INPUT_TEXT
        if not (self.must_call and takes_tokens and "guided_decoding" in model.card.capabilities):
            return False
        if message.HasField("guided_decoding"):
            text = "tool_choice requires a call, and another constraint something else: give one of them"
            raise InvalidRequestError(text, param="tool_choice")
        schema = schema_of(self.functions, one=self.is_named, several=self.is_parallel)
        message.guided_decoding.json_schema = json_of(schema, "tools")
        return True


def offer_of(request: Calling) -> Offer:
    """The tools that a request offers.

    Raises:
        InvalidRequestError: a name is there twice, or tool_choice names none of them.
    """
    tools = [tool.model_dump(exclude_unset=True) for tool in request.tools or ()]
    functions: dict[str, Mapping[str, Any]] = {}
    for number, tool in enumerate(request.tools or ()):
        if tool.function.name in functions:
            text = f"the tool {tool.function.name!r} is there twice"
            raise InvalidRequestError(text, param=f"tools.{number}.function.name")
        functions[tool.function.name] = tool.function.parameters or {}
    choice = request.tool_choice
    if choice not in (None, "none", "auto") and not tools:
        raise InvalidRequestError("tool_choice asks for a call, and there are no tools", param="tool_choice")
    if choice == "none" or not tools:
        return Offer()
    json_of(tools, "tools")
    is_named = choice is not None and not isinstance(choice, str)
    if is_named:
        name = choice.function.name  # type: ignore[union-attr]
        if name not in functions:
            text = f"tool_choice names {name!r}: the tools are {', '.join(functions)}"
            raise InvalidRequestError(text, param="tool_choice")
        tools = [tool for tool in tools if tool["function"]["name"] == name]
        functions = {name: functions[name]}
    must_call = is_named or choice == "required"
    return Offer(tools, must_call, is_named, request.parallel_tool_calls is not False, Tools(functions))


@dataclass(frozen=True, slots=True)
class Reading:
    """How an answer is read.

    Attributes:
        is_forced: the worker is held to a call.
        is_thinking: the prompt has begun the reasoning.
    """

    family: Family
    offer: Offer
    is_forced: bool = False
    is_thinking: bool = False

    def parser(self) -> Parser:
        """What reads one choice."""
        kind = Forced if self.is_forced else self.family.kind(has_tools=bool(self.offer.tools))
        return kind(self.offer.functions, self.family.thinking, is_thinking=self.is_thinking)

    @property
    def finish(self) -> str:
        """Why a choice with calls ended; OpenAI's API says stop where the client named the call."""
        return "stop" if self.offer.is_named else "tool_calls"

    def check(self, names: Sequence[str]) -> None:
        """Refuse an answer without a call that was required.

        Raises:
            HandlerOutputError: says which.
        """
        if self.offer.must_call and not any(name in self.offer.functions for name in names):
            wanted = f"{self.offer.functions.names[0]!r}" if self.offer.is_named else "a tool"
            called = f"called {', '.join(names)}" if names else "answered with text"
            raise HandlerOutputError(f"tool_choice requires a call of {wanted}, and the model {called}")


def reading_of(model: Model, offer: Offer, *, is_forced: bool = False, is_thinking: bool = False) -> Reading | None:
    """How the answer to a prompt is read; None where there is nothing to read but text."""
    assert model.preparation is not None
    family = model.preparation.family
    if not (offer.tools or family.thinks):
        return None
    return Reading(family, offer, is_forced, is_thinking)
