"""Says which handler blocks the event loop: while it does, no other request of its worker goes on.

A thread asks the loop for a sign of life while requests run. When none comes, it looks at where the loop's thread is:
that costs nothing for each token, and gives the line. Code that also holds the interpreter's lock can't be seen.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import NamedTuple

logger = logging.getLogger(__name__)

#: A step that takes longer is told, once for each handler.
BLOCKED_S = 0.1
_PERIOD_S = 0.02


class _Step(NamedTuple):
    name: str
    step: tuple[int, int, int]
    place: str


class Watchdog:
    """Watches the running loop from a thread of its own.

    Args:
        is_busy: whether requests run; nothing is watched else.
        find: the handler's name, from a frame of the code that reads it and the frame that it called; None for others.
    """

    def __init__(self, is_busy: Callable[[], bool], find: Callable[[FrameType, FrameType], str | None]) -> None:
        self._is_busy, self._find = is_busy, find
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._told: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            if not self._is_busy():
                continue
            alive = threading.Event()
            try:
                self._loop.call_soon_threadsafe(alive.set)
            except RuntimeError:  # the loop is closed
                return
            if alive.wait(_PERIOD_S):
                continue
            before = self._running()
            if before is not None and not alive.wait(BLOCKED_S):
                now = self._running()
                if now is not None and now.step == before.step and not alive.is_set():
                    self._tell(now)
            while not alive.wait(_PERIOD_S) and not self._stop.is_set():
                pass

    def _running(self) -> _Step | None:
        """The handler's step that the loop's thread is in; None in a queue of short ones, or elsewhere."""
        frame = innermost = sys._current_frames().get(self._loop_thread)
        child = None
        while frame is not None:
            if child is not None and (name := self._find(frame, child)) is not None:
                place = f"{innermost.f_code.co_filename}:{innermost.f_lineno}" if innermost else ""
                return _Step(name, (id(frame), frame.f_lasti, id(child)), place)
            frame, child = frame.f_back, frame
        return None

    def _tell(self, running: _Step) -> None:
        if running.name not in self._told:
            self._told.add(running.name)
            logger.warning(
                "handler %s blocks the event loop for over %.0f ms at %s: no other request of this worker goes on "
                "meanwhile; await there, or use asyncio.to_thread",
                running.name,
                BLOCKED_S * 1e3,
                running.place,
            )

    def close(self) -> None:
        """Watch no more."""
        self._stop.set()
