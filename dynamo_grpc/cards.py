"""Model cards: made from a model folder, with the hashes of its files."""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from dynamo_grpc.errors import ConfigurationError
from dynamo_grpc.messages import from_dict, to_struct
from dynamo_grpc.names import nearest
from dynamo_grpc.v1 import inference_pb2, model_card_pb2

#: Files of a model folder that a frontend needs, if they are there.
FILES = ("tokenizer_config.json", "config.json", "generation_config.json", "chat_template.jinja")
#: Its tokenizer, in one of these; the first that is there counts.
TOKENIZERS = ("tokenizer.json", "tekken.json", "tokenizer.model", "tiktoken.model", "*.tiktoken")

#: Optional abilities that a worker can declare; a request that needs another one is refused.
CAPABILITIES = frozenset(
    [
        "n",
        "best_of",
        "beam_search",
        "logprobs",
        "prompt_logprobs",
        "guided_decoding",
        "lora",
        "media",
        "media_bytes",
        "stop",
        "dimensions",
        "tools",
    ]
)


class ModelInput(enum.Enum):
    """What a worker takes as prompt."""

    Tokens = model_card_pb2.MODEL_INPUT_TOKENS
    Text = model_card_pb2.MODEL_INPUT_TEXT


class ModelType(enum.Flag):
    """What a model can be asked for; combine with `|`."""

    Chat = 1 << model_card_pb2.MODEL_TYPE_CHAT
    Completions = 1 << model_card_pb2.MODEL_TYPE_COMPLETIONS
    Embedding = 1 << model_card_pb2.MODEL_TYPE_EMBEDDING

    def to_proto(self) -> list[model_card_pb2.ModelType.ValueType]:
        """The same as a list of proto enums."""
        return [flag.value.bit_length() - 1 for flag in type(self) if flag in self]  # type: ignore[misc]


@dataclass(frozen=True, slots=True)
class Model:
    """A card with the files behind it, by their hash."""

    card: model_card_pb2.ModelCard
    files: Mapping[str, Path] = field(default_factory=dict)


def load_model(
    model_path: str | Path | None,
    model_name: str = "",
    *,
    model_input: ModelInput = ModelInput.Tokens,
    model_type: ModelType = ModelType.Chat | ModelType.Completions,
    context_length: int | None = None,
    kv_cache_block_size: int | None = None,
    migration_limit: int | None = None,
    capabilities: Iterable[str] = (),
    runtime_config: Mapping[str, Any] | None = None,
    user_data: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    aliases: Iterable[str] = (),
) -> Model:
    """Make a model card from a folder in Hugging Face's layout; what is given wins over what the files say.

    Args:
        model_path: the folder; None for a worker that brings no tokenizer (then it takes text, or clients send ids).
        model_name: defaults to the folder's name.

    Raises:
        ConfigurationError: the folder or its tokenizer is missing, a file is no JSON, or a capability is unknown.
    """
    folder = Path(model_path) if model_path is not None else None
    if folder is not None and not folder.is_dir():
        raise ConfigurationError(f"model_path {str(folder)!r} is no folder (looked in {Path.cwd()})")
    name = model_name or (folder.resolve().name if folder else "")
    if not name:
        raise ConfigurationError("a model needs a model_path or a model_name")
    tokenizer_files = [path.name for name in TOKENIZERS for path in sorted(folder.glob(name))] if folder else []
    if folder is not None and model_input is ModelInput.Tokens and not tokenizer_files:
        raise ConfigurationError(
            f"{folder.resolve()} has no tokenizer, neither {' nor '.join(TOKENIZERS)}: a worker that takes token ids "
            "needs one (else: ModelInput.Text)"
        )
    _check_capabilities(capabilities := sorted(set(capabilities)))
    config, generation, tokenizer, sentences = (
        _read_json(folder, file)
        for file in ("config.json", "generation_config.json", "tokenizer_config.json", "sentence_bert_config.json")
    )
    length = sentences.get("max_seq_length") or config.get("max_position_embeddings") or _length(tokenizer)
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    templates = {"default": chat_template} if chat_template is not None else _templates(folder, tokenizer)
    default_template = templates.pop("default", "")
    card = model_card_pb2.ModelCard(
        name=name,
        aliases=aliases,
        model_input=model_input.value,
        model_types=model_type.to_proto(),
        context_length=context_length or length,
        kv_cache_block_size=kv_cache_block_size or 0,
        vocab_size=config.get("vocab_size", 0),
        eos_token_ids=[] if eos is None else [eos] if isinstance(eos, int) else eos,
        bos_token_id=generation.get("bos_token_id", config.get("bos_token_id")),
        chat_template=default_template,
        named_chat_templates=templates,
        default_sampling_options=_default_sampling(generation),
        default_max_tokens=generation.get("max_new_tokens"),
        capabilities=capabilities,
        migration_limit=migration_limit,
        runtime_config=from_dict(runtime_config or {}, model_card_pb2.RuntimeConfig()),
    )
    if user_data:
        card.user_data.CopyFrom(to_struct(user_data))
    files = {}
    for file in (*tokenizer_files[:1], *FILES) if folder else ():
        path = folder / file  # type: ignore[operator]
        if path.is_file():
            data = path.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            card.files.add(name=file, sha256=digest, size_bytes=len(data))
            files[digest] = path
    card.checksum = checksum(card)
    return Model(card, files)


def read_template(path: str | Path) -> str:
    """A chat template from a file.

    Raises:
        ConfigurationError: it can't be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the chat template {str(path)!r} can't be read: {error}") from error


def checksum(card: model_card_pb2.ModelCard) -> str:
    """SHA-256 of a card without its checksum: 16 hexadecimal digits."""
    copy = model_card_pb2.ModelCard()
    copy.CopyFrom(card)
    copy.ClearField("checksum")
    return hashlib.sha256(_canonical(copy)).hexdigest()[:16]


def _canonical(message: Message) -> bytes:
    return message.SerializeToString(deterministic=True)


def _check_capabilities(capabilities: Iterable[str]) -> None:
    for capability in capabilities:
        if capability not in CAPABILITIES:
            hint = nearest(capability, CAPABILITIES)
            raise ConfigurationError(
                f"{capability!r} is no capability: there are {', '.join(sorted(CAPABILITIES))}"
                + (f" (did you mean {hint!r}?)" if hint else "")
            )


def _read_json(folder: Path | None, file: str) -> dict[str, Any]:
    path = folder / file if folder else None
    if path is None or not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigurationError(f"{path} is no JSON: {error}") from error
    return values if isinstance(values, dict) else {}


def _length(tokenizer_config: Mapping[str, Any]) -> int:
    length = tokenizer_config.get("model_max_length", 0)
    return int(length) if length < 2**31 else 0  # "no limit" is written as 10^30


def _templates(folder: Path | None, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a folder by name; files win over what the tokenizer's configuration holds."""
    told = tokenizer_config.get("chat_template") or {}
    if isinstance(told, list):
        templates = {
            str(entry.get("name")): str(entry.get("template", "")) for entry in told if isinstance(entry, dict)
        }
    else:
        templates = {"default": str(told)} if told else {}
    if folder is not None:
        more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        named = {path.stem: path for path in more} | {"default": folder / "chat_template.jinja"}
        templates |= {name: read_template(path) for name, path in named.items() if path.is_file()}
    return templates


def _default_sampling(generation: Mapping[str, Any]) -> inference_pb2.SamplingOptions:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = {name: generation[name] for name in names if generation.get(name) is not None}
    if generation.get("do_sample") is False:
        given = {"temperature": 0.0}
    return from_dict(given, inference_pb2.SamplingOptions())
