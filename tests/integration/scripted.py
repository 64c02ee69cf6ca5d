"""A model of any family that says what a corpus has for it, token by token or many at once."""

from __future__ import annotations

import asyncio
import importlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import Tokenizer

from dynamo_grpc import Context, Worker
from dynamo_grpc.v1 import inference_pb2
from tests.corpora import TOOLS, Entry

from .front import FOLDER

#: Special tokens of families; others write their marks as text.
SPECIAL = {
    "llama3_json": ["<|python_tag|>", "<|eom_id|>"],
    "mistral": ["[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "[THINK]", "[/THINK]"],
    "pythonic": ["<|python_start|>", "<|python_end|>"],
    "harmony": ["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>", "<|call|>", "<|return|>"],
}
#: As OpenAI's clients send them.
OPENAI_TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": schema}}
    for name, schema in TOOLS.items()
]
TEMPLATE = """{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}\
<|{{ m.role }}|>{{ m.content or '' }}{% for c in m.tool_calls or [] %}\
<call id={{ c.id }}>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}<|end|>{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% if enable_thinking %}<think>
{% endif %}{% endif %}"""


def make_folder(path: Path, family: str) -> Path:
    """The tiny model's folder, with another template, and the special tokens of a family."""
    path.mkdir(exist_ok=True)
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    tokenizer.add_special_tokens([*SPECIAL.get(family, []), "<|eos|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    told = {"vocab_size": tokenizer.get_vocab_size(), "eos_token_id": tokenizer.token_to_id("<|eos|>")}
    config = json.loads((FOLDER / "config.json").read_text()) | told
    (path / "config.json").write_text(json.dumps(config))
    return path


def entries_of(family: str) -> dict[str, Entry]:
    """The corpus of a family."""
    found: dict[str, Entry] = importlib.import_module(f"tests.corpora.{family}").ENTRIES
    return found


class Scripted(Worker):
    """Says the entry that the last message names (`say NAME;`), or the message itself behind `say: `.

    Attributes:
        asked: the last request.
        step: so many tokens in each output.
    """

    family: ClassVar[str] = ""
    model_name = "scripted"
    asked: inference_pb2.PreprocessedRequest
    step = 1

    async def start(self) -> None:
        assert self.model_path is not None
        self.tokenizer = Tokenizer.from_file(str(Path(self.model_path) / "tokenizer.json"))
        self.entries = entries_of(self.family)

    async def generate(
        self, request: inference_pb2.PreprocessedRequest, context: Context
    ) -> AsyncIterator[inference_pb2.ChoiceDelta]:
        self.asked = request
        prompt = self.tokenizer.decode(request.token_ids, skip_special_tokens=False)
        said = re.findall(r"say ([^;]+);", prompt)[-1]
        raw = said[2:] if said.startswith(": ") else self.entries[said].raw
        token_ids = self.tokenizer.encode(raw, add_special_tokens=False).ids
        assert self.tokenizer.decode(token_ids, skip_special_tokens=False) == raw
        for at in range(0, len(token_ids), self.step):
            for index in range(max(1, request.sampling_options.n)):
                yield inference_pb2.ChoiceDelta(index=index, token_ids=token_ids[at : at + self.step])
            await asyncio.sleep(0)


def scripted(folder: Path, parser: str, *, reasoning: str = "qwen3", abilities: tuple[str, ...] = ("n",)) -> Scripted:
    """A worker of a family."""

    class Of(Scripted):
        model_path = make_folder(folder / parser, parser)
        family = parser
        capabilities = abilities
        runtime_config: ClassVar[dict[str, Any]] = {"tool_call_parser": parser, "reasoning_parser": reasoning}

    return Of()
