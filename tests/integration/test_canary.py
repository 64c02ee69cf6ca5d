"""Health checks of an endpoint: at the start, and when nobody else asks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dynamo_grpc.errors import NotReadyError
from dynamo_grpc.testing import Mesh

from ..conftest import eventually
from .handlers import NAME, collect, toy


class Engine:
    """Answers while it is well."""

    def __init__(self) -> None:
        self.is_well = True
        self.requests: list[Any] = []

    async def generate(self, request: Any) -> AsyncIterator[Any]:
        self.requests.append(request)
        if not self.is_well:
            raise RuntimeError("CUDA error: device-side assert")
        yield 1


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_HEALTH_CHECK_ENABLED", "true")
    monkeypatch.setenv("DYN_CANARY_WAIT_TIME", "0.05")
    monkeypatch.setenv("DYN_HEALTH_CHECK_REQUEST_TIMEOUT", "1")


@pytest.mark.usefixtures("often")
async def test_one_that_fails_when_idle_gets_no_requests_until_it_is_well(mesh: Mesh) -> None:
    sick, well = Engine(), Engine()
    runtime = await mesh.serve(NAME, sick.generate, health_check_payload="ping")
    await mesh.serve(NAME, well.generate)
    client = await mesh.client(NAME)
    await eventually(lambda: len(client.instance_ids()) == 2)
    await eventually(lambda: len(sick.requests) >= 3)  # idle: it is asked again and again
    sick.is_well = False
    served = runtime.server.served[NAME]
    await eventually(lambda: served.sick_because)
    assert served.sick_because == "RuntimeError: CUDA error: device-side assert"
    async with grpc.aio.insecure_channel(served.instance.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def status() -> int:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service="dynamo_grpc.v1.Endpoint"))
            return int(answer.status)

        assert await status() == health_pb2.HealthCheckResponse.NOT_SERVING
        sick.requests.clear()
        for _ in range(6):
            assert await collect(await client.generate("real")) == [1]
        assert "real" not in sick.requests
        with pytest.raises(NotReadyError, match=r"the health check of test.backend.generate fails \(RuntimeError"):
            await collect(await client.direct("real", runtime.instance_id))
        sick.is_well = True
        await eventually(lambda: not served.sick_because)
        assert await status() == health_pb2.HealthCheckResponse.SERVING
    async with asyncio.timeout(5):
        while "real" not in sick.requests:  # it is asked again a second after it refused
            assert await collect(await client.generate("real")) == [1]


@pytest.mark.usefixtures("often")
async def test_requests_are_health_check_enough(mesh: Mesh) -> None:
    go, num = asyncio.Event(), 0

    async def handler(request: Any) -> AsyncIterator[Any]:
        nonlocal num
        num += request["token_ids"] == [1]
        yield 2
        if request["token_ids"] != [1]:
            await go.wait()

    await mesh.serve(NAME, handler, toy(), health_check_payload=[1])
    client = await mesh.client(NAME)
    await eventually(lambda: num >= 2)
    reading = asyncio.ensure_future(collect(await client.generate([5])))
    await asyncio.sleep(0.1)  # a check that was under way has ended
    before = num
    await asyncio.sleep(0.3)
    assert num == before
    go.set()
    await reading
    await eventually(lambda: num > before)
