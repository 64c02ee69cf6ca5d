"""`dynamo-grpc frontend`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import click
import uvicorn

from dynamo_frontend import processes
from dynamo_frontend.app import Frontend
from dynamo_frontend.busy import Thresholds
from dynamo_frontend.media import MediaLimits
from dynamo_frontend.settings import FrontendSettings
from dynamo_frontend.wire import WireProtocol
from dynamo_grpc import ConfigurationError, DistributedRuntime, RouterMode
from dynamo_grpc.cli.options import (
    PORT,
    MeshCommand,
    configure_logging,
    log_option,
    option,
    registry_from,
    router_mode_option,
    static_option,
)
from dynamo_grpc.entry import SAME_SIGNAL_S
from dynamo_grpc.migration import MIGRATION_LIMIT
from dynamo_grpc.names import EndpointName
from dynamo_grpc.server import authority
from dynamo_grpc.telemetry import configure_tracing

logger = logging.getLogger(__name__)

DEFAULT_GRPC_PORT = 8001
_OFF = -1
#: The endpoint that custom back ends are asked at, if no other is named.
_BACKEND = "nim.backend.runtime_stats"


class _GrpcPort(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic in newer versions alone
    """A port, or off."""

    name = "PORT|off"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return _OFF if value in ("off", _OFF) else PORT.convert(value, param, ctx)


@click.command(
    cls=MeshCommand,
    epilog="""\b
