"""From what a handler yields to the vectors of an answer. Pure."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from typing import Any

from dynamo_grpc.errors import HandlerOutputError
from dynamo_grpc.v1 import inference_pb2 as pb

#: Values that are taken without a turn for others: some milliseconds.
_TURN_VALUES = 100_000


def _is_finite(vector: pb.Embedding) -> bool:
    return math.isfinite(sum(vector.values[:]))


class Vectors:
    """The vectors of one request, as they come.

    Args:
        handler_name: for messages to the handler's author.
        request: the answer has a vector for each of its inputs.
    """

    def __init__(self, handler_name: str, request: pb.EmbedRequest) -> None:
        self._handler_name, self._request = handler_name, request
        self._response = pb.EmbedResponse()

    async def feed(self, item: Any) -> None:
        """Take one item of the handler: an EmbedResponse, or vectors as rows of numbers (lists, a two-dimensional
        array) for the inputs that come next.

        Raises:
            HandlerOutputError: it is none of these.
        """
        if isinstance(item, pb.EmbedResponse):
            prompt_tokens = self._response.usage.prompt_tokens + item.usage.prompt_tokens
            self._response.MergeFrom(item)
            self._response.usage.prompt_tokens = prompt_tokens
            return
        if not isinstance(item, Iterable) or isinstance(item, (str, bytes)):
            raise self._wrong(f"{item!r:.80} ({type(item).__name__})")
        num_values = 0
        for row in item:
            # an array's numbers, one by one, would take ten times as long
            values = row.tolist() if hasattr(row, "tolist") else row
            try:
                added = self._response.embeddings.add(values=values)
            except (TypeError, ValueError, OverflowError) as error:
                raise self._wrong(f"{row!r:.80} as a vector ({error})") from None
            num_values += len(added.values)
            if num_values > _TURN_VALUES:
                num_values = 0
                await asyncio.sleep(0)

    def response(self) -> pb.EmbedResponse:
        """The answer, when the handler has ended; prompt tokens are counted where they can be.

        Raises:
            HandlerOutputError: there are not as many vectors as inputs, their lengths differ, or a value is no number.
        """
        response, wanted = self._response, len(self._request.inputs)
        if len(response.embeddings) != wanted:
            raise self._wrong(f"{len(response.embeddings)} vectors for {wanted} inputs")
        lengths = {len(vector.values) for vector in response.embeddings}
        if self._request.HasField("dimensions") and lengths != {self._request.dimensions}:
            raise self._wrong(f"vectors of length {min(lengths)}, {self._request.dimensions} were asked for")
        if len(lengths) != 1 or 0 in lengths:
            raise self._wrong(f"vectors of lengths {', '.join(map(str, sorted(lengths)))}")
        if not all(_is_finite(vector) for vector in response.embeddings):
            raise self._wrong("a vector with values that are no numbers")
        if not response.usage.prompt_tokens:
            response.usage.prompt_tokens = sum(len(one.token_ids) for one in self._request.inputs)
        return response

    def _wrong(self, what: str) -> HandlerOutputError:
        return HandlerOutputError(
            f"handler {self._handler_name} yielded {what}; for a request for embeddings it gives an EmbedResponse, or "
            "one vector (a row of numbers) for each input"
        )
