"""`dynamo-grpc worker`: run a worker by its name, its module or its file."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click

from dynamo_grpc.cli.options import PORT, MeshCommand, configure_logging, log_option, missing, option
from dynamo_grpc.entry import importing
from dynamo_grpc.errors import ConfigurationError, names
from dynamo_grpc.names import nearest
from dynamo_grpc.server import Served
from dynamo_grpc.telemetry import configure_tracing
from dynamo_grpc.worker import Worker, WorkerSettings, serve_worker

WORKERS = "dynamo_grpc.workers"


_OPTIONS = (
    option("--port", "gRPC port; 0 takes a free one.", default=0, type=PORT),
    option("--host", "Address to listen on.", default="127.0.0.1"),
    option("--advertise", "Address that others reach it at.", default="", metavar="HOST[:PORT]"),
    option("--namespace", "Namespace of its endpoint."),
    option(
        "--discovery-backend",
        "Where it registers: etcd (ETCD_ENDPOINTS, default localhost:2379); static: nowhere, others know its address.",
        metavar="etcd|static",
    ),
    option("--component", "Component of its endpoint."),
    option("--model-path", "Folder with tokenizer, template and configuration.", type=click.Path()),
    option("--model-name", "Name that clients ask for."),
    option("--chat-template", "File with another chat template than the model's own.", type=click.Path()),
    option("--tool-call-parser", "How the model writes calls of tools, where its template doesn't tell."),
    option("--reasoning-parser", "How the model marks reasoning, where its template doesn't tell."),
    option(
        "--system-port",
        "HTTP port of /live, /health and /metrics; 0 takes a free one, -1 (default) is none.",
        type=click.IntRange(-1, 65535),
    ),
    option(
        "--grpc-admin-port",
        "Port of channelz, on loopback; 0 takes a free one, -1 (default) is none.",
        type=click.IntRange(-1, 65535),
    ),
    option(
        "--max-concurrent",
        "So many requests run at once, the others wait for their turn.",
        envvar="DYN_ENGINE_REQUEST_LIMIT",
        type=click.IntRange(1),
    ),
    option(
        "--max-queued",
        "So many wait (16); beyond that they are refused, and told when to come back.",
        envvar="DYN_DYNAMO_REQUEST_QUEUE_LIMIT",
        type=click.IntRange(0),
    ),
    option(
        "--inject-faults",
        "For development: what goes wrong, such as die_after=20,share=0.1 (see docs/reliability.md).",
        default="",
        metavar="NAME=VALUE,…",
    ),
    log_option,
)

_EPILOG = """\b
Examples:
  dynamo-grpc worker tiny --port 9000
  dynamo-grpc worker my_worker.py
  dynamo-grpc worker my_package.workers:Shout --model-path models/shout --model-name shout"""


def _add_options(command: Any) -> Any:
    for add in reversed(_OPTIONS):
        command = add(command)
    return command


@click.command(cls=MeshCommand, epilog=_EPILOG)
@click.argument("target", metavar="NAME|MODULE:CLASS|FILE.py[:CLASS]")
@_add_options
def worker(target: str, **options: Any) -> None:
    """Run a worker: one that is installed (tiny, echo, hello_world), or your own."""
    found = find_worker(target)
    if isinstance(found, type):
        _run(found, options)
        return
    configure_logging(options["log_level"], "dynamo-grpc-worker")
    _set_backend(options["discovery_backend"])
    configure_tracing("dynamo-grpc-worker")
    for flag, name in (("host", "DYN_HOST"), ("port", "DYN_PORT"), ("advertise", "DYN_ADVERTISE")):
        os.environ[name] = str(options[flag])
    for name in ("system_port", "grpc_admin_port"):
        if options[name] is not None:
            os.environ[f"DYN_{name.upper()}"] = str(options[name])
    asyncio.run(found())


def worker_command(cls: type[Worker]) -> click.Command:
    """The command that runs one class, for `run`."""

    @click.command(cls=MeshCommand, help=f"Run the worker {cls.__name__}.")
    @_add_options
    def command(**options: Any) -> None:
        _run(cls, options)

    assert isinstance(command, click.Command)
    return command


def _run(cls: type[Worker], options: dict[str, Any]) -> None:
    configure_logging(options.pop("log_level"), "dynamo-grpc-worker")
    _set_backend(options.pop("discovery_backend"))
    configure_tracing("dynamo-grpc-worker")
    for name in ("system_port", "grpc_admin_port"):
        options[name] = None if options[name] == -1 else options[name]
    settings = WorkerSettings(**options)
    _install_uvloop()
    asyncio.run(serve_worker(cls, settings, _say_ready))


def _set_backend(backend: str | None) -> None:
    if backend:
        os.environ["DYN_DISCOVERY_BACKEND"] = backend


def _install_uvloop() -> None:
    if importlib.util.find_spec("uvloop") is not None:
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


def _say_ready(served: Served) -> None:
    if served.refused_because:
        return  # the log has said why
    model = f", model {served.card.name}" if served.card else ""
    click.echo(
        f"worker ready at {served.instance.address} ({served.name}{model}, instance {served.instance.instance_id:016x})"
    )


def find_worker(target: str) -> Any:
    """A Worker subclass, or a function decorated with `dynamo_worker`.

    Raises:
        ConfigurationError: there is none; says what there is.
    """
    path, _, attribute = target.partition(":")
    if path.endswith(".py"):
        return _pick(_load_file(Path(path)), attribute, target)
    if attribute:
        sys.path.insert(0, str(Path.cwd()))
        try:
            return _pick(importlib.import_module(path), attribute, target)
        except ModuleNotFoundError as error:
            raise ConfigurationError(f"no module {path!r} to find {attribute!r} in: {error}") from error
    installed = {found.name: found for found in entry_points(group=WORKERS)}
    if target not in installed:
        hint = nearest(target, installed)
        raise ConfigurationError(
            f"no worker {target!r}: there are {names(sorted(installed))}, or give FILE.py or MODULE:CLASS"
            + (f" (did you mean {hint!r}?)" if hint else "")
        )
    try:
        return installed[target].load()
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"worker {target!r} {missing(installed[target], error)}") from error


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise ConfigurationError(f"no file {str(path)!r} (looked in {Path.cwd()})")
    sys.path.insert(0, str(path.resolve().parent))
    name = path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that inspect finds the classes' file
    with importing(str(path)):
        spec.loader.exec_module(module)
    return module


def _pick(module: Any, attribute: str, target: str) -> Any:
    if attribute:
        found = getattr(module, attribute, None)
        if not _is_worker(found):
            raise ConfigurationError(
                f"{target!r} is no worker: name a subclass of dynamo_grpc.Worker or a function with @dynamo_worker()"
            )
        return found
    own = {n: v for n, v in vars(module).items() if _is_worker(v) and getattr(v, "__module__", "") == module.__name__}
    if len(own) != 1:
        raise ConfigurationError(f"{target} has {names(sorted(own)) if own else 'no worker'}: name one, {target}:CLASS")
    return next(iter(own.values()))


def _is_worker(value: Any) -> bool:
    if inspect.isclass(value):
        return issubclass(value, Worker) and not inspect.isabstract(value)
    return bool(getattr(value, "__dynamo_worker__", False))
