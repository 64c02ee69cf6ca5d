"""`dynamo-grpc call`."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import click

from dynamo_grpc.cli.options import MeshCommand, configure_logging, log_option, option, registry_from, static_option
from dynamo_grpc.context import Context
from dynamo_grpc.entry import stop_signals
from dynamo_grpc.errors import InvalidRequestError
from dynamo_grpc.names import EndpointName
from dynamo_grpc.runtime import DistributedRuntime


@click.command(
    cls=MeshCommand,
    epilog="""\b
Examples:
  dynamo-grpc call hello_world.backend.generate '"world,sun,moon"'
  dynamo-grpc call dynamo.backend.generate '{"token_ids": [5, 6, 7], "stop_conditions": {"max_tokens": 8}}'""",
)
@click.argument("endpoint", metavar="NAMESPACE.COMPONENT.ENDPOINT")
@click.argument("request_json", metavar="[JSON]", default="null")
@option("--timeout-s", "Seconds the request may take.", type=click.FloatRange(0, min_open=True))
@option("--wait-s", "Seconds to wait for an instance.", default=5.0, type=click.FloatRange(0))
@static_option
@log_option
def call(endpoint: str, request_json: str, timeout_s: float | None, wait_s: float, static: str, log_level: str) -> None:
    """Call an endpoint and print what it yields, a line each."""
    configure_logging("warning" if log_level == "info" else log_level)
    EndpointName.parse(endpoint)
    try:
        request = json.loads(request_json)
    except ValueError as error:
        raise InvalidRequestError(f"the request is no JSON: {error} (text needs quotes: '\"text\"')") from None
    asyncio.run(_call(endpoint, request, timeout_s, wait_s, static))


async def _call(endpoint: str, request: Any, timeout_s: float | None, wait_s: float, static: str) -> None:
    task = asyncio.current_task()
    assert task is not None
    async with DistributedRuntime(registry=registry_from(static)) as runtime:
        with stop_signals(runtime, task):
            client = await runtime.endpoint(endpoint).client()
            await client.wait_for_instances(wait_s)
            try:
                async with await client.generate(
                    request, annotated=False, context=Context(timeout_s=timeout_s)
                ) as stream:
                    async for value in stream:
                        click.echo(repr(value) if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False))
            except asyncio.CancelledError:
                raise click.Abort from None
