"""Measure the path from HTTP to worker and back: `make bench`, or `python benchmarks/run.py --peers`.

Each shape is measured with each system in turn, three times over; the table has the medians. Tokens are counted by
Little's law (in a closed loop, streams x tokens / mean time of a request), which doesn't depend on how many of them a
system puts into one event. The machine's speed drifts: compare what stands in one table.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import uvloop
from load import Load, percentile_ms
from systems import Dynamo, Ours, Smg, System, cpu_s, rss_bytes

_WARM_UP_S = 2.0


@dataclass(frozen=True, slots=True)
class Shape:
    """A load.

    Attributes:
        worker: of benchmarks/worker.py; peers have the one that awaits only its pause.
    """

    name: str
    streams: int
    tokens: int
    delay_s: float
    worker: str = "Pacer"
    has_peers: bool = True


@dataclass(frozen=True, slots=True)
class Result:
    """What one run gave; times in ms, CPU in µs for each token, memory in MiB."""

    tokens_per_s: float
    frontend_us: float
    worker_us: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    total_p50: float
    frontend_mib: float
    worker_mib: float

    @property
    def total_us(self) -> float:
        """CPU of frontend and worker for a token."""
        return self.frontend_us + self.worker_us


SHAPES = {
    "paced": Shape("256 streams, a token each 20 ms, 100 tokens", 256, 100, 0.02),
    "long": Shape("256 streams, a token each 20 ms, 400 tokens", 256, 400, 0.02),
    "many": Shape("512 streams, a token each 20 ms, 100 tokens", 512, 100, 0.02),
    "flat": Shape("64 streams, flat out, 100 tokens", 64, 100, 0.0),
    "yielding": Shape("64 streams, flat out, a worker that awaits", 64, 100, 0.0, "Yielding", has_peers=False),
    "batch": Shape("64 streams, flat out, a worker that steps a batch", 64, 100, 0.0, "Batcher", has_peers=False),
    "equal": Shape("64 streams, 25 000 tokens/s in all", 64, 100, 64 / 25_000),
    "single": Shape("1 stream, flat out", 1, 100, 0.0),
}


def measure(make: Callable[[Shape], System], shape: Shape, seconds: float, spread: float) -> Result:
    """One run."""
    system = make(shape)
    try:
        marks: list[list[float]] = []

        def mark() -> None:
            marks.append([cpu_s(pid) for pid in system.pids])

        length_s = shape.tokens * shape.delay_s
        load = Load(system.address, shape.streams, shape.tokens, spread_s=spread * length_s)
        seen, probe = uvloop.run(load.run(_WARM_UP_S, max(seconds, 4 * length_s), mark))
        window_s = max(seconds, 4 * length_s)
        tokens = shape.streams * shape.tokens / statistics.fmean(seen.totals) * window_s
        frontend, worker = ((after - before) / tokens * 1e6 for before, after in zip(*marks, strict=True))
        first = probe.ttft if shape.streams > 1 else seen.ttft
        memory = [rss_bytes(pid) / 2**20 for pid in system.pids]
        return Result(
            tokens / window_s, frontend, worker, percentile_ms(first, 50), percentile_ms(first, 99),
            percentile_ms(seen.gaps, 50), percentile_ms(seen.gaps, 99), percentile_ms(seen.totals, 50), *memory,
        )  # fmt: skip
    finally:
        system.stop()


def median(results: Sequence[Result]) -> Result:
    """Field by field."""
    rows = [list(asdict(result).values()) for result in results]
    return Result(*(statistics.median(column) for column in zip(*rows, strict=True)))


_HEAD = (
    "| shape | system | tokens/s | CPU µs a token: frontend + worker | ratio | first token p50 / p99 ms | "
    "between tokens p50 / p99 ms | whole p50 ms | memory MiB |"
)


def row(shape: Shape, name: str, result: Result, ours: Result) -> str:
    """A line of the table."""
    return (
        f"| {shape.name} | {name} | {result.tokens_per_s:,.0f} | {result.frontend_us:.1f} + {result.worker_us:.1f} = "
        f"{result.total_us:.1f} | {result.total_us / ours.total_us:.2f} | "
        f"{result.ttft_p50:.1f} / {result.ttft_p99:.1f} | {result.itl_p50:.2f} / {result.itl_p99:.2f} | "
        f"{result.total_p50:.1f} | {result.frontend_mib:.0f} + {result.worker_mib:.0f} |"
    )


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"some of {', '.join(SHAPES)}; default all")
    parser.add_argument("--peers", action="store_true", help="measure Dynamo and SMG too (installs them, about 1 GB)")
    parser.add_argument("--seconds", type=float, default=8.0, help="for each run (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, interleaved (default 3)")
    parser.add_argument(
        "--spread",
        type=float,
        default=0.0,
        help="clients begin within this part of an answer's time (default 0: at once)",
    )
    parser.add_argument(
        "--profile", type=Path, metavar="FOLDER", help="profile our frontend and worker: FOLDER/SHAPE/frontend.txt …"
    )
    parser.add_argument("--json", type=Path, help="write all results there")
    args = parser.parse_args()
    if unknown := set(args.shapes) - set(SHAPES):
        parser.error(f"no shape {', '.join(sorted(unknown))}: there are {', '.join(SHAPES)}")
    kept = []
    print(f"{time.strftime('%Y-%m-%d')}, {platform.processor() or platform.machine()}, Python {sys.version.split()[0]}")
    print(_HEAD, "|---" * 9 + "|", sep="\n", flush=True)
    for key in args.shapes or SHAPES:
        shape = SHAPES[key]
        profile = args.profile / key if args.profile else None

        def ours(shape: Shape, profile: Path | None = profile) -> System:
            return Ours(shape.delay_s, shape.worker, profile=profile)

        makers: dict[str, Callable[[Shape], System]] = {"dynamo-grpc": ours}
        if args.peers and shape.has_peers:
            makers |= {"SMG 1.13.0": lambda s: Smg(s.delay_s), "Dynamo 1.6.1": lambda s: Dynamo(s.delay_s)}
        results: dict[str, list[Result]] = {name: [] for name in makers}
        for _ in range(args.rounds):
            for name, make in makers.items():
                results[name].append(measure(make, shape, args.seconds, args.spread))
        medians = {name: median(found) for name, found in results.items()}
        for name, result in medians.items():
            print(row(shape, name, result, medians["dynamo-grpc"]), flush=True)
            kept.append({"shape": key, "system": name, "runs": [asdict(run) for run in results[name]]})
    if args.json:
        args.json.write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
