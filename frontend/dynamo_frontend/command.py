"""`dynamo-grpc frontend`."""

from __future__ import annotations

import socket
import sys
from typing import Any

import click
import uvicorn

from dynamo_frontend.app import Frontend, FrontendSettings
from dynamo_grpc import ConfigurationError, DistributedRuntime, RouterMode
from dynamo_grpc.cli.options import configure_logging, log_option, registry_from


@click.command(
    epilog="""\b
Examples:
  dynamo-grpc frontend
  ETCD_ENDPOINTS=etcd-0:2379,etcd-1:2379 dynamo-grpc frontend --host 0.0.0.0 --router-mode least-loaded
  dynamo-grpc frontend --static 127.0.0.1:9000,127.0.0.1:9001
  dynamo-grpc frontend --static dns:workers.default.svc:9000"""
)
@click.option(
    "--host",
    envvar="DYN_HTTP_HOST",
    default="127.0.0.1",
    show_default=True,
    show_envvar=True,
    help="Address to listen on.",
)
@click.option(
    "--http-port",
    envvar="DYN_HTTP_PORT",
    default=8000,
    show_default=True,
    show_envvar=True,
    type=click.IntRange(0, 65535),
    help="Port to listen on; 0 takes a free one.",
)
@click.option(
    "--namespace", envvar="DYN_NAMESPACE", default="", show_envvar=True, help="Serve only models of this namespace."
)
@click.option(
    "--static",
    "static",
    envvar="DYN_STATIC",
    default="",
    show_envvar=True,
    metavar="HOST:PORT,…|@FILE|dns:NAME:PORT",
    help="Workers at known addresses, without a registry.",
)
@click.option(
    "--router-mode",
    envvar="DYN_ROUTER_MODE",
    default=RouterMode.RoundRobin.value,
    show_default=True,
    show_envvar=True,
    type=click.Choice([mode.value for mode in RouterMode]),
    help="How requests are spread. direct: the header x-worker-instance-id names the instance.",
)
@click.option(
    "--max-body-mb",
    envvar="DYN_HTTP_BODY_LIMIT_MB",
    default=64,
    show_default=True,
    show_envvar=True,
    type=click.IntRange(1),
    help="Largest request body, in MiB.",
)
@click.option(
    "--instance-wait-s",
    envvar="DYN_INSTANCE_WAIT_S",
    default=10.0,
    show_default=True,
    show_envvar=True,
    type=click.FloatRange(0),
    help="How long a request for a known model waits for an instance.",
)
@log_option
def frontend(**options: Any) -> None:
    """Serve OpenAI's HTTP API for all models of the mesh."""
    configure_logging(options["log_level"])
    registry = registry_from(options["static"])
    settings = FrontendSettings(
        namespace=options["namespace"],
        router_mode=RouterMode(options["router_mode"]),
        max_body_bytes=options["max_body_mb"] * 2**20,
        instance_wait_s=options["instance_wait_s"],
    )
    listener = _listen(options["host"], options["http_port"])
    app = Frontend(settings, lambda: DistributedRuntime(registry=registry)).app
    host, port = listener.getsockname()[:2]
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=5, loop=_loop(), lifespan="on"
    )
    server = _Server(config, f"frontend ready at http://{host}:{port} ({registry.description})")
    server.run(sockets=[listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: str) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            click.echo(self._ready)


def _loop() -> str:
    return "uvloop" if sys.platform != "win32" else "asyncio"


def _listen(host: str, port: int) -> socket.socket:
    """A socket on the port.

    Raises:
        ConfigurationError: it is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise ConfigurationError(f"can't listen on {host}:{port} for HTTP: {error.strerror}") from error
    listener.listen(2048)
    return listener
