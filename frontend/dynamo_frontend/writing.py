"""The pieces of an answer onto its writer: as events as they come, or as one body."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from dynamo_frontend.answer import Writer
from dynamo_frontend.asking import Relays, collect
from dynamo_frontend.pieces import Piece, join
from dynamo_frontend.schemas import StreamOptions
from dynamo_frontend.shapes import Shape
from dynamo_grpc import MeshError
from dynamo_grpc.errors import Retry
from dynamo_grpc.v1 import inference_pb2 as pb

#: How often a whole answer is begun.
_WHOLE_ATTEMPTS = 3


async def stream(writer: Writer, relay: Relays, shape: Shape, begin: bytes, options: StreamOptions) -> None:
    """As events, as they come.

    Args:
        begin: what stands before the first one.
    """
    if options.continuous_usage_stats:
        begin = shape.with_usage(begin, relay.usage_so_far)

    def show(pieces: list[Piece]) -> bool:
        nonlocal begin
        if options.merge_events and len(pieces) > 1:
            pieces = join(pieces)
        if options.continuous_usage_stats:
            events = begin + b"".join(_with_usage(pieces, relay, shape))
        else:
            events = begin + b"".join([shape.event(piece) for piece in pieces])
        begin = b""
        return not events or writer.add(events)

    await relay.run(show, writer.flush)
    await writer.end(begin + shape.end(relay.usage, relay.num_migrations))


def _with_usage(pieces: list[Piece], relay: Relays, shape: Shape) -> Iterator[bytes]:
    """The events of pieces, each with the usage up to it."""
    usage = pb.Usage()
    usage.CopyFrom(relay.usage_so_far)
    usage.completion_tokens -= sum(len(piece.token_ids) - piece.num_prompt for piece in pieces)
    for piece in pieces:
        usage.completion_tokens += len(piece.token_ids) - piece.num_prompt
        yield shape.with_usage(shape.event(piece), usage)


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
