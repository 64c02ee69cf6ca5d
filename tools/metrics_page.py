"""Write the tables of docs/metrics.md from the metrics themselves: `python tools/metrics_page.py [--check]`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dynamo_frontend.catalog import Catalog
from dynamo_frontend.metrics import Metrics
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from dynamo_grpc.metrics import HIERARCHY, EndpointMetrics
from dynamo_grpc.testing import Mesh

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
Row = tuple[str, str, tuple[str, ...], str]


def rows_of(registry: CollectorRegistry, more: Iterable[str] = ()) -> list[Row]:
    """Name, type, labels and text of what counts."""
    return [
        _row(family, (*more, *getattr(collector, "_labelnames", ())))
        for collector in registry._collector_to_names
        for family in collector.describe()
    ]


def _row(family: Metric, labels: tuple[str, ...]) -> Row:
    name = family.name + ("_total" if family.type == "counter" else "")
    return name, family.type, labels, family.documentation


def frontend_rows() -> list[Row]:
    """What `dynamo-grpc frontend` tells."""
    metrics = Metrics()
    catalog = Catalog.__new__(Catalog)
    catalog._models, catalog._gone, catalog._metrics = {}, {}, metrics
    asked = [_row(family, tuple(family._labelnames)) for family in catalog.families()]  # type: ignore[attr-defined]
    return sorted(rows_of(metrics.registry) + asked)


async def worker_rows() -> list[Row]:
    """What a worker tells."""

    async def handler(request: Any) -> Any:
        return request

    def load() -> dict[str, int]:
        return {"num_total_blocks": 1, "num_used_blocks": 0, "num_prefill_tokens": 0}

    async with Mesh() as mesh:
        runtime = await mesh.serve("page.backend.generate", handler, load=load)
        assert runtime.server.metrics is not None
        counted = rows_of(EndpointMetrics().built_in, HIERARCHY)
        names = {name.removesuffix("_total") for name, *_ in counted}
        for family in text_string_to_metric_families(runtime.server.metrics.text().decode()):
            if family.name not in names:
                has = set(family.samples[0].labels)
                counted.append(_row(family, HIERARCHY if has >= set(HIERARCHY) else tuple(sorted(has))))
    return sorted(counted)


def table(rows: Iterable[Row]) -> str:
    """Rows as Markdown."""
    lines = ["| name | type | labels | what it is |", "|---|---|---|---|"]
    for name, kind, labels, text in rows:
        shown = "of the endpoint" if labels[: len(HIERARCHY)] == HIERARCHY else ""
        rest = labels[len(HIERARCHY) :] if shown else labels
        told = ", ".join(filter(None, [shown, *(f"`{label}`" for label in rest)]))
        lines.append(f"| `{name}` | {kind} | {told} | {text} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the page, or say whether it is what it would be."""
    page = PAGE.read_text(encoding="utf-8")
    made = page
    for mark, rows in (("frontend", frontend_rows()), ("worker", asyncio.run(worker_rows()))):
        begin, end = f"<!-- {mark}: made by tools/metrics_page.py -->\n", f"<!-- end of {mark} -->\n"
        head, _, rest = made.partition(begin)
        made = head + begin + "\n" + table(rows) + "\n" + end + rest.partition(end)[2]
    if "--check" in sys.argv:
        return 0 if made == page else 1
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
