"""SIGUSR1: what the process does now, to its log: requests, tasks, and the stacks of all threads."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable

logger = logging.getLogger(__name__)

_MAX_LINES = 200


def ignore_until_installed() -> None:
    """From now on SIGUSR1 ends nobody: not one that is still starting, not one that has nothing to tell."""
    if hasattr(signal, "SIGUSR1") and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def install(requests: Callable[[], Iterable[str]]) -> None:
    """From now on SIGUSR1 logs what the running loop does.

    Args:
        requests: a line for each request that runs.
    """
    if not hasattr(signal, "SIGUSR1"):
        return

    def dump() -> None:
        lines = list(requests())
        shown = "\n".join(f"  {line}" for line in lines[:_MAX_LINES])
        logger.warning("%d requests run:\n%s", len(lines), shown or "  none", extra={"lines": True})
        tasks = Counter(_where(task) for task in asyncio.all_tasks())
        told = "\n".join(f"  {count:5} {where}" for where, count in tasks.most_common(_MAX_LINES))
        logger.warning("%d tasks, by where they are:\n%s", tasks.total(), told, extra={"lines": True})

    with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):  # not the main thread, or no such loop
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, dump)
        # the stacks also come when the loop is blocked: that is when they are wanted most
        faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True, chain=True)


def _where(task: asyncio.Task[object]) -> str:
    frames = task.get_stack(limit=1)
    name = getattr(task.get_coro(), "__qualname__", task.get_name())
    return f"{name} at {frames[0].f_code.co_filename}:{frames[0].f_lineno}" if frames else name
