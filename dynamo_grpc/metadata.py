"""The metadata of a call, both ways: request id, what a context carries, trace context."""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping

from dynamo_grpc.context import Context
from dynamo_grpc.telemetry import inject

REQUEST_ID = "x-request-id"
#: Which instance is meant: an address may belong to another process by now.
INSTANCE_ID = "x-instance-id"
#: The delivery that a request's outputs may take, and the request's number in it.
DELIVERY = "x-delivery"
DELIVERY_ID = "x-delivery-id"
#: How long the client waits for a first output, in seconds: the worker holds its handlers to it from their turn on.
FIRST_OUTPUT_S = "x-first-output-s"
#: Of a call's answer: the request waits for its turn, so that no output is due yet.
QUEUED = "x-queued"
#: A trailer: how many outputs went by the delivery.
NUM_BY_LANE = "x-delivery-outputs"
CONTEXT_PREFIX = "x-context-"


def to_metadata(context: Context, instance_id: int) -> tuple[tuple[str, str], ...]:
    """What a call made under `context` sends to an instance."""
    entries = {REQUEST_ID: printable(context.id()), INSTANCE_ID: f"{instance_id:016x}", **inject()}
    for key, value in context.metadata.items():
        entries[CONTEXT_PREFIX + key.lower()] = urllib.parse.quote(value)
    return tuple(entries.items())


def to_context(metadata: Mapping[str, str], request_id: str, timeout_s: float | None) -> Context:
    """The context of a call that came in; the metadata's request id wins over the message's."""
    carried = {
        key.removeprefix(CONTEXT_PREFIX): urllib.parse.unquote(value)
        for key, value in metadata.items()
        if key.startswith(CONTEXT_PREFIX)
    }
    return Context(metadata.get(REQUEST_ID) or printable(request_id) or None, carried, timeout_s=timeout_s)


def printable(text: str) -> str:
    """Text as a metadata value may be: printable ASCII, 200 characters at most."""
    if text.isascii() and text.isprintable() and len(text) <= 200:
        return text
    return "".join(c if " " <= c <= "~" else "?" for c in text[:200])
