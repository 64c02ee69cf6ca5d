"""Chat templates: the model's own Jinja, sandboxed and bounded, rendered as transformers renders it.

Templates come with models, from workers. One that loops for ever or multiplies strings would hold up everybody's
tokens, so loops look at the clock and results have a size.
"""

from __future__ import annotations

import datetime as dt
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from dynamo_grpc import ConfigurationError, InvalidRequestError

#: A rendering may take so long, and give so much.
MAX_S = 2.0
MAX_CHARS = 16 * 1024 * 1024
#: Loops look at the clock after so many turns.
_TURNS = 1_000
_COUNTED, _JOINED = "counted for the limits", "joined within the limits"

Turn = Mapping[str, Any]


def _raise(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # plain JSON, as models were trained on: Jinja's own filter escapes for HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says, for training: here it is text like any other."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Bounded(NodeTransformer):
    """Puts the limits into a template: around what loops go through, and in place of `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        node.iter = nodes.Filter(node.iter, _COUNTED, [], [], None, None, lineno=node.lineno)
        return self.generic_visit(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return self.generic_visit(nodes.Filter(parts, _JOINED, [], [], None, None, lineno=node.lineno))


def _join(parts: Sequence[Any]) -> str:
    texts = [str(part) for part in parts]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


class _Environment(ImmutableSandboxedEnvironment):
    """A sandbox whose renderings have limits.

    Attributes:
        ends_at: when the one that runs now must have ended; one runs at a time.
    """

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        self.ends_at = 0.0
        self.filters["tojson"] = _to_json
        self.filters[_COUNTED] = self._counted
        self.filters[_JOINED] = _join
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = lambda fmt: dt.datetime.now().astimezone().strftime(fmt)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Bounded().visit(super()._parse(source, name, filename))
        return tree

    def _counted(self, items: Iterable[Any]) -> Iterable[Any]:
        """What a loop goes through; `len` stays what it was."""
        self.check_time()
        if isinstance(items, Sequence) and len(items) <= _TURNS:
            return items
        return self._count(items)

    def _count(self, items: Iterable[Any]) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number % _TURNS == 0:
                self.check_time()
            yield item

    def check_time(self) -> None:
        """Raise if the rendering takes too long."""
        if time.monotonic() > self.ends_at:
            raise SecurityError(f"it takes longer than {MAX_S:g} s")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(side) if isinstance(side, (str, list, tuple)) else side for side in (left, right)]
        numbers = all(isinstance(size, (int, float)) for size in sizes)
        if operator == "*" and numbers and isinstance(left, (str, list)) != isinstance(right, (str, list)):
            _check_size(sizes[0] * sizes[1])
        elif operator == "+" and (isinstance(left, str) and isinstance(right, Arguments)):
            right = str(right)  # templates of some models put the text in
        elif operator == "+" and isinstance(left, (str, list)) and isinstance(right, (str, list)):
            _check_size(sum(sizes))
        elif operator == "**" and numbers:
            _check_size(abs(sizes[1]) * abs(sizes[0]).bit_length() if isinstance(left, int) else 0)
        return super().call_binop(context, operator, left, right)


def _check_size(size: float) -> None:
    if size > MAX_CHARS:
        raise SecurityError(f"it makes more than {MAX_CHARS} characters")


class Arguments(dict[str, Any]):
    """Arguments of a call, as templates know them: a mapping, and where text is wanted that of the client."""

    def __init__(self, text: str, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self._text = text

    def __str__(self) -> str:
        return self._text


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja.
        variables: what every rendering gets (bos_token, eos_token …).

    Attributes:
        takes_parts: it knows what to do with content in several parts; else it is given their text.
        variables: names of those that it looks at.

    Raises:
        ConfigurationError: it is no valid template.
    """

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        self._environment = _Environment()
        self._variables = dict(variables)
        try:
            tree = self._environment.parse(source)
            self.takes_parts = _looks_at_parts(tree)
            self.variables = frozenset(meta.find_undeclared_variables(tree))
            self._template = self._environment.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigurationError(f"the chat template is wrong in line {error.lineno}: {error.message}") from error

    def render(
        self,
        messages: Sequence[Turn],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Turn] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a chat.

        Args:
            add_generation_prompt: end with what begins the assistant's turn.
            continue_final_message: end in the last message, without what closes it: the answer goes on there.
            tools: that the model may call, in OpenAI's shape.
            documents: for models that answer by them.
            variables: others that the template knows; they win over the model's own.

        Raises:
            InvalidRequestError: the template doesn't take these messages; says why.
        """
        messages = [_with_arguments(message) for message in messages]
        if not self.takes_parts:
            messages = [_with_text(message) for message in messages]
        if continue_final_message:
            messages = [*messages[:-1], _marked(messages[-1])]
        values = {
            **self._variables,
            "tools": tools,
            "documents": documents,
            **(variables or {}),
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._render(values)
        except jinja2.TemplateError as error:
            raise InvalidRequestError(
                f"the model's chat template refuses the messages: {error}", param="messages"
            ) from error
        except (TypeError, KeyError, AttributeError, ValueError, RecursionError, OverflowError) as error:
            raise InvalidRequestError(
                f"the model's chat template can't render the messages: {error}", param="messages"
            ) from error
        return _up_to_mark(text) if continue_final_message else text

    def _render(self, values: Mapping[str, Any]) -> str:
        self._environment.ends_at = time.monotonic() + MAX_S
        pieces, num_chars = [], 0
        for number, piece in enumerate(self._template.generate(values)):
            pieces.append(piece)
            num_chars += len(piece)
            _check_size(num_chars)
            if number % _TURNS == 0:
                self._environment.check_time()
        return "".join(pieces)


def _looks_at_parts(tree: nodes.Template) -> bool:
    """Whether a template asks what content is, or goes through its parts."""
    tests = (
        test.node for test in tree.find_all(nodes.Test) if test.name in ("string", "iterable", "sequence", "mapping")
    )
    loops = (loop.iter for loop in tree.find_all(nodes.For))
    return any(_names_content(node) for node in itertools.chain(tests, loops))


def _names_content(node: nodes.Node) -> bool:
    named = [node, *node.find_all((nodes.Getattr, nodes.Getitem, nodes.Name))]
    return any(
        (isinstance(one, nodes.Getattr) and one.attr == "content")
        or (isinstance(one, nodes.Name) and "content" in one.name)
        or (isinstance(one, nodes.Getitem) and isinstance(one.arg, nodes.Const) and one.arg.value == "content")
        for one in named
    )


def _with_arguments(message: Turn) -> Turn:
    """A message whose calls have their arguments as mappings, where they are: templates were written for these."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_with_mapping(call) for call in calls]}


def _with_mapping(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    text = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(text, str):
        return call
    try:
        values = json.loads(text)
        json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # also of half characters, which no prompt can have
        return call
    if not isinstance(values, dict):
        return call
    return {**call, "function": {**function, "arguments": Arguments(text, values)}}


def _with_text(message: Turn) -> Turn:
    """A message whose content is one text."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content if part.get("type") == "text")}


#: Stands at the end of the message that an answer goes on in, while it is rendered.
_MARK = "<the answer goes on here> "


def _marked(message: Turn) -> Turn:
    """A message with the mark at the end of its text.

    Raises:
        InvalidRequestError: it has none.
    """
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + _MARK}
    parts = [dict(part) for part in content or ()]
    for part in reversed(parts):
        if part.get("type") == "text":
            part["text"] += _MARK
            return {**message, "content": parts}
    raise InvalidRequestError("continue_final_message: the last message has no text", param="messages")


def _up_to_mark(text: str) -> str:
    """A rendered chat up to the mark; without white space before it, if the template takes that away.

    Raises:
        InvalidRequestError: the template doesn't write the last message.
    """
    at = text.rfind(_MARK.strip())
    if at < 0:
        raise InvalidRequestError(
            "continue_final_message: the model's chat template doesn't write the last message", param="messages"
        )
    return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()
