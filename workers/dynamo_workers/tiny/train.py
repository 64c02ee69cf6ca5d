"""Make `model/` from `corpus.txt`: the tokenizer is trained, the configuration written.

Run it after a change of the corpus:

    python -m dynamo_workers.tiny.train

The result is the same on every machine; a test compares it with what is committed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dynamo_workers.tiny.corpus import SPECIALS, paragraphs

HERE = Path(__file__).resolve().parent
VOCAB_SIZE = 2_000
CONTEXT_LENGTH = 8_192
TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}<|{{ 'system' if message.role == 'developer' else message.role }}|>"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train(out: Path) -> None:
    """Write the model folder."""
    texts = [text for _, text in paragraphs((HERE / "corpus.txt").read_text(encoding="utf-8"))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=2,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["\n\n".join(texts)], trainer)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))

    def write(name: str, values: dict[str, object]) -> None:
        (out / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    write(
        "config.json",
        {
            "model_type": "ngram",
            "vocab_size": tokenizer.get_vocab_size(),
            "max_position_embeddings": CONTEXT_LENGTH,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    )
    write("generation_config.json", {"bos_token_id": 0, "eos_token_id": 1, "temperature": 0.8})
    write(
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIALS[0],
            "eos_token": SPECIALS[1],
            "model_max_length": CONTEXT_LENGTH,
            "chat_template": TEMPLATE,
        },
    )


if __name__ == "__main__":
    train(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "model")
