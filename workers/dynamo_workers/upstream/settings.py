"""What the worker `openai` reads from the environment."""

from __future__ import annotations

import fnmatch
import math
import os
from dataclasses import dataclass
from pathlib import Path

from dynamo_grpc import ConfigurationError

_POLL_S, _NUM_RETRIES = 5.0, 2


@dataclass(frozen=True, slots=True)
class Settings:
    """Where the other server is, and how it is asked.

    Attributes:
        metrics_url: where its metrics are; empty for none.
    """

    base_url: str
    key: str = ""
    key_file: str = ""
    models: tuple[str, ...] = ("*",)
    poll_s: float = _POLL_S
    num_retries: int = _NUM_RETRIES
    metrics_url: str = ""

    @classmethod
    def from_environment(cls) -> Settings:
        """Those of this process.

        Raises:
            ConfigurationError: a value can't be one, or the key's file can't be read.
        """
        base_url = (os.environ.get("OPENAI_BASE_URL") or "http://localhost:8000/v1").rstrip("/")
        if not base_url.startswith(("http://", "https://")):
            raise ConfigurationError(f"OPENAI_BASE_URL={base_url!r} should be a URL such as http://host:8000/v1")
        told = os.environ.get("DYN_UPSTREAM_METRICS") or base_url.removesuffix("/v1") + "/metrics"
        models = os.environ.get("DYN_UPSTREAM_MODELS") or "*"
        settings = cls(
            base_url,
            os.environ.get("OPENAI_API_KEY", ""),
            os.environ.get("OPENAI_API_KEY_FILE", ""),
            tuple(filter(None, (name.strip() for name in models.split(",")))),
            _number("DYN_UPSTREAM_POLL_S", _POLL_S, 0.05),
            int(_number("DYN_UPSTREAM_RETRIES", _NUM_RETRIES, 0)),
            "" if told == "off" else told,
        )
        settings.current_key()
        return settings

    def wants(self, model: str) -> bool:
        """Whether a model of the server is to be served."""
        return any(fnmatch.fnmatchcase(model, pattern) for pattern in self.models)

    def current_key(self) -> str:
        """The key; of a file what it holds now, as keys are changed.

        Raises:
            ConfigurationError: the file can't be read.
        """
        if not self.key_file:
            return self.key or "none"  # servers that want none take any
        try:
            return Path(self.key_file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigurationError(f"OPENAI_API_KEY_FILE can't be read: {error}") from error


def _number(name: str, default: float, at_least: float) -> float:
    text = os.environ.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not at_least <= value < math.inf:
        raise ConfigurationError(f"{name}={text!r} should be a number from {at_least:g} on")
    return value
