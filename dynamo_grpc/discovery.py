"""Which registry the settings ask for."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from dynamo_grpc.errors import ConfigurationError
from dynamo_grpc.names import nearest
from dynamo_grpc.registry.base import Registry
from dynamo_grpc.registry.etcd import EtcdRegistry
from dynamo_grpc.registry.etcd_settings import EtcdSettings
from dynamo_grpc.registry.memory import MemoryRegistry
from dynamo_grpc.registry.static import StaticRegistry

logger = logging.getLogger(__name__)

_BACKENDS = ("etcd", "static", "memory")
_REPLACED = {
    "file": "shared folders are replaced by the embedded registry: start one with `dynamo-grpc registry` and set "
    "ETCD_ENDPOINTS=localhost:2379, or name the workers with DYN_DISCOVERY_BACKEND=static and DYN_STATIC=host:port,…",
    "kubernetes": "use DYN_DISCOVERY_BACKEND=static with DYN_STATIC=dns:SERVICE:PORT, or etcd",
    "nats": "discovery is by etcd leases: set DYN_DISCOVERY_BACKEND=etcd and ETCD_ENDPOINTS",
}
_PLANES = {
    "DYN_REQUEST_PLANE": "requests travel by gRPC alone",
    "DYN_EVENT_PLANE": "events travel by gRPC alone (Control.SubscribeKvEvents)",
    "DYN_RESPONSE_PLANE": "answers travel on the request's own gRPC call",
}


def check_environment(env: Mapping[str, str] = os.environ) -> None:
    """Refuse settings of other systems that would have no effect here.

    Raises:
        ConfigurationError: says what replaces the setting.
    """
    for name, replacement in _PLANES.items():
        if env.get(name, "grpc") != "grpc":
            raise ConfigurationError(f"{name}={env[name]} is not supported: {replacement}; unset {name}")


def open_registry(backend: str = "", env: Mapping[str, str] = os.environ) -> Registry:
    """The registry called `backend` (or by `DYN_DISCOVERY_BACKEND`, or etcd); nothing is connected yet.

    Raises:
        ConfigurationError: there is no such backend, or a setting it needs is missing.
    """
    check_environment(env)
    backend = backend or env.get("DYN_DISCOVERY_BACKEND", "") or "etcd"
    match backend:
        case "etcd":
            settings = EtcdSettings.from_env(env)
            settings.credentials()  # what is wrong with them is told now, not by a task that dies later
            if settings.password and not settings.is_encrypted:
                logger.warning("ETCD_AUTH_PASSWORD travels unencrypted: use https:// in ETCD_ENDPOINTS")
            return EtcdRegistry(settings)
        case "memory" | "mem":
            return MemoryRegistry()
        case "static":
            return StaticRegistry(env.get("DYN_STATIC", ""))  # a worker needs no list: it is found by its address
    if backend in _REPLACED:
        raise ConfigurationError(f"the discovery backend {backend!r} is not supported: {_REPLACED[backend]}")
    hint = nearest(backend, _BACKENDS)
    raise ConfigurationError(
        f"{backend!r} is no discovery backend: use one of {', '.join(_BACKENDS)}"
        + (f" (did you mean {hint!r}?)" if hint else "")
    )
