"""What the commands have in common: options, logging, errors."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from dynamo_grpc.discovery import open_registry
from dynamo_grpc.errors import MeshError
from dynamo_grpc.names import nearest
from dynamo_grpc.registry.base import Registry
from dynamo_grpc.registry.static import StaticRegistry

_F = TypeVar("_F", bound=Callable[..., Any])

log_option = click.option(
    "--log-level",
    envvar="DYN_LOG",
    default="info",
    show_default=True,
    show_envvar=True,
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="What is logged, to standard error.",
)

static_option = click.option(
    "--static",
    envvar="DYN_STATIC",
    default="",
    show_envvar=True,
    metavar="HOST:PORT,…|@FILE|dns:NAME:PORT",
    help="Workers at known addresses, without a registry.",
)


def configure_logging(level: str) -> None:
    """Log to standard error, one line for each event."""
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", force=True
    )


def registry_from(static: str) -> Registry:
    """The registry that flags and environment ask for."""
    return StaticRegistry(static) if static else open_registry()


class _ErrorsInvoke(click.Command):
    """Errors of the mesh end a command with their message, not with a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MeshError as error:
            raise click.ClickException(error.message) from error


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
