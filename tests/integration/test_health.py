"""The health service as a client's package sees it."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dynamo_grpc.testing import Mesh

from .handlers import NAME, echo


@pytest.mark.skipif(not hasattr(health_pb2, "HealthListRequest"), reason="this grpcio-health-checking has no List")
async def test_all_services_are_listed(mesh: Mesh) -> None:
    runtime = await mesh.serve(NAME, echo)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{runtime.server.port}") as channel:
        response = await health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest())
        serving = {name for name, health in response.statuses.items() if health.status == 1}
        assert serving == {"", "dynamo_grpc.v1.Endpoint"}
