"""What the commands have in common: options, logging, errors."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint
from typing import Any, TypeVar

import click

from dynamo_grpc.discovery import open_registry
from dynamo_grpc.errors import ConfigurationError, MeshError
from dynamo_grpc.logs import configure_dynamo_logging, parse_levels
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
    kwargs.setdefault("show_default", kwargs.get("default") not in (None, ""))
    return click.option(flag, *names, envvar=variable, show_envvar=True, help=text, **kwargs)


def missing(found: EntryPoint, error: ModuleNotFoundError) -> str:
    """What a command or a worker needs that isn't installed: the extras of its entry point."""
    package = found.dist.name if found.dist else "dynamo-grpc"
    wanted = f"'{package}[{','.join(found.extras)}]'" if found.extras else error.name
    return f"needs the package {error.name}: pip install {wanted}"


router_mode_option = option(
    "--router-mode",
    "How requests are spread; direct: the header x-worker-instance-id names the instance.",
    default=RouterMode.RoundRobin.value,
    type=click.Choice([mode.value for mode in RouterMode]),
)

PORT = click.IntRange(0, 65535)


class _Levels(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic in newer versions alone
    """What `parse_levels` takes."""

    name = "levels"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            parse_levels(value)
        except ConfigurationError as error:
            self.fail(error.message, param, ctx)
        return str(value)


def log_option(function: _F) -> _F:
    """The flags of what is logged, and how."""
    level = option(
        "--log-level",
        "What is logged, to standard error: debug, info, warning, error; by module: info,dynamo_grpc.registry=debug.",
        envvar="DYN_LOG",
        default="info",
        type=_Levels(),
        metavar="LEVEL[,MODULE=LEVEL…]",
    )
    as_json = option(
        "--log-json",
        "Log JSON, an object for each line.",
        envvar="DYN_LOGGING_JSONL",
        is_flag=True,
        expose_value=False,
        callback=_set_json,
    )
    return level(as_json(function))


def _set_json(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        os.environ["DYN_LOGGING_JSONL"] = "1"  # for the processes that it starts, too


static_option = option(
    "--static",
    "Workers at known addresses, without a registry.",
    default="",
    metavar="HOST:PORT,…|@FILE|dns:NAME:PORT",
)


def configure_logging(level: str, service: str = "dynamo-grpc") -> None:
    """Log to standard error, one line for each event."""
    configure_dynamo_logging(service, level=level)


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
