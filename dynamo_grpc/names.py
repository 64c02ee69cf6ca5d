"""Names of endpoints: `namespace.component.endpoint`, and the registry keys made of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from dynamo_grpc.errors import InvalidNameError

FAMILY = "/dynamo_grpc/"
ROOT = FAMILY + "v1/"
INSTANCES = ROOT + "instances/"
MODELS = ROOT + "models/"

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")


def check_part(kind: str, part: str) -> str:
    """Return `part`, or raise InvalidNameError if it can't be a namespace, component or endpoint (`kind`)."""
    if not _PART.fullmatch(part):
        raise InvalidNameError(
            f"{part!r} is no {kind} name: use 1 to 63 letters, digits, '-' and '_', beginning with a letter or digit"
        )
    return part


def check_address(address: str) -> str:
    """Return `address`, or raise ValueError if it is no HOST:PORT."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} should be HOST:PORT")
    return address


@dataclass(frozen=True, slots=True)
class EndpointName:
    """The full name of an endpoint."""

    namespace: str
    component: str
    endpoint: str

    def __post_init__(self) -> None:
        check_part("namespace", self.namespace)
        check_part("component", self.component)
        check_part("endpoint", self.endpoint)

    @classmethod
    def parse(cls, text: str) -> EndpointName:
        """Parse `namespace.component.endpoint`, with or without `dyn://` before it.

        Raises:
            InvalidNameError: it has not three parts, or one of them is not allowed.
        """
        parts = text.removeprefix("dyn://").split(".")
        if len(parts) != 3:
            raise InvalidNameError(f"{text!r} is no endpoint name: it takes three parts, namespace.component.endpoint")
        return cls(*parts)

    def __str__(self) -> str:
        return f"{self.namespace}.{self.component}.{self.endpoint}"

    @property
    def instances_prefix(self) -> str:
        """Registry prefix of the endpoint's instances."""
        return f"{INSTANCES}{self.namespace}/{self.component}/{self.endpoint}/"

    def instance_key(self, instance_id: int) -> str:
        """Registry key of one instance; ids are written as 16 hexadecimal digits."""
        return f"{self.instances_prefix}{instance_id:016x}"

    def card_key(self, instance_id: int) -> str:
        """Registry key of the model card that one instance serves."""
        return f"{MODELS}{self.namespace}/{self.component}/{self.endpoint}/{instance_id:016x}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, if any is like it at all."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None
