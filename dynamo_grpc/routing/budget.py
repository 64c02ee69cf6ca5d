"""How many retries are allowed: a share of the requests, so that a mesh in trouble isn't asked even more. Pure."""

from __future__ import annotations

import time
from collections.abc import Callable


class RetryBudget:
    """Counts requests and retries; both fade with a half-life of seconds.

    Args:
        share: retries for each request.
        floor: retries that are always allowed, within about ten seconds.
        clock: monotonic seconds.
    """

    def __init__(self, share: float = 0.2, floor: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._share, self._floor, self._clock = share, floor, clock
        self._half_life_s = 10.0
        self._num_requests = self._num_retries = 0.0
        self._at = clock()

    def _fade(self) -> None:
        now = self._clock()
        if now - self._at > 0.1:
            kept = 0.5 ** ((now - self._at) / self._half_life_s)
            self._num_requests *= kept
            self._num_retries *= kept
            self._at = now

    def request(self) -> None:
        """A request came."""
        self._fade()
        self._num_requests += 1

    def spend(self) -> bool:
        """Whether one more retry is allowed; it is counted then."""
        self._fade()
        if self._num_retries + 1 > self._floor + self._share * self._num_requests:
            return False
        self._num_retries += 1
        return True
