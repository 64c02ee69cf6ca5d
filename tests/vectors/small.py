"""A small BERT whose weights follow a rule, so that nobody has to store them."""

from __future__ import annotations

from typing import Any

import numpy as np

CONFIG: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "hidden_act": "gelu",
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}


def weights() -> dict[str, Any]:
    """All of them, by name."""
    made: dict[str, Any] = {}

    def add(name: str, *shape: int) -> None:
        count = int(np.prod(shape))
        values = np.sin(np.arange(count) * 0.7 + len(made)) * (0.3 if len(shape) == 2 else 0.1)
        made[name] = (values.reshape(shape) + name.endswith("LayerNorm.weight")).astype(np.float32)

    size, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    add("embeddings.word_embeddings.weight", CONFIG["vocab_size"], size)
    add("embeddings.position_embeddings.weight", CONFIG["max_position_embeddings"], size)
    add("embeddings.token_type_embeddings.weight", CONFIG["type_vocab_size"], size)
    for layer in ("embeddings.", *(f"encoder.layer.{number}." for number in range(CONFIG["num_hidden_layers"]))):
        if layer != "embeddings.":
            for name in (
                "attention.self.query",
                "attention.self.key",
                "attention.self.value",
                "attention.output.dense",
            ):
                add(f"{layer}{name}.weight", size, size)
                add(f"{layer}{name}.bias", size)
            add(f"{layer}intermediate.dense.weight", inner, size)
            add(f"{layer}intermediate.dense.bias", inner)
            add(f"{layer}output.dense.weight", size, inner)
            add(f"{layer}output.dense.bias", size)
        for name in ("LayerNorm",) if layer == "embeddings." else ("attention.output.LayerNorm", "output.LayerNorm"):
            add(f"{layer}{name}.weight", size)
            add(f"{layer}{name}.bias", size)
    return made
