"""`dynamo-grpc registry`."""

from __future__ import annotations

import asyncio
import signal

import click

from dynamo_grpc.cli.options import PORT, MeshCommand, configure_logging, log_option, option
from dynamo_grpc.registry.embedded import EmbeddedRegistry


@click.command(
    cls=MeshCommand,
    epilog="""\b
Example:
  dynamo-grpc registry --port 2379
  etcdctl --endpoints localhost:2379 get --prefix /dynamo_grpc""",
)
@option(
    "--port",
    "Port to listen on, on 127.0.0.1; 0 takes a free one.",
    envvar="DYN_REGISTRY_PORT",
    default=2379,
    type=PORT,
)
@log_option
def registry(port: int, log_level: str) -> None:
    """Run the embedded registry alone: etcd's API, in memory, for development."""
    configure_logging(log_level)
    asyncio.run(_serve(port))


async def _serve(port: int) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with EmbeddedRegistry(port) as server:
        click.echo(f"registry ready at {server.endpoint} (embedded, in memory, for development)")
        await stop.wait()
