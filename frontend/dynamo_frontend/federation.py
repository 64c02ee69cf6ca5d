"""The metrics of all workers at one address: asked for by Control.GetMetrics, and put together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence

import grpc

from dynamo_grpc.connections import Connection
from dynamo_grpc.v1 import control_pb2

logger = logging.getLogger(__name__)

#: A worker may take so long; so many are asked at once.
_LIMIT_S, _MAX_AT_ONCE = 3.0, 64


async def ask_all(connections: Iterable[Connection]) -> list[str]:
    """What each of the workers tells; nothing of one that doesn't answer in time, or knows no such question."""
    at_once = asyncio.Semaphore(_MAX_AT_ONCE)

    async def ask(connection: Connection) -> str:
        try:
            async with at_once:
                request = control_pb2.GetMetricsRequest()
                return str((await connection.control.GetMetrics(request, timeout=_LIMIT_S)).text)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                logger.warning("worker %s doesn't tell its metrics: %s", connection.address, error.details())
            return ""

    return await asyncio.gather(*map(ask, connections))


def merge(texts: Sequence[str]) -> str:
    """Pages in Prometheus' text format as one: a family that several of them have stands once.

    Of a family that is of different types, the first one's is kept.
    """
    kinds: dict[str, str] = {}
    samples: dict[str, list[str]] = {}
    heads: dict[str, str] = {}
    for text in texts:
        name, head, is_kept = "", "", True
        for line in text.splitlines():
            if line.startswith("# HELP "):
                head = line
            elif line.startswith("# TYPE "):
                _, _, name, kind = line.split(" ", 3)
                is_kept = kinds.setdefault(name, kind) == kind
                heads.setdefault(name, f"{head}\n{line}")
                samples.setdefault(name, [])
            elif line and not line.startswith("#") and name and is_kept:
                samples[name].append(line)
    return "".join(f"{heads[name]}\n" + "".join(f"{line}\n" for line in lines) for name, lines in samples.items())
