"""The Control service: what a worker tells of itself, and is told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_grpc.errors import FileNotKnownError, UnsupportedError
from dynamo_grpc.lifecycle import State
from dynamo_grpc.status import abort
from dynamo_grpc.v1 import control_pb2, control_pb2_grpc

if TYPE_CHECKING:
    from dynamo_grpc.server import Server

logger = logging.getLogger(__name__)

#: What an engine says of itself: WatchLoadResponse's num_used_blocks, num_total_blocks and num_prefill_tokens.
Load = Mapping[str, int]

_NO_LORA = "this worker has no adapters"
_PIECE_BYTES = 256 * 1024


def _read(path: Path | None) -> bytes | None:
    try:
        return path.read_bytes() if path else None
    except OSError:
        logger.exception("a file of a model card is gone")
        return None


class ControlServicer(control_pb2_grpc.ControlServicer):
    """Control over a server. KV events and LoRA are UNIMPLEMENTED."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def Describe(self, request: control_pb2.DescribeRequest, context: Any) -> control_pb2.DescribeResponse:  # type: ignore[override]
        server = self._server
        served, state = list(server.served.values()), server.lifecycle.state
        if server.is_leaving and state is State.READY:
            state = State.DRAINING
        response = control_pb2.DescribeResponse(
            instances=[s.instance for s in served],
            cards=[s.card for s in served if s.card],
            state=state.value,
            num_requests=len(server.requests),
            reason=next((s.why_not for s in served if s.why_not), ""),
        )
        response.measured_at.GetCurrentTime()
        if (registry := server.registry) is not None:
            response.registry.description = registry.description
            response.registry.problem = registry.problem
            if registry.unreachable_since is not None:
                response.registry.unreachable_since.FromMilliseconds(int(registry.unreachable_since * 1000))
        return response

    async def GetFile(self, request: control_pb2.GetFileRequest, context: Any) -> None:  # type: ignore[override]
        path = next((s.files[request.sha256] for s in self._server.served.values() if request.sha256 in s.files), None)
        data = await asyncio.to_thread(_read, path)
        if data is None:
            text = f"no file with SHA-256 {request.sha256!r} belongs to a model card of this worker"
            await abort(context, FileNotKnownError(text))
        for start in range(0, max(1, len(data)), _PIECE_BYTES):
            await context.write(control_pb2.GetFileResponse(data=data[start : start + _PIECE_BYTES]))

    async def WatchLoad(self, request: control_pb2.WatchLoadRequest, context: Any) -> None:  # type: ignore[override]
        interval_s = request.min_interval.ToNanoseconds() / 1e9 if request.HasField("min_interval") else 1.0
        last: control_pb2.WatchLoadResponse | None = None
        while self._server.lifecycle.state is not State.STOPPED:
            if (now := self._load()) != last:
                last = now
                response = control_pb2.WatchLoadResponse()
                response.CopyFrom(now)
                response.measured_at.GetCurrentTime()
                await context.write(response)
            await asyncio.sleep(max(0.01, interval_s))

    def _load(self) -> control_pb2.WatchLoadResponse:
        server = self._server
        load = control_pb2.WatchLoadResponse(state=server.lifecycle.state.value)
        load.num_waiting = sum(served.admission.num_waiting for served in server.served.values())
        load.num_running = max(0, len(server.requests) - load.num_waiting)
        for served in server.served.values():
            if served.load is None:
                continue
            try:
                for name, value in served.load().items():
                    setattr(load, name, value)
            except Exception:
                served.load = None
                logger.exception(
                    "what endpoint %s says of its load can't be used, and is not asked for again", served.name
                )
        return load

    async def GetMetrics(self, request: Any, context: Any) -> control_pb2.GetMetricsResponse:
        metrics = self._server.metrics
        text = await asyncio.to_thread(metrics.text) if metrics is not None else b""
        return control_pb2.GetMetricsResponse(text=text.decode())

    async def Stop(self, request: control_pb2.StopRequest, context: Any) -> control_pb2.StopResponse:  # type: ignore[override]
        return control_pb2.StopResponse(found=self._server.requests.stop(request.request_id))

    async def SubscribeKvEvents(self, request: Any, context: Any) -> None:  # type: ignore[override]
        await abort(context, UnsupportedError("this worker publishes no KV events"))

    async def LoadLora(self, request: Any, context: Any) -> Any:
        await abort(context, UnsupportedError(_NO_LORA))

    async def UnloadLora(self, request: Any, context: Any) -> Any:
        await abort(context, UnsupportedError(_NO_LORA))

    async def ListLoras(self, request: Any, context: Any) -> Any:
        await abort(context, UnsupportedError(_NO_LORA))

    async def Drain(self, request: control_pb2.DrainRequest, context: Any) -> control_pb2.DrainResponse:  # type: ignore[override]
        limit_s = request.limit.ToNanoseconds() / 1e9 if request.HasField("limit") else None
        if self._server.on_drain is None:
            await abort(context, UnsupportedError("this server is not drained from outside"))
        self._server.on_drain(limit_s)
        return control_pb2.DrainResponse(num_requests=len(self._server.requests))
