"""Where etcd is and who we are, as the ETCD_* variables say it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from dynamo_grpc.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class EtcdSettings:
    """Where etcd is and who we are.

    Attributes:
        endpoints: URLs or host:port; all http or all https.
        ttl_s: time to live asked for leases, in seconds.
    """

    endpoints: tuple[str, ...] = ("localhost:2379",)
    ttl_s: int = 10
    username: str = ""
    password: str = field(default="", repr=False)
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> EtcdSettings:
        """Read `ETCD_ENDPOINTS`, `ETCD_LEASE_TTL` and `ETCD_AUTH_*`."""
        endpoints = tuple(e.strip() for e in env.get("ETCD_ENDPOINTS", "").split(",") if e.strip())
        ttl = env.get("ETCD_LEASE_TTL", "10")
        if not ttl.isdigit() or int(ttl) < 1:
            raise ConfigurationError(f"ETCD_LEASE_TTL={ttl!r} must be a whole number of seconds, 1 or more")
        return cls(
            endpoints=endpoints or cls.endpoints_default(),
            ttl_s=int(ttl),
            username=env.get("ETCD_AUTH_USERNAME", ""),
            password=env.get("ETCD_AUTH_PASSWORD", ""),
            ca_file=env.get("ETCD_AUTH_CA", ""),
            cert_file=env.get("ETCD_AUTH_CLIENT_CERT", ""),
            key_file=env.get("ETCD_AUTH_CLIENT_KEY", ""),
        )

    @staticmethod
    def endpoints_default() -> tuple[str, ...]:
        """Where etcd is when nobody says."""
        return ("localhost:2379",)

    def credentials(self) -> grpc.ChannelCredentials | None:
        """What connections are encrypted with; None when they are not.

        Raises:
            ConfigurationError: a certificate file can't be read.
        """
        if not (self.ca_file or self.cert_file or any(e.startswith("https://") for e in self.endpoints)):
            return None
        try:
            return grpc.ssl_channel_credentials(_read(self.ca_file), _read(self.key_file), _read(self.cert_file))
        except OSError as error:
            raise ConfigurationError(f"a certificate file for etcd can't be read: {error}") from error


def _read(name: str) -> bytes | None:
    return Path(name).read_bytes() if name else None
