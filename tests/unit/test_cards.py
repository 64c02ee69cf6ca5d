import json
from pathlib import Path
from typing import Any

import pytest

from dynamo_grpc import ConfigurationError, ModelInput, ModelType
from dynamo_grpc.cards import load_model
from dynamo_grpc.records import InstanceRecord, holding, holding_everywhere, read_instances, refusal, to_json
from dynamo_grpc.registry import Entry
from dynamo_grpc.v1 import model_card_pb2 as pb


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "shout"
    path.mkdir()
    files = {
        "tokenizer.json": {"version": "1.0"},
        "config.json": {"vocab_size": 50, "max_position_embeddings": 128, "eos_token_id": 2},
        "generation_config.json": {"eos_token_id": [2, 3], "temperature": 0.5, "top_k": 4, "max_new_tokens": 20},
        "tokenizer_config.json": {
            "chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
        },
    }
    for name, value in files.items():
        (path / name).write_text(json.dumps(value))
    return path


def test_a_card_says_what_the_files_say(folder: Path) -> None:
    model = load_model(folder)
    card = model.card
    assert (card.name, card.vocab_size, card.context_length, list(card.eos_token_ids)) == ("shout", 50, 128, [2, 3])
    assert (card.default_sampling_options.temperature, card.default_sampling_options.top_k) == (0.5, 4)
    assert (card.default_max_tokens, card.chat_template) == (20, "d")
    assert list(card.model_types) == [pb.MODEL_TYPE_CHAT, pb.MODEL_TYPE_COMPLETIONS]
    assert {file.name for file in card.files} == {p.name for p in folder.iterdir()}
    assert model.files[card.files[0].sha256].name == card.files[0].name
    assert len(card.checksum) == 16


def test_the_checksum_changes_with_the_files_and_settings(folder: Path) -> None:
    first = load_model(folder).card.checksum
    assert load_model(folder).card.checksum == first
    assert load_model(folder, context_length=64).card.checksum != first
    assert load_model(folder, kv_cache_block_size=16).card.checksum != first
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert load_model(folder).card.checksum != first
    assert load_model(folder).card.chat_template == "{{ messages }}"


def test_what_is_missing_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is no folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="did you mean 'logprobs'"):
        load_model(folder, capabilities=["logprob"])
    with pytest.raises(ConfigurationError, match="model_path or a model_name"):
        load_model(None)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigurationError, match=r"no tokenizer, neither tokenizer\.json nor"):
        load_model(folder)
    assert load_model(folder, model_input=ModelInput.Text).card.model_input == pb.MODEL_INPUT_TEXT
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"config\.json is no JSON"):
        load_model(folder, model_input=ModelInput.Text)


def test_model_types_combine() -> None:
    assert (ModelType.Chat | ModelType.Embedding).to_proto() == [pb.MODEL_TYPE_CHAT, pb.MODEL_TYPE_EMBEDDING]


def record(key: str, created: int, checksum: str, namespace: str = "n") -> InstanceRecord:
    return InstanceRecord(key, created, pb.Instance(namespace=namespace, model="m", card_checksum=checksum))


def test_the_first_card_holds() -> None:
    records = [record("b", 9, "two"), record("a", 10, "one"), record("c", 5, "two"), record("d", 5, "one")]
    records.append(record("e", 1, "three", "elsewhere"))
    held = holding(records)
    assert held["n", "m"].key == "c"
    assert refusal(pb.Instance(namespace="n", model="m", card_checksum="two"), held) == ""
    assert refusal(pb.Instance(namespace="n", model="other", card_checksum="x"), held) == ""
    assert refusal(pb.Instance(namespace="elsewhere", model="m", card_checksum="three"), held) == ""
    assert refusal(pb.Instance(), held) == ""
    reason = refusal(pb.Instance(namespace="n", model="m", card_checksum="one"), held)
    assert "two" in reason
    assert "one" in reason
    assert holding_everywhere(records)["m"].key == "e"


def entry(instance_id: int, value: bytes | None = None, **changes: Any) -> Entry:
    fields = {"namespace": "n", "component": "c", "endpoint": "e", "address": "h:1", **changes}
    stored = to_json(pb.Instance(instance_id=instance_id, **fields)) if value is None else value
    return Entry(f"/dynamo_grpc/v1/instances/n/c/e/{instance_id:016x}", stored, 1)


def test_bad_entries_hide_no_others(caplog: pytest.LogCaptureFixture) -> None:
    newer = json.dumps({**json.loads(entry(3).value), "a_field_of_tomorrow": 1, "kind": "ENDPOINT_KIND_OF_TOMORROW"})
    entries = [
        entry(1, b"not json"),
        entry(2),
        entry(3, newer.encode()),
        entry(4, b"{}"),
        entry(5, address=""),
        entry(6, namespace="other"),
        entry(7, b"\xff"),
        entry(8, b"[" * 10_000),
        entry(9, address="host"),
    ]
    assert [r.instance.instance_id for r in read_instances(entries)] == [2, 3]
    for told in ("it is no Instance", "belongs to the key", "should be HOST:PORT", "is no namespace name"):
        assert told in caplog.text
