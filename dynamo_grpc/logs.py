"""How processes of the mesh log: one line for each event to standard error, readable or as JSON, levels by module."""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import sys
from typing import Any

from opentelemetry import trace

from dynamo_grpc.errors import ConfigurationError
from dynamo_grpc.names import nearest

_LEVELS = {"trace": 10, "debug": 10, "info": 20, "warn": 30, "warning": 30, "error": 40, "critical": 50, "off": 60}
_IDS = ("request_id", "error_id")
#: What a record has that is no field of the event.
_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message", "event"}


#: What would end a line, or change how a terminal shows it: clients and workers have a say in messages.
_CONTROL = {
    code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)
}


class _Readable(logging.Formatter):
    """Lines end with the ids that clients are told, so that they can be found."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        is_ours = getattr(record, "lines", False)  # several lines, made here
        record.message = record.message if is_ours else record.message.translate(_CONTROL)
        text = super().formatMessage(record)
        ids = ((name, getattr(record, name, "")) for name in _IDS)
        return " ".join([text, *(f"{name}={value}" for name, value in ids if value and str(value) not in text)])


class _Json(logging.Formatter):
    """One JSON object for each event: time (UTC), level, target, message, the event's fields, and who logs.

    An event whose text holds its fields names itself in `event`: that is its message here.
    """

    def __init__(self, who: dict[str, str]) -> None:
        super().__init__()
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        at = dt.datetime.fromtimestamp(record.created, dt.UTC)
        event: dict[str, Any] = {
            "time": at.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "target": record.name,
            "message": getattr(record, "event", None) or record.getMessage(),
            **self._who,
        }
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            event |= {"trace_id": f"{span.trace_id:032x}", "span_id": f"{span.span_id:016x}"}
        for key, value in vars(record).items():
            if key not in _PLAIN and value is not None and value != "":
                event[f"field_{key}" if key in event else key] = value
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            event["stack"] = self.formatStack(record.stack_info)
        try:
            return _one_line(json.dumps(event, default=str, ensure_ascii=False, allow_nan=False))
        except (TypeError, ValueError, RecursionError):  # what JSON doesn't have is better told as text than lost
            return _one_line(json.dumps({key: str(value) for key, value in event.items()}, ensure_ascii=False))


def _one_line(text: str) -> str:
    """JSON without what some readers take for the end of a line."""
    return text.translate({code: f"\\u{code:04x}" for code in (0x7F, 0x85, 0x2028, 0x2029)})


def parse_levels(text: str) -> dict[str, int]:
    """Levels by module, from `info` or `info,dynamo_grpc.registry=debug,grpc=error`; "" is all others.

    Raises:
        ConfigurationError: a level is unknown; names the nearest.
    """
    levels = {"": logging.INFO}
    for part in filter(None, (part.strip() for part in text.split(","))):
        module, _, level = part.rpartition("=")
        if level.lower() not in _LEVELS:
            hint = nearest(level, _LEVELS)
            raise ConfigurationError(
                f"{level!r} is no log level: there are {', '.join(_LEVELS)}"
                + (f" (did you mean {hint!r}?)" if hint else "")
            )
        levels[module.replace("::", ".")] = _LEVELS[level.lower()]
    return levels


def configure_dynamo_logging(service_name: str = "", worker_id: str = "", level: str | None = None) -> None:
    """Log to standard error, as DYN_LOG (levels) and DYN_LOGGING_JSONL (1: as JSON) say; replaces what was configured.

    Args:
        service_name: who logs, in JSON lines.
        worker_id: the same.
        level: as DYN_LOG has it, instead of it.

    Raises:
        ConfigurationError: a level is unknown.
    """
    levels = parse_levels(os.environ.get("DYN_LOG", "") if level is None else level)
    handler = logging.StreamHandler(sys.stderr)
    if os.environ.get("DYN_LOGGING_JSONL", "").lower() in ("1", "true", "yes"):
        who = {"service": service_name, "worker_id": worker_id}
        handler.setFormatter(_Json({key: value for key, value in who.items() if value}))
    else:
        handler.setFormatter(_Readable("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    level_of_all = levels.pop("")
    logging.basicConfig(level=level_of_all, handlers=[handler], force=True)
    logging.getLogger("grpc").setLevel(max(logging.INFO, level_of_all))
    for module, number in levels.items():
        logging.getLogger(module).setLevel(number)
