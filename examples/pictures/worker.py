"""A worker that is given pictures, as bytes, and says how large each is: needs Pillow."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator

from PIL import Image

from dynamo_grpc import Context, ModelInput, ModelType, Worker, run
from dynamo_grpc.v1.inference_pb2 import PreprocessedRequest


class Pictures(Worker):
    """Answers with the width, height and format of each picture."""

    model_name = "pictures"
    model_input = ModelInput.Text
    model_type = ModelType.Chat
    capabilities = ("media", "media_bytes")  # with `media` alone it would get URLs

    async def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[str]:
        if not request.media:
            yield "There is no picture."
        for item in request.media:
            try:
                yield await asyncio.to_thread(describe, item.data)
            except OSError as error:
                raise ValueError(f"a picture can't be read: {error}") from error


def describe(data: bytes) -> str:
    """What is in a file, without decoding all of it."""
    with Image.open(io.BytesIO(data)) as picture:
        return f"{picture.format}, {picture.width} x {picture.height}\n"


if __name__ == "__main__":
    run(Pictures)
