"""What stands in the registry: instances and model cards as JSON, and which of several cards holds."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message

from dynamo_grpc.names import EndpointName, check_address
from dynamo_grpc.registry.base import Entry
from dynamo_grpc.v1 import model_card_pb2

logger = logging.getLogger(__name__)

_M = TypeVar("_M", bound=Message)
_R = TypeVar("_R")
_K = TypeVar("_K")


def to_json(message: Message) -> bytes:
    """A record as it is stored: JSON with proto field names."""
    return json_format.MessageToJson(message, preserving_proto_field_name=True, indent=None).encode()


def endpoint_of(instance: model_card_pb2.Instance) -> str:
    """The full name of an instance's endpoint, namespace.component.endpoint."""
    return f"{instance.namespace}.{instance.component}.{instance.endpoint}"


def to_entries(instance: model_card_pb2.Instance, card: model_card_pb2.ModelCard | None) -> dict[str, bytes]:
    """What an instance puts into the registry: itself, and the model card that it serves."""
    name = EndpointName(instance.namespace, instance.component, instance.endpoint)
    entries = {name.instance_key(instance.instance_id): to_json(instance)}
    if card is not None:
        entries[name.card_key(instance.instance_id)] = to_json(card)
    return entries


def from_json(value: bytes, message: _M) -> _M:
    """Read a record. Fields that are not known yet are left out.

    Raises:
        ValueError: it is none.
    """
    try:
        return json_format.Parse(value, message, ignore_unknown_fields=True)
    except (ValueError, RecursionError, json_format.ParseError) as error:
        raise ValueError(f"it is no {message.DESCRIPTOR.name}: {error}") from error


@dataclass(frozen=True, slots=True)
class InstanceRecord:
    """An instance as it stands in the registry."""

    key: str
    created: int
    instance: model_card_pb2.Instance


def parse_instance(entry: Entry) -> InstanceRecord:
    """The instance in a registry entry.

    Raises:
        ValueError: it holds none that could be called; says why.
    """
    instance = from_json(entry.value, model_card_pb2.Instance())
    name = EndpointName(instance.namespace, instance.component, instance.endpoint)
    if (expected := name.instance_key(instance.instance_id)) != entry.key:
        raise ValueError(f"its value belongs to the key {expected}")
    check_address(instance.address)
    return InstanceRecord(entry.key, entry.created, instance)


def parse_card(entry: Entry) -> model_card_pb2.ModelCard:
    """The model card in a registry entry; don't change it, all workers of a model have the same.

    Raises:
        ValueError: it holds none.
    """
    return _parse_card(entry.value)


@functools.lru_cache(maxsize=128)
def _parse_card(value: bytes) -> model_card_pb2.ModelCard:
    return from_json(value, model_card_pb2.ModelCard())


def decode_instance(entry: Entry) -> InstanceRecord | None:
    """The instance in a registry entry; None (and a line in the log) if it holds none, so that it hides no others."""
    return _decode(entry, parse_instance)


def decode_card(entry: Entry) -> model_card_pb2.ModelCard | None:
    """The model card in a registry entry; None (and a line in the log) if it holds none."""
    return _decode(entry, parse_card)


def _decode(entry: Entry, parse: Callable[[Entry], _R]) -> _R | None:
    try:
        return parse(entry)
    except ValueError as error:  # InvalidNameError is one
        logger.warning("registry entry %s is left out: %s", entry.key, error)
        return None


def read_instances(entries: Iterable[Entry]) -> list[InstanceRecord]:
    """The instances among registry entries, in order of their keys."""
    return [record for entry in sorted(entries, key=lambda e: e.key) if (record := decode_instance(entry))]


def holding(records: Iterable[InstanceRecord]) -> dict[tuple[str, str], InstanceRecord]:
    """Who decides which card holds, by namespace and model name: the instance that was registered first."""
    return _first(records, lambda instance: (instance.namespace, instance.model))


def holding_everywhere(records: Iterable[InstanceRecord]) -> dict[str, InstanceRecord]:
    """The same by model name alone, for those who serve all namespaces."""
    return _first(records, lambda instance: instance.model)


def _first(records: Iterable[InstanceRecord], key: Callable[[model_card_pb2.Instance], _K]) -> dict[_K, InstanceRecord]:
    held: dict[_K, InstanceRecord] = {}
    for record in records:
        if record.instance.model:
            name = key(record.instance)
            first = held.get(name)
            if first is None or (record.created, record.key) < (first.created, first.key):
                held[name] = record
    return held


def refusal(instance: model_card_pb2.Instance, held: Mapping[tuple[str, str], InstanceRecord]) -> str:
    """Why an instance gets no traffic, in a sentence; empty when it may have some."""
    holder = held.get((instance.namespace, instance.model))
    if holder is None or holder.instance.card_checksum == instance.card_checksum:
        return ""
    return (
        f"model {instance.model!r} is served with card {holder.instance.card_checksum}, this worker has card "
        f"{instance.card_checksum}: give all workers of a model the same files and settings, or another model name"
    )
