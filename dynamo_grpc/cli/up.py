"""`dynamo-grpc up`: a whole mesh on one machine, under one supervising process."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import click

from dynamo_grpc.cli.chat import ChatClient
from dynamo_grpc.cli.options import MeshCommand, configure_logging, log_option, option, router_mode_option
from dynamo_grpc.errors import ConfigurationError
from dynamo_grpc.registry.embedded import EmbeddedRegistry
from dynamo_grpc.supervision import Supervisor

_PORT = click.IntRange(1, 65535)
_STOP_S = 35.0


@dataclass(frozen=True, slots=True)
class _Part:
    """A process of the mesh."""

    name: str
    args: tuple[str, ...]


@click.command(
    cls=MeshCommand,
    epilog="""\b
Examples:
  dynamo-grpc up
  dynamo-grpc up --model my_worker.py --workers 3
  ETCD_ENDPOINTS=etcd:2379 dynamo-grpc up""",
)
@option("--model", "Worker to run.", default="tiny", metavar="NAME|MODULE:CLASS|FILE.py[:CLASS]")
@option("--workers", "How many of it, on ports from --port on.", default=1, type=click.IntRange(1, 64))
@option("--http-port", "Port of the frontend.", default=8000, type=_PORT)
@option("--port", "gRPC port of the first worker.", default=9000, type=_PORT)
@option(
    "--registry-port", "Port of the embedded registry; unused when ETCD_ENDPOINTS is set.", default=2379, type=_PORT
)
@router_mode_option
@option("--ask", "Ask this when all is ready, and show the answer as it streams.", default="", metavar="TEXT")
@log_option
def up(**options: Any) -> None:
    """Run registry, workers and frontend on this machine, until Ctrl-C."""
    configure_logging(options["log_level"])
    asyncio.run(_Up(options).run())


class _Up:
    """Starts the parts, greets, and stops them in order."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._supervisor = Supervisor(_STOP_S)
        self._stop = self._supervisor.stop

    async def run(self) -> None:
        """Until SIGINT or SIGTERM."""
        self._supervisor.catch_signals()
        options = self._options
        ports = [(options["http_port"], "the frontend (--http-port)")]
        ports += [(options["port"] + i, f"worker {i + 1} (--port)") for i in range(options["workers"])]
        for port, what in ports:
            _check_free(port, what)
        async with self._registry() as endpoints:
            env = {**os.environ, "ETCD_ENDPOINTS": endpoints, "DYN_LOG": options["log_level"], "PYTHONUNBUFFERED": "1"}
            for name in ("DYN_PORT", "DYN_STATIC", "DYN_DISCOVERY_BACKEND"):
                env.pop(name, None)
            workers = [
                _Part(f"worker {i + 1}", ("worker", options["model"], "--port", str(options["port"] + i)))
                for i in range(options["workers"])
            ]
            front = _Part(
                "frontend",
                ("frontend", "--http-port", str(options["http_port"]), "--router-mode", options["router_mode"]),
            )
            async with asyncio.TaskGroup() as tasks:
                kept = [
                    tasks.create_task(self._supervisor.keep(part.name, part.args, env)) for part in (*workers, front)
                ]
                greeting = tasks.create_task(asyncio.to_thread(self._greet))
                await self._stop.wait()
                await self._supervisor.end([front.name])
                await self._supervisor.end([part.name for part in workers])
                for task in (*kept, greeting):
                    task.cancel()

    @contextlib.asynccontextmanager
    async def _registry(self) -> AsyncIterator[str]:
        configured = os.environ.get("ETCD_ENDPOINTS")
        if configured:
            click.echo(f"registry: etcd at {configured}")
            yield configured
            return
        async with EmbeddedRegistry(self._options["registry_port"]) as server:
            click.echo(f"registry ready at {server.endpoint} (embedded, in memory, for development)")
            yield server.endpoint

    def _greet(self) -> None:
        """When a model is ready, say how to use it, and ask what --ask says."""
        port = self._options["http_port"]
        client = ChatClient(f"http://127.0.0.1:{port}")
        models: list[str] = []
        while not models and not self._stop.is_set():
            with contextlib.suppress(click.ClickException, OSError, http.client.HTTPException):
                models = client.models()
            time.sleep(0.1)
        if not models or self._stop.is_set():
            return
        text = self._options["ask"] or "Tell me about the sea"
        body = f'{{"model":"{models[0]}","stream":true,"messages":[{{"role":"user","content":"{text}"}}]}}'
        click.echo(
            f"\nall ready; try\n  curl -N localhost:{port}/v1/chat/completions"
            f" -H 'content-type: application/json' -d '{body}'\nor http://localhost:{port} in a browser\n"
        )
        if self._options["ask"]:
            click.echo(f"> {text}")
            try:
                for piece in client.answer(models[0], [{"role": "user", "content": text}]):
                    click.echo(piece, nl=False)
            except (click.ClickException, OSError, http.client.HTTPException) as error:
                if not self._stop.is_set():
                    click.echo(f"no answer: {error}", err=True)
            click.echo("\n\nrunning until Ctrl-C")


def _check_free(port: int, what: str) -> None:
    """Raise if something listens on the port already.

    Raises:
        ConfigurationError: names the port.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise ConfigurationError(
                f"port {port} for {what} is taken: stop what listens there, or choose another port"
            ) from None
