"""The command line. Subcommands of other packages (the frontend) are found by entry point: the core stays slim."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

import click

from dynamo_grpc.cli.call import call
from dynamo_grpc.cli.card import card
from dynamo_grpc.cli.chat import chat
from dynamo_grpc.cli.conformance import conformance
from dynamo_grpc.cli.doctor import doctor
from dynamo_grpc.cli.drain import drain
from dynamo_grpc.cli.options import MeshGroup, missing
from dynamo_grpc.cli.protos import protos
from dynamo_grpc.cli.ps import ps
from dynamo_grpc.cli.registry import registry
from dynamo_grpc.cli.up import up
from dynamo_grpc.cli.worker import worker
from dynamo_grpc.dump import ignore_until_installed
from dynamo_grpc.version import __version__

COMMANDS = "dynamo_grpc.commands"


class _Group(MeshGroup):
    """Our own commands, and those of installed packages, imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *(found.name for found in entry_points(group=COMMANDS))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if command := super().get_command(ctx, cmd_name):
            return command
        found = next((e for e in entry_points(group=COMMANDS) if e.name == cmd_name), None)
        return _load(found) if found else None


def _load(found: EntryPoint) -> click.Command:
    try:
        loaded: Any = found.load()
    except ModuleNotFoundError as error:
        told = f"`{found.name}` {missing(found, error)}"

        @click.command(found.name, context_settings={"ignore_unknown_options": True}, help=f"(needs {error.name})")
        @click.argument("args", nargs=-1, type=click.UNPROCESSED)
        def unavailable(args: tuple[str, ...]) -> None:
            raise click.ClickException(told)

        return unavailable
    assert isinstance(loaded, click.Command)
    return loaded


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="""\b
Examples:
  dynamo-grpc up                       a whole mesh on this machine, with a tiny model
  dynamo-grpc chat                     talk to it
  dynamo-grpc worker my_worker.py      serve your own model
  dynamo-grpc ps                       who serves what
  dynamo-grpc doctor                   why nobody answers
  dynamo-grpc conformance HOST:PORT    whether a worker in any language keeps the contract""",
)
@click.version_option(__version__, prog_name="dynamo-grpc")
def main() -> None:
    """A service mesh for inference workers: gRPC from the front door to the engine."""
    ignore_until_installed()


for _command in (call, card, chat, conformance, doctor, drain, protos, ps, registry, up, worker):
    main.add_command(_command)
