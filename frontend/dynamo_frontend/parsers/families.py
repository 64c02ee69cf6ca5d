"""Which parser reads a model: by the names that its card gives, or by the marks that its chat template writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dynamo_frontend.parsers.base import Parser, Plain, Thinking
from dynamo_frontend.parsers.deepseek import DeepSeek
from dynamo_frontend.parsers.deepseek_v3_2 import DeepSeekV32
from dynamo_frontend.parsers.harmony import Harmony
from dynamo_frontend.parsers.hermes import Hermes
from dynamo_frontend.parsers.llama3_json import Llama3Json
from dynamo_frontend.parsers.mistral import Mistral
from dynamo_frontend.parsers.pythonic import Pythonic
from dynamo_frontend.parsers.qwen3_coder import Qwen3Coder
from dynamo_grpc import ConfigurationError
from dynamo_grpc.names import nearest

_TAGS = Thinking("<think>", "</think>")

#: `tool_call_parser` of a model card.
TOOL_PARSERS: Mapping[str, type[Parser]] = {
    "hermes": Hermes,
    "qwen25": Hermes,
    "qwen3": Hermes,
    "qwen3_coder": Qwen3Coder,
    "llama3_json": Llama3Json,
    "mistral": Mistral,
    "pythonic": Pythonic,
    "deepseek_v3": DeepSeek,
    "deepseek_v3_1": DeepSeek,
    "deepseek_v3_2": DeepSeekV32,
    "harmony": Harmony,
    "none": Plain,
}
#: `reasoning_parser` of a model card. gpt_oss is read by harmony, whatever it calls.
REASONING_PARSERS: Mapping[str, Thinking | None] = {
    "basic": _TAGS,
    "qwen3": _TAGS,
    "deepseek_r1": _TAGS,
    "deepseek_v3": _TAGS,
    "deepseek_v3_1": _TAGS,
    "deepseek_v3_2": _TAGS,
    "mistral": Thinking("[THINK]", "[/THINK]"),
    "kimi": Thinking("◁think▷", "◁/think▷"),
    "granite": Thinking("Here is my thought process:", "Here is my response:"),
    "gpt_oss": None,
    "none": None,
}
#: These models think first, whether anything says so or not.
_ALWAYS_THINKING = frozenset(["deepseek_r1"])
#: What the template of a family writes, the more telling first.
_TOOL_MARKS = (
    ("<|channel|>", "harmony"),
    ("｜DSML｜", "deepseek_v3_2"),
    ("<｜tool▁calls▁begin｜>", "deepseek_v3"),
    ("[TOOL_CALLS]", "mistral"),
    ("<function=", "qwen3_coder"),
    ("<tool_call>", "hermes"),
    ("[func_name1(", "pythonic"),
    ('"parameters": ', "llama3_json"),
)
_REASONING_MARKS = (("<|channel|>", "gpt_oss"), ("</think>", "basic"), ("[/THINK]", "mistral"), ("◁/think▷", "kimi"))


@dataclass(frozen=True, slots=True)
class Family:
    """How the answers of a model are read.

    Attributes:
        tools: reads calls; None where nobody knows how the model calls.
        thinking: how it marks reasoning, if it reasons.
        is_always_thinking: it thinks first, whatever the prompt says.
    """

    tools: type[Parser] | None = None
    thinking: Thinking | None = None
    is_always_thinking: bool = False

    @property
    def thinks(self) -> bool:
        """Whether its answers may have reasoning."""
        return self.thinking is not None or self.tools is Harmony

    def kind(self, *, has_tools: bool) -> type[Parser]:
        """What reads an answer."""
        return self.tools if self.tools is not None and (has_tools or self.tools is Harmony) else Plain

    def is_thinking_after(self, prompt: str) -> bool:
        """Whether an answer to a prompt begins within the reasoning: its end is that."""
        if self.thinking is None:
            return False
        prompt = prompt.rstrip()
        if prompt.endswith(self.thinking.closing):
            return False
        return self.is_always_thinking or prompt.endswith(self.thinking.opening)

    def is_thinking_within(self, text: str) -> bool:
        """Whether an answer that goes on in a text of the assistant goes on thinking."""
        if self.thinking is None:
            return False
        return text.rfind(self.thinking.opening) > text.rfind(self.thinking.closing)


def family_of(tool_parser: str, reasoning_parser: str, template: str) -> Family:
    """The family of a model, by the names in its card; where they are empty, by its template.

    Raises:
        ConfigurationError: there is no such parser; says which there are.
    """
    tool_parser = tool_parser or _marked(template, _TOOL_MARKS)
    reasoning_parser = reasoning_parser or _marked(template, _REASONING_MARKS)
    _check("tool_call_parser", tool_parser, TOOL_PARSERS)
    _check("reasoning_parser", reasoning_parser, REASONING_PARSERS)
    tools = TOOL_PARSERS.get(tool_parser)
    if reasoning_parser == "gpt_oss" and tools is None:
        tools = Harmony
    is_always_thinking = reasoning_parser in _ALWAYS_THINKING
    return Family(tools, REASONING_PARSERS.get(reasoning_parser), is_always_thinking)


def _marked(template: str, marks: tuple[tuple[str, str], ...]) -> str:
    return next((name for mark, name in marks if mark in template), "")


def _check(field: str, name: str, known: Mapping[str, object]) -> None:
    if name and name not in known:
        hint = nearest(name, known)
        raise ConfigurationError(
            f"{field} {name!r} is unknown: there are {', '.join(sorted(known))}"
            + (f" (did you mean {hint!r}?)" if hint else "")
        )
