"""Where etcd is and who we are, as the ETCD_* variables say it."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from dynamo_grpc.errors import ConfigurationError
from dynamo_grpc.names import check_address

_MAX_TTL_S = 86_400
DEFAULT_ENDPOINTS = ("localhost:2379",)


@dataclass(frozen=True, slots=True)
class EtcdSettings:
    """Where etcd is and who we are.

    Attributes:
        endpoints: URLs or host:port; all http or all https.
        ttl_s: time to live asked for leases, in seconds.
    """

    endpoints: tuple[str, ...] = DEFAULT_ENDPOINTS
    ttl_s: int = 10
    username: str = ""
    password: str = field(default="", repr=False)
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    def __post_init__(self) -> None:
        if any("@" in endpoint for endpoint in self.endpoints):
            raise ConfigurationError(
                "ETCD_ENDPOINTS takes no user and password: give them by ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD"
            )
        for endpoint in self.endpoints:
            scheme, _, target = endpoint.rpartition("//")
            if scheme not in ("", "http:", "https:"):
                raise ConfigurationError(f"ETCD_ENDPOINTS: {endpoint!r} should begin with http:// or https://")
            try:
                check_address(target)
            except ValueError:
                raise ConfigurationError(
                    f"ETCD_ENDPOINTS: {endpoint!r} should be [http://|https://]HOST:PORT, etcd's port is 2379"
                ) from None
        if len({endpoint.startswith("https://") for endpoint in self.endpoints}) > 1:
            raise ConfigurationError("ETCD_ENDPOINTS: either all endpoints are https:// or none is")
        if (self.ca_file or self.cert_file) and any(e.startswith("http://") for e in self.endpoints):
            raise ConfigurationError(
                "ETCD_ENDPOINTS says http://, and ETCD_AUTH_CA or _CLIENT_CERT says TLS: use https://"
            )
        if bool(self.username) != bool(self.password):
            raise ConfigurationError("ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD go together: one of them is missing")
        if bool(self.cert_file) != bool(self.key_file):
            raise ConfigurationError("ETCD_AUTH_CLIENT_CERT and ETCD_AUTH_CLIENT_KEY go together: one is missing")

    @property
    def is_encrypted(self) -> bool:
        """Whether connections use TLS."""
        return bool(self.ca_file or self.cert_file or self.endpoints[0].startswith("https://"))

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> EtcdSettings:
        """Read `ETCD_ENDPOINTS`, `ETCD_LEASE_TTL` and `ETCD_AUTH_*`.

        Raises:
            ConfigurationError: one of them can't be right; says which and what it should be.
        """
        endpoints = tuple(e.strip().rstrip("/") for e in env.get("ETCD_ENDPOINTS", "").split(",") if e.strip())
        ttl = env.get("ETCD_LEASE_TTL") or "10"
        if not ttl.isdigit() or not 1 <= int(ttl) <= _MAX_TTL_S:
            raise ConfigurationError(f"ETCD_LEASE_TTL={ttl!r} must be a whole number of seconds, 1 to {_MAX_TTL_S}")
        return cls(
            endpoints=endpoints or DEFAULT_ENDPOINTS,
            ttl_s=int(ttl),
            username=env.get("ETCD_AUTH_USERNAME", ""),
            password=env.get("ETCD_AUTH_PASSWORD", ""),
            ca_file=env.get("ETCD_AUTH_CA", ""),
            cert_file=env.get("ETCD_AUTH_CLIENT_CERT", ""),
            key_file=env.get("ETCD_AUTH_CLIENT_KEY", ""),
        )

    def credentials(self) -> grpc.ChannelCredentials | None:
        """What connections are encrypted with; None when they are not.

        Raises:
            ConfigurationError: a certificate file can't be read, or holds something else.
        """
        if not self.is_encrypted:
            return None
        try:
            # gRPC takes any bytes, and fails at each connection; Python's own ssl says now what is wrong with them
            context = ssl.create_default_context(cafile=self.ca_file or None)
            if self.cert_file:
                context.load_cert_chain(self.cert_file, self.key_file)
            return grpc.ssl_channel_credentials(_read(self.ca_file), _read(self.key_file), _read(self.cert_file))
        except OSError as error:  # ssl.SSLError is one
            files = ", ".join(filter(None, (self.ca_file, self.cert_file, self.key_file)))
            raise ConfigurationError(f"a certificate file for etcd ({files}) can't be used: {error}") from error


def _read(name: str) -> bytes | None:
    return Path(name).read_bytes() if name else None
