"""Draw the results of `run.py --peers --json FILE`: `python benchmarks/chart.py FILE > docs/benchmark.svg`."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

_COLORS = {"dynamo-grpc": "#2a6fdb", "SMG 1.13.0": "#9aa4b2", "Dynamo 1.6.1": "#c9ced6"}
_WIDTH, _LABEL, _BAR, _GAP = 760, 120, 18, 6


def panel(title: str, values: Mapping[str, float], unit: str, top: int) -> tuple[list[str], int]:
    """A group of bars; gives its lines and where the next one begins."""
    lines = [f'<text x="0" y="{top + 14}" font-weight="600">{escape(title)}</text>']
    top += 24
    scale = (_WIDTH - _LABEL - 150) / max(values.values())
    for name, value in values.items():
        length = max(1.0, value * scale)
        lines += [
            f'<text x="{_LABEL - 8}" y="{top + 14}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{_LABEL}" y="{top}" width="{length:.1f}" height="{_BAR}" rx="2" fill="{_COLORS[name]}"/>',
            f'<text x="{_LABEL + length + 8:.1f}" y="{top + 14}">{value:,.0f} {unit}</text>',
        ]
        top += _BAR + _GAP
    return lines, top + 14


def medians(results: Sequence[Mapping[str, Any]], shape: str, *fields: str) -> dict[str, float]:
    """The sum of some fields, by system."""
    return {
        result["system"]: sum(statistics.median(run[field] for run in result["runs"]) for field in fields)
        for result in results
        if result["shape"] == shape
    }


def main() -> None:
    """Write the picture to standard output."""
    results = json.loads(Path(sys.argv[1]).read_text())
    lines: list[str] = []
    top = 0
    for title, shape, fields, unit in (
        ("CPU of frontend and worker for a token, 256 streams at 20 ms (less is better)", "paced",
         ("frontend_us", "worker_us"), "µs"),
        ("Tokens a second on two cores, 64 streams flat out (more is better)", "flat", ("tokens_per_s",), "tokens/s"),
        ("First token under that load, median (less is better)", "flat", ("ttft_p50",), "ms"),
    ):  # fmt: skip
        more, top = panel(title, medians(results, shape, *fields), unit, top)
        lines += more
    style = "text{font:13px system-ui,sans-serif;fill:#57606a}"
    print(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top}" role="img" '
        f'aria-label="dynamo-grpc beside SMG and Dynamo"><style>{style}</style>',
        *lines,
        "</svg>",
        sep="\n",
    )


if __name__ == "__main__":
    main()
