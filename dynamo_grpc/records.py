"""What stands in the registry: instances and model cards as JSON, and which of several cards holds."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message

from dynamo_grpc.names import INSTANCES, MODELS, EndpointName
from dynamo_grpc.registry.base import Entry
from dynamo_grpc.v1 import model_card_pb2

logger = logging.getLogger(__name__)

_M = TypeVar("_M", bound=Message)


def to_json(message: Message) -> bytes:
    """A record as it is stored: JSON with proto field names."""
    return json_format.MessageToJson(message, preserving_proto_field_name=True, indent=None).encode()


def to_entries(instance: model_card_pb2.Instance, card: model_card_pb2.ModelCard | None) -> dict[str, bytes]:
    """What an instance puts into the registry: itself, and the model card that it serves."""
    name = EndpointName(instance.namespace, instance.component, instance.endpoint)
    entries = {name.instance_key(instance.instance_id): to_json(instance)}
    if card is not None:
        entries[name.card_key(instance.instance_id)] = to_json(card)
    return entries


def from_json(entry: Entry, message: _M) -> _M | None:
    """Read a record; None (and a line in the log) if it is none, so that one bad entry hides no others."""
    try:
        return json_format.Parse(entry.value, message, ignore_unknown_fields=True)
    except (ValueError, RecursionError, json_format.ParseError) as error:
        logger.warning("registry entry %s is no %s: %s", entry.key, message.DESCRIPTOR.name, error)
        return None


@dataclass(frozen=True, slots=True)
class CardRecord:
    """A model card as one instance registered it."""

    key: str
    created: int
    card: model_card_pb2.ModelCard


def read_cards(entries: Iterable[Entry]) -> list[CardRecord]:
    """The model cards among registry entries, oldest first."""
    records = [
        CardRecord(entry.key, entry.created, card)
        for entry in entries
        if entry.key.startswith(MODELS) and (card := from_json(entry, model_card_pb2.ModelCard()))
    ]
    return sorted(records, key=lambda record: (record.created, record.key))


def read_instances(entries: Iterable[Entry]) -> list[model_card_pb2.Instance]:
    """The instances among registry entries, in order of their keys."""
    return [
        instance
        for entry in sorted(entries, key=lambda entry: entry.key)
        if entry.key.startswith(INSTANCES) and (instance := from_json(entry, model_card_pb2.Instance()))
    ]


def holding_cards(records: Iterable[CardRecord]) -> dict[str, CardRecord]:
    """Which card holds for each model name: the first that was registered."""
    held: dict[str, CardRecord] = {}
    for record in sorted(records, key=lambda record: (record.created, record.key)):
        held.setdefault(record.card.name, record)
    return held


def refusal(instance: model_card_pb2.Instance, held: Mapping[str, CardRecord]) -> str:
    """Why an instance gets no traffic, in a sentence; empty when it may have some."""
    holder = held.get(instance.model) if instance.model else None
    if holder is None or holder.card.checksum == instance.card_checksum:
        return ""
    return (
        f"model {instance.model!r} is served with card {holder.card.checksum}, this worker has card "
        f"{instance.card_checksum}: give all workers of a model the same files and settings, or another model name"
    )
