"""What the commands have in common: options, logging, errors."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from dynamo_grpc.discovery import open_registry
from dynamo_grpc.errors import ConfigurationError, MeshError
from dynamo_grpc.names import nearest
from dynamo_grpc.registry.base import Registry
from dynamo_grpc.registry.static import StaticRegistry
from dynamo_grpc.routing import RouterMode

_F = TypeVar("_F", bound=Callable[..., Any])


def option(flag: str, text: str, *names: str, envvar: str | Sequence[str] = "", **kwargs: Any) -> Callable[[_F], _F]:
    """A flag with its variable, `DYN_` and the flag's name unless said otherwise, and its default in the help.

    Args:
        envvar: of several, the first one that is set holds.
    """
    variable = envvar or "DYN_" + flag.removeprefix("--").replace("-", "_").upper()
    shows_default = kwargs.get("default") not in (None, "")
    return click.option(
        flag, *names, envvar=variable, show_envvar=True, show_default=shows_default, help=text, **kwargs
    )


router_mode_option = option(
    "--router-mode",
    "How requests are spread; direct: the header x-worker-instance-id names the instance.",
    default=RouterMode.RoundRobin.value,
    type=click.Choice([mode.value for mode in RouterMode]),
)

PORT = click.IntRange(0, 65535)

log_option = option(
    "--log-level",
    "What is logged, to standard error.",
    envvar="DYN_LOG",
    default="info",
    type=click.Choice(["debug", "info", "warning", "error"]),
)

static_option = option(
    "--static",
    "Workers at known addresses, without a registry.",
    default="",
    metavar="HOST:PORT,…|@FILE|dns:NAME:PORT",
)


class _WithIds(logging.Formatter):
    """Lines end with the ids that clients are told, so that they can be found."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        text = super().formatMessage(record)
        ids = ((name, getattr(record, name, "")) for name in ("request_id", "error_id"))
        return " ".join([text, *(f"{name}={value}" for name, value in ids if value and value not in text)])


def configure_logging(level: str) -> None:
    """Log to standard error, one line for each event."""
    logging.getLogger("grpc").setLevel("INFO")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_WithIds("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def registry_from(static: str) -> Registry:
    """The registry that flags and environment ask for."""
    if not static and os.environ.get("DYN_DISCOVERY_BACKEND") == "static":
        raise ConfigurationError("DYN_DISCOVERY_BACKEND=static needs --static or DYN_STATIC here: who are the workers?")
    return StaticRegistry(static) if static else open_registry()


class _ErrorsInvoke(click.Command):
    """Errors of the mesh end a command with their message, not with a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MeshError as error:
            raise click.ClickException(error.message) from error
        except KeyboardInterrupt:
            raise SystemExit(130) from None  # whoever pressed Ctrl-C knows


class MeshCommand(_ErrorsInvoke):
    """A command."""


class MeshGroup(_ErrorsInvoke, click.Group):
    """A group of commands that knows what a mistyped one was meant to be."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            hint = nearest(name, self.list_commands(ctx))
            raise click.UsageError(f"no command {name!r}" + (f" (did you mean {hint!r}?)" if hint else ""), ctx)
        return super().resolve_command(ctx, args)
