"""The pieces of an answer onto its writer: as events as they come, or as one body."""

from __future__ import annotations

from collections.abc import Callable

from dynamo_frontend.answer import Writer
from dynamo_frontend.relay import Piece, Relays, collect, join
from dynamo_frontend.schemas import StreamOptions
from dynamo_frontend.shapes import Shape
from dynamo_grpc import MeshError
from dynamo_grpc.errors import Retry

#: How often a whole answer is begun.
_WHOLE_ATTEMPTS = 3


async def stream(writer: Writer, relay: Relays, shape: Shape, begin: bytes, options: StreamOptions) -> None:
    """As events, as they come.

    Args:
        begin: what stands before the first one.
    """

    def show(pieces: list[Piece]) -> bool:
        nonlocal begin
        if options.merge_events and len(pieces) > 1:
            pieces = join(pieces)
        if options.continuous_usage_stats:
            events = begin + b"".join([shape.with_usage(shape.event(piece), relay.usage_so_far) for piece in pieces])
        else:
            events = begin + b"".join([shape.event(piece) for piece in pieces])
        begin = b""
        return not events or writer.add(events)

    await relay.run(show, writer.flush)
    await writer.end(begin + shape.end(relay.usage, relay.num_migrations))


async def whole(make_relays: Callable[[], Relays], on_again: Callable[[], None]) -> list[Piece]:
    """A whole answer. Nothing of it was sent yet, so a worker that is lost in the middle costs only time.

    Args:
        on_again: called when it is begun again.
    """
    for attempt in range(1, _WHOLE_ATTEMPTS + 1):
        relay = make_relays()
        try:
            return await collect(relay)
        except MeshError as error:
            if error.retry is not Retry.MIGRATE or relay.num_migrations or attempt == _WHOLE_ATTEMPTS:
                raise
            if not relay.has_output:
                raise  # it was tried elsewhere already
            on_again()
    raise AssertionError("the last attempt returns or raises")
