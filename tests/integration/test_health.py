"""The health service's List, which older packages don't know: it is asked by its path."""

from typing import Any

import grpc

from dynamo_grpc import health
from dynamo_grpc.testing import Mesh

from .handlers import NAME, echo


async def test_all_services_are_listed(mesh: Mesh) -> None:
    runtime = await mesh.serve(NAME, echo)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{runtime.server.port}") as channel:
        ask: Any = channel.unary_unary(
            f"/{health.HEALTH}/List", health._ListRequest.SerializeToString, health._ListResponse.FromString
        )
        response = await ask(health._ListRequest())
        serving = {name for name, status in response.statuses.items() if status.status == 1}
        assert serving == {"", "dynamo_grpc.v1.Endpoint"}
