"""What a server tells balancers of its load: Envoy, and gRPC's own weighted round robin (gRFC A51, ORCA).

Each call's trailer carries a report, made at most ten times a second; OpenRcaService streams them out of band. The
package xds-protos has the messages' real names, and registers a hundred files for them: ours are equal on the wire.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import grpc

from dynamo_grpc.v1 import orca_pb2

#: What Envoy and gRPC read. gRPC's C library keeps it from the application: hence the second one.
ORCA_KEY = "endpoint-load-metrics-bin"
LOAD_KEY = "x-load-bin"

SERVICE = "xds.service.orca.v3.OpenRcaService"
#: A report holds for so long.
_FRESH_S = 0.1
#: Rates are those of the last so many seconds.
_WINDOW_S = 10
#: The least time between two reports of a stream, as gRPC's own implementations have it.
_LEAST_INTERVAL_S = 1.0


class LoadMeter:
    """Measures a server.

    Args:
        load: figures by name: num_running and num_waiting; and how full it is, from 0, if that can be said.
        clock: monotonic seconds.
        cpu_s: processor seconds used by the process.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Mapping[str, float], float | None]],
        clock: Callable[[], float] = time.monotonic,
        cpu_s: Callable[[], float] = time.process_time,
    ) -> None:
        self._load, self._clock, self._cpu_s = load, clock, cpu_s
        self._ended: dict[int, list[int]] = {}  # second -> requests, errors
        self._started = self._cpu_at = clock()
        self._cpu_used, self._cpu = cpu_s(), 0.0
        self._packed, self._packed_at = b"", float("-inf")

    def ended(self, *, failed: bool) -> None:
        """A request has ended."""
        counts = self._ended.get(second := int(self._clock()))
        if counts is None:
            counts = self._ended[second] = [0, 0]
            for old in [other for other in self._ended if other <= second - _WINDOW_S]:
                del self._ended[old]
        counts[0] += 1
        counts[1] += failed

    def trailers(self) -> tuple[tuple[str, bytes], ...]:
        """What a call ends with."""
        now = self._clock()
        if now - self._packed_at >= _FRESH_S:
            self._packed, self._packed_at = self.report().SerializeToString(), now
        return ((ORCA_KEY, self._packed), (LOAD_KEY, self._packed))

    def report(self) -> orca_pb2.OrcaLoadReport:
        """The load now."""
        now = self._clock()
        if now - self._cpu_at >= _FRESH_S:
            used = self._cpu_s()
            self._cpu = (used - self._cpu_used) / (now - self._cpu_at) / (os.cpu_count() or 1)
            self._cpu_used, self._cpu_at = used, now
        counted = [counts for second, counts in self._ended.items() if second > int(now) - _WINDOW_S]
        span_s = min(_WINDOW_S, max(1.0, now - self._started))
        named, fullness = self._load()
        return orca_pb2.OrcaLoadReport(
            cpu_utilization=self._cpu,
            rps_fractional=sum(counts[0] for counts in counted) / span_s,
            eps=sum(counts[1] for counts in counted) / span_s,
            named_metrics=named,
            application_utilization=fullness or 0.0,
        )


def add_open_rca(server: grpc.aio.Server, meter: LoadMeter) -> None:
    """Serve reports out of band, under the service's real name."""

    async def stream(request: orca_pb2.OrcaLoadReportRequest, context: Any) -> AsyncIterator[orca_pb2.OrcaLoadReport]:
        interval_s = max(_LEAST_INTERVAL_S, request.report_interval.ToNanoseconds() / 1e9)
        while True:
            yield meter.report()
            await asyncio.sleep(interval_s)

    method = grpc.unary_stream_rpc_method_handler(
        stream, orca_pb2.OrcaLoadReportRequest.FromString, orca_pb2.OrcaLoadReport.SerializeToString
    )
    handlers = grpc.method_handlers_generic_handler(SERVICE, {"StreamCoreMetrics": method})
    server.add_generic_rpc_handlers((handlers,))
