"""The metrics of all workers at one address: asked for by Control.GetMetrics, and put together."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import grpc

from dynamo_grpc.connections import Connection
from dynamo_grpc.v1 import control_pb2

logger = logging.getLogger(__name__)

#: A worker may take so long; so many are asked at once.
_LIMIT_S, _MAX_AT_ONCE = 3.0, 64
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")


async def ask_all(open_connections: Callable[[], AbstractContextManager[list[Connection]]]) -> list[str]:
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

    with open_connections() as connections:
        return await asyncio.gather(*map(ask, connections))


def merge(texts: Sequence[str]) -> str:
    """Pages in Prometheus' text format as one: a family that several of them have stands once.

    Of a family that is of different types, the first one's is kept.
    """
    kinds: dict[str, str] = {}
    samples: dict[str, list[str]] = {}
    heads: dict[str, str] = {}
    for text in texts:
        name, is_kept, told = "", True, {}
        for line in text.split("\n"):  # a label's value may hold other ends of lines
            if line.startswith("# HELP "):
                told[line.split(" ", 3)[2]] = f"{line}\n"
            elif line.startswith("# TYPE "):
                _, _, name, kind = line.split(" ", 3)
                is_kept = kinds.setdefault(name, kind) == kind
                heads.setdefault(name, f"{told.get(name, '')}{line}\n")
                samples.setdefault(name, [])
            elif line and not line.startswith("#"):
                found = _NAME.match(line)
                if found is None or not name or not found[0].startswith(name):  # it has no type
                    name, is_kept = (found[0] if found else ""), found is not None and found[0] not in heads
                    samples.setdefault(name, [])
                if is_kept:
                    samples[name].append(line)
    return "".join(heads.get(name, "") + "".join(f"{line}\n" for line in lines) for name, lines in samples.items())