Examples:
  dynamo-grpc frontend
  ETCD_ENDPOINTS=etcd-0:2379,etcd-1:2379 dynamo-grpc frontend --host 0.0.0.0 --router-mode least-loaded
  dynamo-grpc frontend --static 127.0.0.1:9000,127.0.0.1:9001
  dynamo-grpc frontend --static dns:workers.default.svc:9000""",
)
@option("--host", "Address to listen on.", envvar="DYN_HTTP_HOST", default="127.0.0.1")
@option("--http-port", "Port to listen on; 0 takes a free one.", default=8000, type=PORT)
@option(
    "--grpc-port",
    "Port for gRPC clients (Inference, for any language), at the same address; 0 takes a free one, off serves none.",
    default=None,
    type=_GrpcPort(),
    show_default="8001 if it is free",
)
@option(
    "--grpc-max-connection-age-s",
    "A gRPC connection is ended after so long, so that its client looks for other frontends; its streams go on for an "
    "hour. 0 is never.",
    default=300.0,
    type=click.FloatRange(0),
)
@option("--namespace", "Serve only models of this namespace.", default="")
@static_option
@router_mode_option
@option(
    "--max-body-mb",
    "Largest request body, in MiB.",
    envvar="DYN_HTTP_BODY_LIMIT_MB",
    default=64,
    type=click.IntRange(1),
)
@option(
    "--max-bodies-mb",
    "The bodies of all running requests together, in MiB; beyond that they are refused and told when to come back.",
    default=1024,
    type=click.IntRange(1),
)
@option(
    "--instance-wait-s",
    "How long a request for a known model waits for an instance.",
    default=10.0,
    type=click.FloatRange(0),
)
@option(
    "--migration-limit",
    "How often a request goes on at another worker after its first token, when its own is lost; a model's card wins.",
    default=MIGRATION_LIMIT,
    type=click.IntRange(0),
)
@option(
    "--first-output-timeout-s",
    "How long a worker may take to its first output before the request goes elsewhere; 0 is without limit.",
    default=120.0,
    type=click.FloatRange(0),
)
@option(
    "--output-gap-timeout-s",
    "The same between outputs: a worker that gives none for so long is taken for stuck.",
    default=30.0,
    type=click.FloatRange(0),
)
@option(
    "--max-requests",
    "So many requests at once, beyond that they are refused and told when to come back; 0 is without limit.",
    default=0,
    type=click.IntRange(0),
)
@option(
    "--overload-status",
    "HTTP status of a request that is refused because there is no room.",
    envvar="DYN_HTTP_OVERLOAD_STATUS_CODE",
    default=503,
    type=click.Choice(["503", "429", "529"]),
)
@option(
    "--active-decode-blocks-threshold",
    "A worker with a larger share of its KV blocks in use is busy: left out, and refused if all are; 0 to 1.",
    type=click.FloatRange(0, 1),
)
@option(
    "--active-prefill-tokens-threshold",
    "The same by prompt tokens that wait for prefill.",
    type=click.IntRange(0),
)
@option(
    "--active-requests-threshold",
    "The same by requests that run or wait there, of all its clients.",
    type=click.IntRange(0),
)
@option(
    "--custom-backend-metrics-endpoint",
    "Endpoint (namespace.component.endpoint) whose instances are asked for figures of their own, for /metrics.",
    envvar=["DYN_CUSTOM_BACKEND_METRICS_ENDPOINT", "CUSTOM_BACKEND_ENDPOINT"],
    default=_BACKEND,
)
@option(
    "--custom-backend-metrics-polling-interval",
    "How often, in seconds, from 0.1 on; 0 is never.",
    envvar=["DYN_CUSTOM_BACKEND_METRICS_POLLING_INTERVAL", "CUSTOM_BACKEND_METRICS_POLLING_INTERVAL"],
    default=0.0,
    callback=lambda _, __, value: _polling_interval(value),
    type=click.FloatRange(0),
)
@option(
    "--grpc-admin-port",
    "Port of channelz, on loopback; 0 takes a free one, -1 is none. It shows one process: not with --processes.",
    default=-1,
    type=click.IntRange(-1, 65535),
)
@option("--strict", "Refuse fields that nobody knows; else they are ignored and named in x-warning.", is_flag=True)
@option("--no-page", "No page at /.", is_flag=True)
@option("--max-media", "So many pictures, videos and sounds in a chat.", default=16, type=click.IntRange(0))
@option("--max-media-mb", "And so large may each be.", default=32, type=click.IntRange(1))
@option(
    "--media-hosts",
    "Hosts that media are fetched from, with wildcards, where workers want bytes; by default all public ones.",
    default="",
    metavar="HOST,…",
)
@option(
    "--disable-admin-api",
    "No /busy_threshold and no /debug.",
    envvar="DYN_DISABLE_FRONTEND_ADMIN_API",
    is_flag=True,
)
@option(
    "--shutdown-grace-s",
    "How long to go on as before after SIGTERM, but for /health, so that a load balancer notices.",
    default=0.0,
    type=click.FloatRange(0),
)
@option(
    "--shutdown-timeout-s",
    "How long running requests may go on after SIGTERM.",
    envvar="DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS",
    default=5,
    type=click.IntRange(0),
)
@option(
    "--processes",
    "Run so many frontends behind the port, each with a core of its own.",
    default=1,
    type=click.IntRange(1, 256),
)
@click.option("--http-fd", type=int, hidden=True)
@click.option("--ready-fd", type=int, hidden=True)
@log_option
def frontend(**options: Any) -> None:
    """Serve OpenAI's HTTP API for all models of the mesh."""
    configure_logging(options["log_level"], "dynamo-grpc-frontend")
    configure_tracing("dynamo-grpc-frontend")
    registry = registry_from(options["static"])
    if options["processes"] > 1 and options["http_fd"] is None:
        if options["grpc_admin_port"] >= 0:
            raise click.UsageError("--grpc-admin-port shows one process: leave it or --processes out")
        _run_processes(options, registry.description)
        return
    settings = FrontendSettings(
        namespace=options["namespace"],
        router_mode=RouterMode(options["router_mode"]),
        max_body_bytes=options["max_body_mb"] * 2**20,
        max_bodies_bytes=options["max_bodies_mb"] * 2**20,
        instance_wait_s=options["instance_wait_s"],
        migration_limit=options["migration_limit"],
        first_output_timeout_s=options["first_output_timeout_s"] or None,
        output_gap_timeout_s=options["output_gap_timeout_s"] or None,
        max_requests=options["max_requests"] or None,
        overload_status=int(options["overload_status"]),
        thresholds=Thresholds(**{name: options[name] for name in Thresholds.__slots__}),
        is_strict=options["strict"],
        has_admin_api=not options["disable_admin_api"],
        has_page=not options["no_page"],
        media=MediaLimits(
            max_items=options["max_media"],
            max_bytes=options["max_media_mb"] * 1024 * 1024,
            hosts=tuple(filter(None, (host.strip() for host in options["media_hosts"].split(",")))),
        ),
        grpc_host=options["host"],
        grpc_port=_grpc_port(options),
        shares_grpc_port=options["http_fd"] is not None,
        grpc_admin_port=options["grpc_admin_port"] if options["grpc_admin_port"] >= 0 else None,
        grpc_max_connection_age_s=options["grpc_max_connection_age_s"],
        backend_metrics_endpoint=str(EndpointName.parse(options["custom_backend_metrics_endpoint"])),
        backend_metrics_interval_s=options["custom_backend_metrics_polling_interval"],
    )
    if options["custom_backend_metrics_endpoint"] != _BACKEND and not settings.backend_metrics_interval_s:
        logger.warning("nobody is asked for figures: give --custom-backend-metrics-polling-interval too")
    if options["grpc_admin_port"] > 0:
        _listen("127.0.0.1", options["grpc_admin_port"], what="channelz").close()
    if options["http_fd"] is None:
        listener = _listen(options["host"], options["http_port"])
    else:
        listener = socket.socket(fileno=options["http_fd"])
    app = Frontend(settings, lambda: DistributedRuntime(registry=registry))
    gc.freeze()  # what is imported stays: no collection needs to look at it
    gc.set_threshold(50_000, 20, 50)
    host, port = listener.getsockname()[:2]
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        timeout_graceful_shutdown=options["shutdown_timeout_s"],
        loop=_loop(),
        http=WireProtocol,
        lifespan="on",
    )

    def say() -> None:
        grpc = f"gRPC at {authority(host, app.ingress.port)}; " if app.ingress.port else ""
        _say(f"frontend ready at http://{authority(host, port)} ({grpc}{registry.description})", options["ready_fd"])

    server = _Server(config, app, options["shutdown_grace_s"], say)
    with contextlib.suppress(KeyboardInterrupt):  # raised again by uvicorn when it has ended
        server.run(sockets=[listener])


