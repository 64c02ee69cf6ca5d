"""`dynamo-grpc drain`."""

from __future__ import annotations

import asyncio

import click
import grpc

from dynamo_grpc.cli.options import MeshCommand, configure_logging, log_option, option, registry_from, static_option
from dynamo_grpc.connections import CHANNEL_OPTIONS
from dynamo_grpc.errors import InvalidRequestError, NoInstancesError, names
from dynamo_grpc.names import INSTANCES, check_address
from dynamo_grpc.records import read_instances
from dynamo_grpc.registry import Registry
from dynamo_grpc.status import from_rpc_error
from dynamo_grpc.v1 import control_pb2, control_pb2_grpc

#: So many digits of an id must be given: an empty variable in a script must not drain anybody.
_MIN_ID = 4


@click.command(
    cls=MeshCommand,
    epilog="""\b
Examples:
  dynamo-grpc drain 3f1c5e0d9a7b2c44
  dynamo-grpc drain 10.0.0.7:9000 --limit-s 120

\b
The worker leaves the registry, takes no new requests, finishes those that run, and ends. What still runs at the
limit goes on at other workers.""",
)
@click.argument("worker", metavar="INSTANCE|HOST:PORT")
@option(
    "--limit-s",
    "Seconds that running requests may take; by default the worker's own.",
    type=click.FloatRange(0, 86_400),
)
@static_option
@log_option
def drain(worker: str, limit_s: float | None, static: str, log_level: str) -> None:
    """Let a worker finish what it has, and end."""
    configure_logging("warning" if log_level == "info" else log_level)
    asyncio.run(_drain(registry_from(static), worker, limit_s))


async def _drain(registry: Registry, worker: str, limit_s: float | None) -> None:
    async with registry:
        try:
            address = check_address(worker)
        except ValueError:
            address = await _address_of(registry, worker.lower())
    request = control_pb2.DrainRequest()
    if limit_s is not None:
        request.limit.FromNanoseconds(int(limit_s * 1e9))
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        try:
            answer = await control_pb2_grpc.ControlStub(channel).Drain(request, timeout=5.0)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
    click.echo(f"{address} drains; {answer.num_requests} requests run there")


async def _address_of(registry: Registry, instance_id: str) -> str:
    """Where the instance is whose id is this, or begins so.

    Raises:
        NoInstancesError: there is none; names those there are.
        InvalidRequestError: there are several.
    """
    found = {
        f"{r.instance.instance_id:016x}": r.instance.address for r in read_instances(await registry.list(INSTANCES))
    }
    if len(instance_id) < _MIN_ID:
        raise InvalidRequestError(
            f"{instance_id!r} is too short for an instance id: give {_MIN_ID} digits of it at least"
        )
    matches = sorted(full for full in found if full.startswith(instance_id))
    if not matches:
        raise NoInstancesError(
            f"no instance {instance_id!r} in {registry.description}: there are {names(sorted(found))}"
        )
    if len(matches) > 1:
        raise InvalidRequestError(f"{instance_id!r} could be {names(matches)}: give more of it")
    return found[matches[0]]
