"""The registry: where instances are found. `base` is the interface; one module for each backend."""

from dynamo_grpc.registry.base import Change, Entry, Registration, Registry
from dynamo_grpc.registry.view import View

__all__ = ["Change", "Entry", "Registration", "Registry", "View"]
