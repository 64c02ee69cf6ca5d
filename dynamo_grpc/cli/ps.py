"""`dynamo-grpc ps`."""

from __future__ import annotations

import asyncio
import json

import click
import grpc

from dynamo_grpc.cli.options import MeshCommand, configure_logging, log_option, registry_from, static_option
from dynamo_grpc.errors import RegistryError
from dynamo_grpc.names import INSTANCES, MODELS
from dynamo_grpc.records import holding_cards, read_cards, read_instances, refusal
from dynamo_grpc.registry.base import Registry
from dynamo_grpc.v1 import control_pb2, control_pb2_grpc

_COLUMNS = ("endpoint", "instance", "address", "model", "state", "requests")


@click.command(cls=MeshCommand)
@click.option(
    "--json", "as_json", envvar="DYN_JSON", show_envvar=True, is_flag=True, help="Print JSON, an object a line."
)
@static_option
@log_option
def ps(as_json: bool, static: str, log_level: str) -> None:
    """List the instances of the mesh: who serves what, where, and whether it gets traffic."""
    configure_logging("warning" if log_level == "info" else log_level)
    rows = asyncio.run(_rows(registry_from(static)))
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    if not rows:
        click.echo("no instances are registered")
        return
    widths = {c: max(len(c), *(len(str(row[c])) for row in rows)) for c in _COLUMNS}
    click.echo("  ".join(c.upper().ljust(widths[c]) for c in _COLUMNS).rstrip())
    for row in rows:
        click.echo("  ".join(str(row[c]).ljust(widths[c]) for c in _COLUMNS).rstrip())
        if row["reason"]:
            click.echo(f"  {row['reason']}")


async def _rows(registry: Registry) -> list[dict[str, str]]:
    async with registry:
        try:
            instances = read_instances(await registry.list(INSTANCES))
            held = holding_cards(read_cards(await registry.list(MODELS)))
        except TimeoutError:
            raise RegistryError(f"{registry.description} does not answer") from None
        states = await asyncio.gather(*(_state(instance.address) for instance in instances))
    rows = []
    for instance, (state, requests) in zip(instances, states, strict=True):
        reason = refusal(instance, held)
        rows.append(
            {
                "endpoint": f"{instance.namespace}.{instance.component}.{instance.endpoint}",
                "instance": f"{instance.instance_id:016x}",
                "address": instance.address,
                "model": instance.model or "-",
                "state": "refused" if reason else state,
                "requests": requests,
                "reason": reason,
            }
        )
    return rows


async def _state(address: str) -> tuple[str, str]:
    options = (("grpc.enable_http_proxy", 0),)
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        try:
            answer = await control_pb2_grpc.ControlStub(channel).Describe(control_pb2.DescribeRequest(), timeout=2.0)
        except grpc.aio.AioRpcError as error:
            return ("ready" if error.code() is grpc.StatusCode.UNIMPLEMENTED else "unreachable"), "-"
    name = control_pb2.WorkerState.Name(answer.state).removeprefix("WORKER_STATE_").lower()
    return name, str(answer.num_requests)
