"""The text that the tiny model is made from."""

from __future__ import annotations

#: The tokenizer's special tokens; their ids are their positions.
SPECIALS = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def paragraphs(corpus: str) -> list[tuple[list[str], str]]:
    """The corpus as pairs of a topic's keywords and one of its paragraphs."""
    found, keywords = [], [""]
    for line in corpus.splitlines():
        if line.startswith("# "):
            keywords = [word.strip() for word in line[2:].split(",")]
        elif line.strip():
            found.append((keywords, line.strip()))
    return found
