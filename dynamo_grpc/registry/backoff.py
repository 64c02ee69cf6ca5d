"""Pauses between attempts: longer each time, and never the same for two processes."""

from __future__ import annotations

import random

#: Who is refused will be again, until somebody changes something: asking often only loads the server.
_REFUSED_S = 10.0


class Backoff:
    """Doubling pauses with jitter.

    Args:
        first_s: the first pause.
        max_s: the longest.
        rng: for the jitter; each pause is 50 to 100 % of what it would be, so that a fleet does not return in one
            instant.
    """

    def __init__(self, first_s: float, max_s: float, rng: random.Random) -> None:
        self._first_s, self._max_s, self._rng = first_s, max_s, rng
        self._pause_s = first_s

    def next_s(self, *, is_refused: bool = False) -> float:
        """How long to wait now."""
        if is_refused:
            return _REFUSED_S * self._rng.uniform(0.5, 1.0)
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, self._max_s)
        return pause_s * self._rng.uniform(0.5, 1.0)

    def reset(self) -> None:
        """It worked: begin anew."""
        self._pause_s = self._first_s
