"""Chat templates: the model's own Jinja, sandboxed."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dynamo_grpc import ConfigurationError, InvalidRequestError


def _raise(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    # plain JSON, as models were trained on: Jinja's own filter escapes for HTML
    return json.dumps(value, ensure_ascii=False, indent=indent)


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja.
        variables: what every rendering gets (bos_token, eos_token …).

    Raises:
        ConfigurationError: it is no valid template.
    """

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda fmt: dt.datetime.now().astimezone().strftime(fmt)
        self._variables = dict(variables)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigurationError(f"the chat template is wrong in line {error.lineno}: {error.message}") from error

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt of a chat.

        Raises:
            InvalidRequestError: the template doesn't take these messages; says why.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._variables)
        except jinja2.TemplateError as error:
            raise InvalidRequestError(
                f"the model's chat template refuses the messages: {error}", param="messages"
            ) from error
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise InvalidRequestError(
                f"the model's chat template can't render the messages: {error}", param="messages"
            ) from error
