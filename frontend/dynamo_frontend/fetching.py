"""Fetching what clients name by URL, from public addresses alone: clients must not reach what only this machine can.

The address is looked up once and connected to as it was checked, for each hop of a redirect too, so that a name can't
change between the check and the connection. httpcore, because it lets one say who connects.
"""

from __future__ import annotations

import asyncio
import fnmatch
import ipaddress
import socket
import urllib.parse
from collections.abc import Iterable, Sequence
from typing import Any

import httpcore

from dynamo_grpc import InvalidRequestError

_MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
#: So many are fetched at once.
_MAX_AT_ONCE = 32
#: Pieces of fewer bytes wait for each other.
_SMALL = 512


class _RefusedError(Exception):
    """Why a URL isn't fetched; its text is for the client."""


class _Public(httpcore.AsyncNetworkBackend):
    """Connects to public addresses, and to hosts that were named."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._backend = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [entry[4][0] for entry in found]
        if not self._hosts and not all(map(_is_public, addresses)):
            raise _RefusedError(f"{host} has an address that is not public")
        return await self._backend.connect_tcp(str(addresses[0]), port, timeout, local_address, socket_options)

    async def connect_unix_socket(self, *args: Any, **options: Any) -> httpcore.AsyncNetworkStream:
        raise _RefusedError("sockets are not asked")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


#: Networks that `ipaddress` takes for public though they lead inside, or nowhere.
_NOT_PUBLIC = [
    ipaddress.ip_network(text)
    for text in ("192.0.0.0/24", "192.88.99.0/24", "::/96", "::ffff:0:0:0/96", "64:ff9b:1::/48", "fec0::/10")
]
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # addresses of IPv4 within IPv6


def _is_public(address: Any) -> bool:
    found = ipaddress.ip_address(str(address).partition("%")[0])
    found = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None) or found
    if found in _NAT64:
        found = ipaddress.ip_address(int(found) & 0xFFFFFFFF)
    inside = any(found in network for network in _NOT_PUBLIC if network.version == found.version)
    return found.is_global and not found.is_multicast and not inside


def _ascii(url: str) -> str:
    """A URL as it is sent: other characters as browsers write them.

    Raises:
        ValueError: it is none.
    """
    parts = urllib.parse.urlsplit(url)
    host = (
        (parts.hostname or "").encode("idna").decode() if ":" not in (parts.hostname or "") else f"[{parts.hostname}]"
    )
    user = parts.netloc.rpartition("@")[0]
    netloc = (f"{user}@" if user else "") + host + (f":{parts.port}" if parts.port is not None else "")
    path, query = (urllib.parse.quote(part, safe="/%:@!$&'()*+,;=~?-._") for part in (parts.path, parts.query))
    return urllib.parse.urlunsplit((parts.scheme, netloc, path, query, ""))


class Fetcher:
    """Fetches.

    Args:
        hosts: that may be asked, with wildcards, whatever their addresses; empty means all that are public.
        max_bytes: of one.
        timeout_s: for one, with its redirects.
    """

    def __init__(self, hosts: Sequence[str], max_bytes: int, timeout_s: float) -> None:
        self._hosts, self._max_bytes, self._timeout_s = hosts, max_bytes, timeout_s
        self._at_once = asyncio.Semaphore(_MAX_AT_ONCE)

    async def fetch(self, url: str, max_bytes: int) -> tuple[bytes, str]:
        """The bytes at a URL, and their media type; empty if it isn't told.

        Raises:
            InvalidRequestError: it isn't fetched; says why.
        """
        host = "the url"
        try:
            host = urllib.parse.urlsplit(url).hostname or host
            async with asyncio.timeout(self._timeout_s), self._at_once:
                async with httpcore.AsyncConnectionPool(network_backend=_Public(self._hosts)) as pool:
                    return await self._follow(pool, url, min(max_bytes, self._max_bytes))
        except TimeoutError:
            reason = f"it took longer than {self._timeout_s:g} s"
        except _RefusedError as error:
            reason = str(error)
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise InvalidRequestError(f"{host} gave nothing: {reason[:300]}")

    async def _follow(self, pool: httpcore.AsyncConnectionPool, url: str, max_bytes: int) -> tuple[bytes, str]:
        for _ in range(_MAX_REDIRECTS + 1):
            url = _ascii(url)
            self._check(url)
            async with pool.stream("GET", url, headers={"accept": "*/*", "user-agent": "dynamo-grpc"}) as answer:
                headers = {key.lower(): value for key, value in answer.headers}
                if answer.status in _REDIRECTS and b"location" in headers:
                    url = urllib.parse.urljoin(url, headers[b"location"].decode("latin-1"))
                    continue
                if answer.status != 200:
                    raise _RefusedError(f"it answered {answer.status}")
                declared = headers.get(b"content-length", b"")
                if declared.isdigit() and int(declared) > max_bytes:
                    raise _RefusedError(f"it has more than {max_bytes} bytes")
                pieces, size = [], 0
                async for piece in answer.aiter_stream():
                    size += len(piece)
                    if size > max_bytes:
                        raise _RefusedError(f"it has more than {max_bytes} bytes")
                    pieces.append(piece)
                    if len(piece) < _SMALL:  # so that a server that drips doesn't keep the loop busy
                        await asyncio.sleep(0.001)
                kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
                return b"".join(pieces), kind
        raise _RefusedError(f"it leads on more than {_MAX_REDIRECTS} times")

    def _check(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise _RefusedError("it leads to no http:// or https://")
        if parts.username or parts.password:
            raise _RefusedError("a url has no user and no password here")
        if self._hosts and not any(fnmatch.fnmatchcase(parts.hostname, pattern) for pattern in self._hosts):
            raise _RefusedError(f"{parts.hostname} is none of the hosts that may be asked (--media-hosts)")
