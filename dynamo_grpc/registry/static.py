"""A registry without a server: addresses that are given, and asked (Control.Describe) what they serve.

The list is a flag: `HOST:PORT`, `@FILE` (one address a line, read again when it changes) and `dns:NAME:PORT` (resolved
again), as many as there are, with commas between. A worker is listed while it answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import grpc

from dynamo_grpc.connections import CHANNEL_OPTIONS
from dynamo_grpc.errors import ConfigurationError, InvalidNameError
from dynamo_grpc.names import check_address
from dynamo_grpc.records import to_entries
from dynamo_grpc.registry.base import Change, Entry, Registration, Registry, Renew
from dynamo_grpc.registry.outages import Activity
from dynamo_grpc.v1 import control_pb2, control_pb2_grpc

logger = logging.getLogger(__name__)

_POLL_S = 0.5
_ANSWER_S = 2.0


class StaticRegistry(Registry):
    """Workers at known addresses.

    Args:
        spec: `HOST:PORT`, `@FILE` and `dns:NAME:PORT`, with commas between.

    Raises:
        ConfigurationError: spec has something else.
    """

    def __init__(self, spec: str) -> None:
        super().__init__()
        self._sources = [_Source(part, self.outages.activity(part)) for part in _split(spec)]
        self.description = "static list: " + (", ".join(source.description for source in self._sources) or "nobody")

    async def register(self, values: Mapping[str, bytes], renew: Renew | None = None) -> StaticRegistration:
        return StaticRegistration()

    async def watch(self, prefix: str) -> AsyncIterator[Change]:
        async with contextlib.aclosing(_Poller(self._sources)) as poller:
            known: dict[str, bytes] | None = None
            while True:
                now = {key: value for key, value in (await poller.ask_all()).items() if key.startswith(prefix)}
                if known is None:
                    yield Change(tuple(Entry(k, v, 0) for k, v in now.items()), is_snapshot=True)
                elif now != known:
                    puts = tuple(Entry(k, v, 0) for k, v in now.items() if known.get(k) != v)
                    yield Change(puts, tuple(known.keys() - now.keys()))
                known = now
                await asyncio.sleep(_POLL_S)

    async def close(self) -> None:
        """Nothing is open but in watches."""


def _split(spec: str) -> list[str]:
    return [part.strip() for part in spec.split(",") if part.strip()]


class _Source:
    """A part of the list: an address, a file or a name; when it can't be read, what it gave before holds."""

    def __init__(self, spec: str, activity: Activity) -> None:
        self._spec, self._activity = spec, activity
        self._addresses: list[str] = []
        self._lookup: asyncio.Future[list[Any]] | None = None
        if spec.startswith("@"):
            if not Path(spec[1:]).is_file():
                raise ConfigurationError(f"there is no file {spec[1:]!r} with addresses of workers")
            self.description = f"the file {spec[1:]}"
            activity.name = f"reading {spec[1:]}"
        elif spec.startswith("dns:"):
            self._name, _, self._port = spec.removeprefix("dns:").rpartition(":")
            if not self._name or not self._port.isdigit():
                raise ConfigurationError(f"{spec!r} should be dns:NAME:PORT")
            self.description = f"what DNS has for {self._name}, port {self._port}"
            activity.name = f"resolving {self._name}"
        else:
            self._addresses = parse_addresses([spec])
            self.description = spec

    async def addresses(self) -> list[str]:
        """What it gives now."""
        try:
            if self._spec.startswith("@"):
                text = await asyncio.to_thread(Path(self._spec[1:]).read_text, encoding="utf-8")
                self._addresses = parse_addresses(text.splitlines())
            elif self._spec.startswith("dns:"):
                self._addresses = await self._resolve()
            self._activity.works()
        except (
            OSError,
            ValueError,
            ConfigurationError,
        ) as error:  # a file that is being replaced, a typo, a resolver that is away
            self._activity.failed(error)
        return self._addresses

    async def _resolve(self) -> list[str]:
        """What DNS has; a look-up that hangs is waited for in the next turn again, so that there is one at most."""
        if self._lookup is None:
            loop = asyncio.get_running_loop()
            look = loop.getaddrinfo(self._name, int(self._port), type=socket.SOCK_STREAM)
            self._lookup = asyncio.ensure_future(look)
        done, _ = await asyncio.wait((self._lookup,), timeout=_ANSWER_S)
        if not done:
            raise TimeoutError(f"no answer within {_ANSWER_S:g} s")
        lookup, self._lookup = self._lookup, None
        hosts = {str(address[4][0]) for address in lookup.result()}
        return sorted(f"[{h}]:{self._port}" if ":" in h else f"{h}:{self._port}" for h in hosts)


