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

logger = logging.getLogger(__name__)

#: A step that takes longer is told, once for each handler.
BLOCKED_S = 0.1
_PERIOD_S = 0.02


class Watchdog:
    """Watches the running loop from a thread of its own.

    Args:
        is_busy: whether requests run; nothing is watched else.
        find: the handler's name, from a frame of the code that reads it; None for other frames.
    """

    def __init__(self, is_busy: Callable[[], bool], find: Callable[[FrameType], str | None]) -> None:
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
            if not alive.wait(BLOCKED_S):
                frame = sys._current_frames().get(self._loop_thread)
                if frame is not None and not alive.is_set():
                    self._tell(frame)
                del frame
                while not alive.wait(_PERIOD_S) and not self._stop.is_set():
                    pass

    def _tell(self, innermost: FrameType) -> None:
        name, frame = None, innermost
        while name is None:
            if (name := self._find(frame)) is None:
                if frame.f_back is None:
                    return  # no handler's step: a garbage collection, a task of the engine's own
                frame = frame.f_back
        if name not in self._told:
            self._told.add(name)
            logger.warning(
                "handler %s blocks the event loop for over %.0f ms at %s:%d: no other request of this worker goes on "
                "meanwhile; await there, or use asyncio.to_thread",
                name,
                BLOCKED_S * 1e3,
                innermost.f_code.co_filename,
                innermost.f_lineno,
            )

    def close(self) -> None:
        """Watch no more."""
        self._stop.set()
