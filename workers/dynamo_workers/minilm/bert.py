"""A BERT encoder in numpy: token ids to one vector of length 1 for each row, as sentence-transformers makes it.

The source of the formulas is Devlin et al. 2018; mean pooling and the length are those of the model's `modules.json`.
onnxruntime would need the weights in its own format, which takes torch to make.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from dynamo_grpc import ConfigurationError

Array: TypeAlias = NDArray[np.float32]

_SCALE = np.float32(1 / math.sqrt(2))
_FACTORS = tuple(map(np.float32, (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)))
#: Values that are worked on at once: they stay in the cache.
_BLOCK = 16_384


class Bert:
    """The model in a folder.

    Args:
        folder: with config.json and model.safetensors.

    Raises:
        ConfigurationError: a file is missing, or it is another kind of model.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors.numpy import load_file

        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            weights: Mapping[str, Array] = load_file(folder / "model.safetensors")
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"the model in {folder} can't be read: {error}") from error
        if config.get("model_type") != "bert" or config.get("hidden_act") != "gelu":
            raise ConfigurationError(
                f"{folder} has a {config.get('model_type')!r} model: this worker runs bert with gelu"
            )
        self.size: int = config["hidden_size"]
        self._num_heads: int = config["num_attention_heads"]
        self._epsilon = np.float32(config["layer_norm_eps"])
        weights = {name.removeprefix("bert."): np.asarray(value, np.float32) for name, value in weights.items()}
        self._weights = weights
        embeddings = "embeddings."
        self._words = weights[f"{embeddings}word_embeddings.weight"]
        self._places = (
            weights[f"{embeddings}position_embeddings.weight"] + weights[f"{embeddings}token_type_embeddings.weight"][0]
        )
        self._layers = [f"encoder.layer.{number}." for number in range(config["num_hidden_layers"])]

    def embed(self, rows: Sequence[Sequence[int]]) -> Array:
        """A vector of length 1 for each row of token ids; rows of like length together cost least."""
        lengths = np.array([len(row) for row in rows])
        longest = int(lengths.max())
        mask = np.arange(longest) < lengths[:, None]
        ids = np.zeros((len(rows), longest), np.int64)
        ids[mask] = np.concatenate([np.asarray(row, np.int64) for row in rows])
        hidden = self._normalized(self._words[ids] + self._places[:longest], "embeddings.LayerNorm")
        hidden_from = np.where(mask, np.float32(0), np.float32(-1e9))[:, None, None, :]
        for layer in self._layers:
            hidden = self._layer(hidden, hidden_from, layer)
        weights = mask[:, :, None].astype(np.float32)
        means: Array = (hidden * weights).sum(axis=1) / weights.sum(axis=1)
        return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), np.float32(1e-12))

    def _layer(self, hidden: Array, hidden_from: Array, name: str) -> Array:
        attended = self._attend(hidden, hidden_from, f"{name}attention.self.")
        attended = self._linear(attended, f"{name}attention.output.dense")
        hidden = self._normalized(hidden + attended, f"{name}attention.output.LayerNorm")
        inner = _gelu(self._linear(hidden, f"{name}intermediate.dense"))
        return self._normalized(hidden + self._linear(inner, f"{name}output.dense"), f"{name}output.LayerNorm")

    def _attend(self, hidden: Array, hidden_from: Array, name: str) -> Array:
        rows, length, size = hidden.shape
        head = size // self._num_heads

        def heads(what: str) -> Array:
            split: Array = self._linear(hidden, name + what).reshape(rows, length, self._num_heads, head)
            return split.transpose(0, 2, 1, 3)

        scores = heads("query") @ heads("key").transpose(0, 1, 3, 2) / np.float32(math.sqrt(head)) + hidden_from
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed: Array = (scores @ heads("value")).transpose(0, 2, 1, 3)
        return mixed.reshape(rows, length, size)

    def _linear(self, values: Array, name: str) -> Array:
        rows = values.reshape(-1, values.shape[-1])  # one large product in place of many
        made: Array = rows @ self._weights[f"{name}.weight"].T
        made += self._weights[f"{name}.bias"]
        return made.reshape(*values.shape[:-1], -1)

    def _normalized(self, values: Array, name: str) -> Array:
        centred = values - values.mean(axis=-1, keepdims=True)
        variance = (centred * centred).mean(axis=-1, keepdims=True)
        scaled: Array = centred / np.sqrt(variance + self._epsilon)
        return scaled * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]


def _gelu(values: Array) -> Array:
    """Gelu by the error function, in place, to 1.5e-7 (Abramowitz and Stegun, 7.1.26: numpy has none).

    Block by block: so many passes over all of it would each wait for the memory.
    """
    flat = values.reshape(-1)
    for begin in range(0, len(flat), _BLOCK):
        block = flat[begin : begin + _BLOCK]
        size = np.abs(block) * _SCALE
        t = 1 / (1 + np.float32(0.3275911) * size)
        total = np.zeros_like(size)
        for factor in _FACTORS:
            total += factor
            total *= t
        size *= -size
        total *= np.exp(size, out=size)
        np.subtract(1, total, out=total)
        np.copysign(total, block, out=total)
        total += 1
        block *= total
        block *= np.float32(0.5)
    return values
