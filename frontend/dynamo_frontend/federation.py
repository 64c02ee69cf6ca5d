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
#: A page has so many characters at most.
_MAX_CHARS = 4 * 1024 * 1024
#: So many workers whose pages are wrong are named in the log.
_MAX_TOLD = 1_000
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_SAMPLE = re.compile(
    r"[a-zA-Z_:][a-zA-Z0-9_:]*"
    r'(?:\{(?:[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\.)*",?)*\})?'
    r"[ \t]+(?:[+-]?(?:[0-9]+\.?[0-9]*(?:[eE][+-]?[0-9]+)?|\.[0-9]+(?:[eE][+-]?[0-9]+)?|[iI]nf)|[nN]a[nN])"
    r"(?:[ \t]+-?[0-9]+)?[ \t]*"
)
_TYPE = re.compile(r"# TYPE [a-zA-Z_:][a-zA-Z0-9_:]* (?:counter|gauge|histogram|summary|untyped|unknown|info|stateset)")
_HELP = re.compile(r"# HELP [a-zA-Z_:][a-zA-Z0-9_:]*(?: .*)?")


class Federation:
    """Asks the workers.

    Args:
        count: told of each page that can't be told, and why.
    """

    def __init__(self, count: Callable[[str], None]) -> None:
        self._count = count
        self._told: dict[str, str] = {}

    async def ask_all(self, open_connections: Callable[[], AbstractContextManager[list[Connection]]]) -> list[str]:
        """What each of the workers tells; nothing of one that doesn't answer in time, or knows no such question, or
        whose page would make all of it unreadable.
        """
        at_once = asyncio.Semaphore(_MAX_AT_ONCE)

        async def ask(connection: Connection) -> str:
            try:
                async with at_once:
                    request = control_pb2.GetMetricsRequest()
                    text = str((await connection.control.GetMetrics(request, timeout=_LIMIT_S)).text)
                    wrong = await asyncio.to_thread(wrong_line, text)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                    self._failed(connection.address, "unavailable", error.details() or error.code().name.lower())
                return ""
            if wrong is not None:
                self._failed(connection.address, "format", f"its page has {wrong[:100]!r}")
                return ""
            self._told.pop(connection.address, None)
            return text

        with open_connections() as connections:
            return await asyncio.gather(*map(ask, connections))

    def _failed(self, address: str, why: str, text: str) -> None:
        """Count it, and name the worker once."""
        self._count(why)
        if self._told.get(address) != text and len(self._told) < _MAX_TOLD:
            self._told[address] = text
            logger.warning("worker %s doesn't tell its metrics: %s", address, text)


def wrong_line(text: str) -> str | None:
    """A line of a page that isn't in Prometheus' text format; None if there is none."""
    if len(text) > _MAX_CHARS:
        return f"more than {_MAX_CHARS} characters"
    for line in text.split("\n"):
        if line.startswith("# TYPE "):
            is_right = _TYPE.fullmatch(line)
        elif line.startswith("# HELP "):
            is_right = _HELP.fullmatch(line)
        elif not line or line.startswith("#"):
            continue
        else:
            is_right = _SAMPLE.fullmatch(line)
        if not is_right:
            return line
    return None


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