class _Server(uvicorn.Server):
    """Ends in three steps: /health says so; after the grace no connection is taken; running answers finish."""

    def __init__(self, config: uvicorn.Config, app: Frontend, grace_s: float, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._app, self._grace_s, self._on_ready = app, grace_s, on_ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._first_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        now, leave = time.monotonic(), functools.partial(super().handle_exit, sig, frame)
        if self._first_at is None:
            self._first_at, self._app.is_draining = now, True
            if self._loop is not None:
                asyncio.run_coroutine_threadsafe(self._app.ingress.say_draining(), self._loop)
            if self._grace_s and self._loop is not None:
                self._loop.call_soon_threadsafe(self._loop.call_later, self._grace_s, leave)
            else:
                leave()
        elif now - self._first_at >= SAME_SIGNAL_S:  # the second signal ends it at once
            self.force_exit = True
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._app.ingress.hurry)
            leave()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        limit_s = 0.0 if self.force_exit else float(self.config.timeout_graceful_shutdown or 0)
        stopping = asyncio.ensure_future(self._app.ingress.stop(limit_s))  # beside HTTP's
        await super().shutdown(sockets)
        await stopping

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if not self.should_exit:
            self._on_ready()


def _polling_interval(value: float) -> float:
    if value and not 0.1 <= value <= 86_400:
        raise click.BadParameter(f"{value:g} is not from 0.1 to 86400 seconds; 0 is never")
    return value


def _grpc_port(options: dict[str, Any]) -> int | None:
    """The port for gRPC; None is for none.

    Raises:
        ConfigurationError: the one that was asked for is taken.
    """
    asked = options["grpc_port"]
    if asked == _OFF or (asked is not None and options["http_fd"] is not None):
        return None if asked == _OFF else asked
    port = DEFAULT_GRPC_PORT if asked is None else asked
    try:
        if port and port == options["http_port"]:
            raise ConfigurationError(f"port {port} is for HTTP: gRPC needs one of its own")
        _listen(options["host"], port, what="gRPC").close()
    except ConfigurationError as error:
        if asked is not None:
            raise
        logger.warning("no port for gRPC clients: %s; --grpc-port chooses another one, or off", error.message)
        return None
    return port


def _say(ready: str, ready_fd: int | None) -> None:
    if ready_fd is None:
        click.echo(ready)
    else:
        os.write(ready_fd, b".")


def _run_processes(options: dict[str, Any], registry: str) -> None:
    host, count = options["host"], options["processes"]
    port = _grpc_port(options)
    if port == 0:
        with _listen(host, 0, what="gRPC") as probe:
            port = probe.getsockname()[1]
    options["grpc_port"] = "off" if port is None else port
    args = ["frontend"]
    for name, value in options.items():
        if name not in ("processes", "http_fd", "ready_fd", "host", "http_port") and value not in (None, ""):
            flag = f"--{name.replace('_', '-')}"
            args += ([flag] if value else []) if isinstance(value, bool) else [flag, str(value)]

    def listen(port: int) -> socket.socket:
        return _listen(host, port or options["http_port"], shares_port=True)

    def ready(port: int) -> str:
        grpc = "" if options["grpc_port"] == "off" else f"gRPC at {authority(host, options['grpc_port'])}; "
        return f"frontend ready at http://{host}:{port} ({grpc}{registry}, {count} processes)"

    stop_s = options["shutdown_grace_s"] + options["shutdown_timeout_s"] + 5.0
    if options["http_port"]:
        _listen(host, options["http_port"]).close()  # whoever else shares its port with us would share our clients
    asyncio.run(processes.run(count, args, listen, stop_s, ready))


def _loop() -> str:
    return "uvloop" if sys.platform != "win32" else "asyncio"


def _listen(host: str, port: int, *, shares_port: bool = False, what: str = "HTTP") -> socket.socket:
    """A socket on the port.

    Raises:
        ConfigurationError: it is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shares_port:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise ConfigurationError(f"can't listen on {host}:{port} for {what}: {error.strerror}") from error
    listener.listen(2048)
    return listener
