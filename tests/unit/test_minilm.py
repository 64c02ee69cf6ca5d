"""The embedding worker's model is torch's, to 1e-4, and its batches are what waits."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dynamo_workers.minilm.batches import MAX_TOKENS, Batches
from dynamo_workers.minilm.bert import Bert
from safetensors.numpy import save_file

from dynamo_grpc import ConfigurationError
from tests.vectors.small import CONFIG, weights

VECTORS = Path(__file__).resolve().parent.parent / "vectors"


def make_folder(folder: Path, **config: Any) -> Path:
    """The small model."""
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(weights(), folder / "model.safetensors")
    return folder


def test_vectors_are_those_of_torch(tmp_path: Path) -> None:
    model = Bert(make_folder(tmp_path))
    rows = json.loads((VECTORS / "small.json").read_text())["rows"]
    together = model.embed([row["token_ids"] for row in rows])
    for row, vector in zip(rows, together, strict=True):
        assert np.abs(vector - row["vector"]).max() < 1e-4
        assert np.abs(model.embed([row["token_ids"]])[0] - vector).max() < 1e-5
    prefixed = {f"bert.{name}": value for name, value in weights().items()}
    save_file(prefixed, tmp_path / "model.safetensors")
    assert np.allclose(Bert(tmp_path).embed([rows[0]["token_ids"]]), together[:1], atol=1e-5)


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="can't be read"):
        Bert(tmp_path)
    make_folder(tmp_path, model_type="roberta")
    with pytest.raises(ConfigurationError, match="'roberta' model"):
        Bert(tmp_path)


async def test_what_waits_is_computed_together() -> None:
    begun, go = threading.Event(), threading.Event()
    seen: list[list[int]] = []

    def compute(rows: Sequence[Sequence[int]]) -> Any:
        begun.set()
        go.wait(10)
        seen.append([len(row) for row in rows])
        return np.array([[sum(row)] for row in rows], np.float32)

    batches = Batches(compute)
    first = asyncio.ensure_future(batches.embed([[1]]))
    await asyncio.to_thread(begun.wait, 10)
    others = [asyncio.ensure_future(batches.embed([[n] * n, [n]])) for n in (2, 3, 4)]
    left = asyncio.ensure_future(batches.embed([[9] * 9]))
    await asyncio.sleep(0)
    left.cancel()
    go.set()
    assert (await first).tolist() == [[1]]
    assert [one.tolist() for one in await asyncio.gather(*others)] == [[[4], [2]], [[9], [3]], [[16], [4]]]
    assert seen == [[1], [1, 1, 1, 2, 3, 4]]
    await batches.close()


async def test_batches_are_bounded_and_of_like_length() -> None:
    seen: list[list[int]] = []

    def compute(rows: Sequence[Sequence[int]]) -> Any:
        seen.append([len(row) for row in rows])
        return np.zeros((len(rows), 1), np.float32)

    batches = Batches(compute)
    rows = [[1] * length for length in [200, 3] * 40]
    assert (await batches.embed(rows)).shape == (80, 1)
    assert sum(map(len, seen)) == 80
    assert all(len(batch) * max(batch) <= MAX_TOKENS for batch in seen)
    assert seen[0] == [200] * (MAX_TOKENS // 200)
    await batches.close()


async def test_a_small_request_takes_its_turn_among_large_ones() -> None:
    seen: list[int] = []

    def compute(rows: Sequence[Sequence[int]]) -> Any:
        seen.append(len(rows))
        return np.zeros((len(rows), 1), np.float32)

    batches = Batches(compute)
    large = asyncio.ensure_future(batches.embed([[1] * 40] * 2048))
    await asyncio.sleep(0)
    await batches.embed([[1]])
    assert len(seen) <= 3
    assert not large.done()
    await large
    await batches.close()


async def test_a_failure_is_of_its_batch_alone() -> None:
    def compute(rows: Sequence[Sequence[int]]) -> Any:
        if rows[0][0] == 13:
            raise MemoryError("no room")
        return np.zeros((len(rows), 1), np.float32)

    batches = Batches(compute)
    with pytest.raises(MemoryError, match="no room"):
        await batches.embed([[13]])
    assert (await batches.embed([[1]])).shape == (1, 1)
    await batches.close()
