"""The admin port: channelz, which shows a process's connections, calls and sockets (`grpcdebug`, `grpcurl`).

On loopback alone, whatever the server listens on: it tells who talks to whom.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator

import grpc

from dynamo_grpc import health
from dynamo_grpc.errors import ConfigurationError

logger = logging.getLogger(__name__)

_CHANNELZ = "grpc.channelz.v1.Channelz"


@contextlib.asynccontextmanager
async def open_admin_port(port: int | None) -> AsyncIterator[int | None]:
    """Answer on `port` (0: a free one; None: not at all) while inside; gives the port.

    Raises:
        ConfigurationError: it is taken, or grpcio-channelz is missing.
    """
    if port is None:
        yield None
        return
    try:
        from grpc_channelz.v1 import channelz
    except ImportError:
        raise ConfigurationError("the admin port needs grpcio-channelz: pip install 'dynamo-grpc[admin]'") from None
    from dynamo_grpc.server import bind

    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    channelz.add_channelz_servicer(server)
    health.add_reflection(server, [_CHANNELZ])
    port = bind(server, "127.0.0.1", port)
    await server.start()
    logger.info("admin port %d: channelz", port)
    try:
        yield port
    finally:
        await server.stop(None)
