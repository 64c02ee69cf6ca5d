"""Which instances are left out for a while because their answers fail, and how they come back. Pure.

One that fails several times in a row is ejected for a second, then one request may try it (half-open): if that is
answered it is back, else it is ejected for twice as long. Never more than half of all are ejected: what fails
everywhere is the requests' fault, or everybody's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

#: So many failures in a row eject.
FAILURES = 5
#: The first ejection and the longest, in seconds.
_FIRST_S, _LONGEST_S = 1.0, 30.0
#: A try whose end nobody tells is over after this long.
TRY_S = 30.0


@dataclass(slots=True)
class _Record:
    num_failures: int = 0
    num_ejections: int = 0
    until: float | None = None
    tried_at: float | None = None


class Ejections:
    """What is known of instances that fail, by key.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._records: dict[str, _Record] = {}

    def __bool__(self) -> bool:
        return bool(self._records)

    def is_out(self, key: str) -> bool:
        """Whether it may not be chosen now."""
        record = self._records.get(key)
        if record is None or record.until is None:
            return False
        return self._clock() < record.until or self._is_tried(record)

    def _is_tried(self, record: _Record) -> bool:
        return record.tried_at is not None and self._clock() < record.tried_at + TRY_S

    def is_ejected(self, key: str) -> bool:
        """Whether it is ejected, or being tried."""
        record = self._records.get(key)
        return record is not None and record.until is not None

    def chosen(self, key: str) -> bool:
        """It was given a request; True if that is the one that tries it."""
        record = self._records.get(key)
        if record is None or record.until is None or self._clock() < record.until or self._is_tried(record):
            return False
        record.tried_at = self._clock()
        return True

    def answered(self, key: str) -> bool:
        """It gave a first output; True if that ends its ejection. One more failure would eject it again."""
        record = self._records.get(key)
        if record is None or record.until is None:
            return False
        record.until, record.tried_at, record.num_failures = None, None, FAILURES - 1
        return True

    def succeeded(self, key: str) -> bool:
        """A request ended well there; True if that ends its ejection."""
        record = self._records.pop(key, None)
        return record is not None and record.until is not None

    def left(self, key: str) -> bool:
        """The request that tried it ended without a verdict; True if another one may try now."""
        record = self._records.get(key)
        if record is None or record.tried_at is None:
            return False
        record.tried_at = None
        return True

    def failed(self, key: str, num_all: int) -> float | None:
        """A request failed there.

        Args:
            num_all: how many instances there are.

        Returns:
            for how many seconds it is ejected, if it is from now on.
        """
        record = self._records.setdefault(key, _Record())
        record.num_failures += 1
        if record.until is None:
            num_out = sum(other.until is not None for other in self._records.values())
            if record.num_failures < FAILURES or (num_out + 1) * 2 > num_all:
                return None
        elif not self._is_tried(record):
            return None  # of a request that was there before
        seconds: float = min(_FIRST_S * 2**record.num_ejections, _LONGEST_S)
        record.num_ejections += 1
        record.until, record.tried_at = self._clock() + seconds, None
        return seconds

    def forget(self, key: str) -> None:
        """It is gone."""
        self._records.pop(key, None)
