"""`dynamo-grpc ps`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys

import click

from dynamo_grpc.cli.options import MeshCommand, configure_logging, log_option, option, registry_from, static_option
from dynamo_grpc.names import INSTANCES
from dynamo_grpc.records import decode_instance, endpoint_of, read_instances
from dynamo_grpc.registry import Registry, View
from dynamo_grpc.survey import Sighting, shown_age, survey

_COLUMNS = ("endpoint", "instance", "address", "model", "state", "epoch", "load", "age")
_EVERY_S = 1.0

Row = dict[str, str]


@click.command(
    cls=MeshCommand,
    epilog="""\b
Examples:
  dynamo-grpc ps
  dynamo-grpc ps --watch
  dynamo-grpc ps --json --namespace prod

\b
States: ready; starting; draining; refused (another model card holds for its model); unreachable;
busy (its event loop is blocked, its connection stands); gone (another process answers at its address).
Load is the number of requests that run there.""",
)
@click.option(
    "--json", "as_json", envvar="DYN_JSON", show_envvar=True, is_flag=True, help="Print JSON, an object a line."
)
@option("--watch", "Show it again whenever it changes, until Ctrl-C.", is_flag=True)
@option("--namespace", "Only instances of this namespace.", default="")
@static_option
@log_option
def ps(as_json: bool, watch: bool, namespace: str, static: str, log_level: str) -> None:
    """List the instances of the mesh: who serves what, where, and whether it gets traffic."""
    quiet = "error" if watch else "warning"  # what is wrong stands above the table
    configure_logging(quiet if log_level == "info" else log_level)
    prefix = INSTANCES + (f"{namespace}/" if namespace else "")
    registry = registry_from(static)
    if watch:
        asyncio.run(_watch(registry, prefix, as_json))
    else:
        _show(asyncio.run(_once(registry, prefix)), as_json)


async def _once(registry: Registry, prefix: str) -> list[Row]:
    async with registry:
        return [_row(sighting) for sighting in await survey(read_instances(await registry.list(prefix)))]


async def _watch(registry: Registry, prefix: str, as_json: bool) -> None:
    async with registry:
        view = View.start(registry, prefix, decode_instance)
        changed, last, told = asyncio.Event(), "", ""
        view.subscribe(lambda _: changed.set())
        try:
            while True:
                changed.clear()
                rows = [_row(sighting) for sighting in await survey(view.records.values(), timeout_s=_EVERY_S)]
                problem = registry.problem
                if sys.stdout.isatty():
                    click.clear()
                    click.echo(registry.description + (f"  ({problem})" if problem else "") + "\n")
                    if view.is_ready:
                        _show(rows, as_json)
                else:
                    if problem != told:
                        told = problem
                        click.echo(f"{registry.description}: {problem or 'works again'}", err=True)
                    now = json.dumps([{k: v for k, v in row.items() if k != "age"} for row in rows])
                    if view.is_ready and now != last:
                        last = now
                        _show(rows, as_json)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_EVERY_S):
                        await changed.wait()
        finally:
            await view.close()


def _show(rows: list[Row], as_json: bool) -> None:
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    if not rows:
        click.echo("no instances are registered; `dynamo-grpc doctor` looks for the reason")
        return
    widths = {c: max(len(c), *(len(row[c]) for row in rows)) for c in _COLUMNS}
    click.echo("  ".join(c.upper().ljust(widths[c]) for c in _COLUMNS).rstrip())
    for row in rows:
        click.echo("  ".join(row[c].ljust(widths[c]) for c in _COLUMNS).rstrip())
        if row["reason"]:
            click.echo(f"  {row['reason']}")


def _row(sighting: Sighting) -> Row:
    instance, said = sighting.record.instance, sighting.answer.said
    return {
        "endpoint": endpoint_of(instance),
        "instance": f"{instance.instance_id:016x}",
        "address": instance.address,
        "model": instance.model or "-",
        "state": sighting.state,
        "epoch": str(instance.epoch),
        "load": str(said.num_requests) if said else "-",
        "age": shown_age(sighting.age_s),
        "reason": sighting.refused_because,
    }
