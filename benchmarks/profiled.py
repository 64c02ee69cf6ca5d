"""Run `dynamo-grpc` under cProfile: `python benchmarks/profiled.py OUT COMMAND …` writes OUT.pstats and OUT.txt.

Counting calls costs about as much again as the calls: read the shares, not the times.
"""

from __future__ import annotations

import cProfile
import os
import pstats
import signal
import sys
from types import FrameType
from typing import NoReturn

_SHOWN = 60


def main() -> None:
    """Profile until the command ends, by itself or by SIGTERM."""
    out, args = sys.argv[1], sys.argv[2:]
    sys.argv = ["dynamo-grpc", *args]
    from dynamo_grpc.cli import main as command

    profile = cProfile.Profile()
    real_exit = os._exit

    def write() -> None:
        profile.disable()
        with open(f"{out}.txt", "w", encoding="utf-8") as file:  # noqa: PTH123 - the process is about to end
            stats = pstats.Stats(profile, stream=file)
            stats.dump_stats(f"{out}.pstats")
            stats.sort_stats("tottime").print_stats(_SHOWN)
            stats.sort_stats("cumtime").print_stats(_SHOWN)

    def end(number: int, frame: FrameType | None = None) -> NoReturn:
        write()
        real_exit(0)

    os._exit = end
    signal.signal(signal.SIGTERM, end)  # uvicorn raises the signal again when it has ended
    profile.enable()
    try:
        command(args, standalone_mode=False)
    finally:
        write()


if __name__ == "__main__":
    main()
