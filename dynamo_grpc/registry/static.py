"""A registry without a server: addresses that are given, and asked (Control.Describe) what they serve.

The list comes from a flag (`host:port,…`), a file that is read again when it changes (`@FILE`, one address a line), or
a DNS name that is resolved again (`dns:NAME:PORT`). A worker is listed while it answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import grpc

from dynamo_grpc.connections import CHANNEL_OPTIONS
from dynamo_grpc.errors import ConfigurationError
from dynamo_grpc.records import to_entries
from dynamo_grpc.registry.base import Change, Entry, Registration, Registry, Renew
from dynamo_grpc.v1 import control_pb2, control_pb2_grpc

logger = logging.getLogger(__name__)

_POLL_S = 0.5
_ANSWER_S = 2.0


class StaticRegistry(Registry):
    """Workers at known addresses.

    Args:
        spec: `host:port,host:port`, `@FILE` or `dns:NAME:PORT`.

    Raises:
        ConfigurationError: spec is none of these.
    """

    def __init__(self, spec: str) -> None:
        self._spec = spec
        self.description = f"static list {spec}"
        if spec.startswith("@") and not Path(spec[1:]).is_file():
            raise ConfigurationError(f"there is no file {spec[1:]!r} with addresses of workers")
        if not spec.startswith(("@", "dns:")):
            parse_addresses(spec.split(","))
        elif spec.startswith("dns:") and not spec.rpartition(":")[2].isdigit():
            raise ConfigurationError(f"{spec!r} should be dns:NAME:PORT")

    async def register(self, values: Mapping[str, bytes], renew: Renew | None = None) -> StaticRegistration:
        return StaticRegistration()

    async def watch(self, prefix: str) -> AsyncIterator[Change]:
        async with contextlib.aclosing(_Poller(self._spec)) as poller:
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


class _Poller:
    """Asks all addresses what they serve. Each watch has its own: closing a channel ends the calls on it."""

    def __init__(self, spec: str) -> None:
        self._spec = spec
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._told: dict[str, str] = {}

    async def aclose(self) -> None:
        """Close the channels."""
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()

    async def _addresses(self) -> list[str]:
        try:
            if self._spec.startswith("@"):
                return parse_addresses(Path(self._spec[1:]).read_text(encoding="utf-8").splitlines())
            if self._spec.startswith("dns:"):
                _, name, port = self._spec.split(":")
                found = await asyncio.get_running_loop().getaddrinfo(name, int(port), type=socket.SOCK_STREAM)
                return sorted({f"[{a[4][0]}]:{port}" if ":" in str(a[4][0]) else f"{a[4][0]}:{port}" for a in found})
        except (OSError, ValueError) as error:
            # a file that is being replaced, a typo, a resolver that is away: go on with what was there
            self._tell(self._spec, str(error))
            return list(self._channels)
        return parse_addresses(self._spec.split(","))

    def _tell(self, about: str, message: str, kind: str = "") -> None:
        """Log what changed, once: again only when it is of another kind."""
        if self._told.get(about) != (kind or message):
            self._told[about] = kind or message
            logger.warning("static list: %s: %s", about, message)

    async def ask_all(self) -> dict[str, bytes]:
        """The registry entries of all addresses that answer."""
        addresses = await self._addresses()
        for gone in self._channels.keys() - set(addresses):
            await self._channels.pop(gone).close()
        for address in addresses:
            if address not in self._channels:
                self._channels[address] = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        answers = await asyncio.gather(*(self._ask(address) for address in addresses))
        return {key: value for answer in answers for key, value in answer.items()}

    async def _ask(self, address: str) -> dict[str, bytes]:
        stub = control_pb2_grpc.ControlStub(self._channels[address])
        entries: dict[str, bytes] = {}
        try:
            answer = await stub.Describe(control_pb2.DescribeRequest(), timeout=_ANSWER_S)
        except grpc.aio.AioRpcError as error:
            code = error.code().name
            self._tell(address, f"does not say what it serves: {code}: {error.details()}", code)
            return entries
        if answer.state != control_pb2.WORKER_STATE_READY:
            hint = "; a worker without a registry is started with --discovery-backend static"
            starting = answer.state == control_pb2.WORKER_STATE_STARTING
            self._tell(address, f"answers, and is not ready{hint if starting else ''}")
            return entries
        self._told.pop(address, None)
        cards = {card.checksum: card for card in answer.cards}
        for instance in answer.instances:
            instance.address = address  # the list knows how to reach it from here
            entries |= to_entries(instance, cards.get(instance.card_checksum))
        return entries


class StaticRegistration(Registration):
    """Nothing to do: others find this process by its address."""

    async def wait_registered(self) -> None:
        """At once."""

    async def update(self, values: Mapping[str, bytes]) -> None:
        """Nothing is stored."""

    async def close(self) -> None:
        """Nothing is stored."""


def parse_addresses(lines: list[str]) -> list[str]:
    """host:port entries; blank ones and comments (#) are left out.

    Raises:
        ConfigurationError: an entry is no host:port.
    """
    addresses = [line.split("#")[0].strip() for line in lines]
    for address in filter(None, addresses):
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigurationError(f"{address!r} should be HOST:PORT")
    return list(dict.fromkeys(filter(None, addresses)))
