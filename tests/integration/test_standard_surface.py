"""What every server has beside its own services: load reports, and the admin port."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from dynamo_grpc import ConfigurationError
from dynamo_grpc.admin import open_admin_port
from dynamo_grpc.orca import LOAD_KEY, SERVICE
from dynamo_grpc.testing import Mesh
from dynamo_grpc.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc, orca_pb2

from ..conftest import eventually
from .front import front_of
from .handlers import NAME, toy


async def counting(request: dict[str, Any]) -> Any:
    for number in range(request["stop_conditions"]["max_tokens"]):
        yield number


def loaded(trailers: Any) -> orca_pb2.OrcaLoadReport:
    return orca_pb2.OrcaLoadReport.FromString(dict(tuple(trailers))[LOAD_KEY])


def ask(max_tokens: int) -> Any:
    return inference_pb2.PreprocessedRequest(token_ids=[5], stop_conditions={"max_tokens": max_tokens})


async def test_the_load_comes_with_each_answer_and_by_itself(mesh: Mesh) -> None:
    runtime = await mesh.serve(NAME, counting, toy(), max_concurrent=4)
    async with front_of(mesh, grpc_port=0, max_requests=8) as front:
        await eventually(front.frontend.catalog.ready)
        for port, fullness in ((runtime.server.port, 0.25), (front.frontend.ingress.port, 0.125)):
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub: Any = inference_pb2_grpc.InferenceStub(channel)
                call = stub.Generate(ask(3))
                assert [output async for output in call]
                report = loaded(await call.trailing_metadata())
                assert (report.application_utilization, report.named_metrics["num_running"]) == (fullness, 1)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.GenerateOnce(ask(0))
                assert loaded(caught.value.trailing_metadata()).named_metrics["num_running"] == 1
                stream = channel.unary_stream(
                    f"/{SERVICE}/StreamCoreMetrics",
                    orca_pb2.OrcaLoadReportRequest.SerializeToString,
                    orca_pb2.OrcaLoadReport.FromString,
                )(orca_pb2.OrcaLoadReportRequest())
                told = await stream.read()
                assert told.rps_fractional > 0
                assert told.eps > 0
                assert told.application_utilization == 0
                stream.cancel()


async def test_every_error_has_details(mesh: Mesh) -> None:
    runtime = await mesh.serve(NAME, counting, toy())
    async with front_of(mesh, grpc_port=0) as front:
        for port in (runtime.server.port, front.frontend.ingress.port):
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                control: Any = control_pb2_grpc.ControlStub(channel)
                inference: Any = inference_pb2_grpc.InferenceStub(channel)
                calls = [
                    control.ListLoras(control_pb2.ListLorasRequest()),
                    control.LoadLora(control_pb2.LoadLoraRequest()),
                    control.SubscribeKvEvents(control_pb2.SubscribeKvEventsRequest()),
                    control.GetFile(control_pb2.GetFileRequest(sha256="x")),
                    inference.Deliver(inference_pb2.DeliverRequest()),
                    inference.Generate(ask(0)),
                    inference.Embed(inference_pb2.EmbedRequest()),
                ]
                for call in calls:
                    assert await call.code() is not grpc.StatusCode.OK
                    assert "grpc-status-details-bin" in dict(tuple(await call.trailing_metadata()))


async def test_channelz_at_the_admin_port(mesh: Mesh) -> None:
    from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc

    await mesh.serve(NAME, counting, toy())
    async with open_admin_port(0) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = channelz_pb2_grpc.ChannelzStub(channel)
        async with asyncio.timeout(5):
            servers = (await stub.GetServers(channelz_pb2.GetServersRequest())).server
        assert len(servers) >= 2
        with pytest.raises(ConfigurationError, match="the port is taken"):
            async with open_admin_port(port):
                pass
    async with open_admin_port(None) as none:
        assert none is None