class _Poller:
    """Asks all addresses what they serve. Each watch has its own: closing a channel ends the calls on it."""

    def __init__(self, sources: list[_Source]) -> None:
        self._sources = sources
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._answers: dict[str, dict[str, bytes]] = {}
        self._told: dict[str, str] = {}

    async def aclose(self) -> None:
        """Close the channels."""
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()

    def _tell(self, address: str, message: str, kind: str = "") -> None:
        """Log what changed, once: again only when it is of another kind."""
        if self._told.get(address) != (kind or message):
            self._told[address] = kind or message
            logger.warning("static list: %s: %s", address, message)

    async def ask_all(self) -> dict[str, bytes]:
        """The registry entries of all addresses that answer."""
        lists = await asyncio.gather(*(source.addresses() for source in self._sources))
        addresses = list(dict.fromkeys(address for part in lists for address in part))
        for gone in self._channels.keys() - set(addresses):
            self._answers.pop(gone, None)
            await self._channels.pop(gone).close()
        for address in addresses:
            if address not in self._channels:
                self._channels[address] = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        await asyncio.gather(*(self._ask(address) for address in addresses))
        return {key: value for address in addresses for key, value in self._answers.get(address, {}).items()}

    async def _ask(self, address: str) -> None:
        """Take over what a worker says of itself; one that is only slow is taken at its last word."""
        stub = control_pb2_grpc.ControlStub(self._channels[address])
        try:
            answer = await stub.Describe(control_pb2.DescribeRequest(), timeout=_ANSWER_S)
        except grpc.aio.AioRpcError as error:
            code = error.code()
            self._tell(address, f"does not say what it serves: {code.name}: {error.details()}", code.name)
            if code is not grpc.StatusCode.DEADLINE_EXCEEDED:
                self._answers.pop(address, None)
            return
        if answer.state != control_pb2.WORKER_STATE_READY:
            self._answers.pop(address, None)
            hint = "; a worker without a registry is started with --discovery-backend static"
            starting = answer.state == control_pb2.WORKER_STATE_STARTING
            self._tell(address, f"answers, and is not ready{hint if starting else ''}")
            return
        cards = {card.checksum: card for card in answer.cards}
        entries: dict[str, bytes] = {}
        problem = ""
        for instance in answer.instances:
            instance.address = address  # the list knows how to reach it from here
            try:
                entries |= to_entries(instance, cards.get(instance.card_checksum))
            except InvalidNameError as error:
                problem = f"serves something that can't be listed: {error.message}"
        self._answers[address] = entries
        if problem:
            self._tell(address, problem)
        else:
            self._told.pop(address, None)


class StaticRegistration(Registration):
    """Nothing to do: others find this process by its address."""

    async def wait_registered(self) -> None:
        """At once."""

    async def update(self, values: Mapping[str, bytes]) -> None:
        """Nothing is stored."""

    async def close(self) -> None:
        """Nothing is stored."""

    async def orphan(self) -> None:
        """Nothing is stored."""


def parse_addresses(lines: list[str]) -> list[str]:
    """host:port entries; blank ones and comments (#) are left out.

    Raises:
        ConfigurationError: an entry is no host:port.
    """
    addresses = [line.split("#")[0].strip() for line in lines]
    for address in filter(None, addresses):
        try:
            check_address(address)
        except ValueError as error:
            raise ConfigurationError(str(error)) from None
    return list(dict.fromkeys(filter(None, addresses)))
