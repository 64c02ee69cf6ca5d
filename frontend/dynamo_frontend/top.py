"""`dynamo-grpc top`: the mesh at a glance, in the terminal, as one frontend sees it."""

from __future__ import annotations

import asyncio
import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import click
import grpc
from rich.markup import escape
from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import DataTable, Footer, Input, Static

from dynamo_frontend.figures import History, ModelRow, Moment, WorkerRow, read_metrics
from dynamo_grpc.cli.options import MeshCommand, option
from dynamo_grpc.connections import CHANNEL_OPTIONS
from dynamo_grpc.v1 import control_pb2, control_pb2_grpc

_LIMIT_S = 5.0
_MODELS = ("model", "workers", "run", "wait", "req/s", "err/s", "tok/s", "TTFT p50", "p99 ms", "ITL p50", "p99 ms")
_WORKERS = ("worker", "address", "model", "state", "run", "wait", "req/s", "tok/s", "blocks")
_ERRORS = ("ago", "status", "error", "model", "request", "message")


def fetch(url: str) -> Moment:
    """What the frontend tells now; blocks.

    Raises:
        OSError: it can't be reached.
    """

    def get(path: str) -> bytes:
        try:
            with urllib.request.urlopen(f"{url}{path}", timeout=_LIMIT_S) as answer:  # noqa: S310 - http alone
                return bytes(answer.read())
        except urllib.error.HTTPError as error:  # /health says 503 and why
            return bytes(error.read())

    text, health, debug = get("/metrics?workers=1"), get("/health"), get("/debug/requests")
    told = json.loads(debug)
    return Moment(time.monotonic(), read_metrics(text.decode()), json.loads(health), told if "requests" in told else {})


async def drain(address: str) -> str:
    """Ask a worker to drain; gives what to say of it."""
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        try:
            answer = await control_pb2_grpc.ControlStub(channel).Drain(control_pb2.DrainRequest(), timeout=_LIMIT_S)
        except grpc.aio.AioRpcError as error:
            return f"{address} was not drained: {error.details()}"
    return f"{address} drains; {answer.num_requests} requests run there"


class Top(App[None]):
    """The screen.

    Args:
        url: of the frontend.
        interval_s: between two looks.
        look: asks the frontend.
    """

    TITLE = "dynamo-grpc top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #head { height: auto; padding: 0 1; background: $panel; }
    DataTable { height: 1fr; border-top: solid $primary; }
    #models { height: auto; max-height: 40%; }
    #errors { height: auto; max-height: 30%; }
    #filter { display: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("s", "sort", "Sort"),
        Binding("slash", "filter", "Filter"),
        Binding("d", "drain", "Drain the worker"),
        Binding("escape", "unfilter", "All", show=False),
    ]

    def __init__(self, url: str, interval_s: float, look: Callable[[str], Moment] = fetch) -> None:
        super().__init__()
        self._url, self._interval_s, self._look = url, interval_s, look
        self._history = History()
        self._sort_by = 0
        self._wanted = ""
        self._armed = ""
        self._said = ""

    def compose(self) -> ComposeResult:
        yield Static("looking …", id="head")
        with Vertical():
            for name, columns in (("models", _MODELS), ("workers", _WORKERS), ("errors", _ERRORS)):
                table: DataTable[Text] = DataTable(id=name, cursor_type="row", zebra_stripes=True)
                table.add_columns(*columns)
                yield table
        yield Input(placeholder="part of a model's, worker's or address's name", id="filter")
        yield Footer()

    def on_mount(self) -> None:
        self.query_one("#workers").focus()
        self.run_worker(self._watch(), exclusive=True)

    async def _watch(self) -> None:
        while True:
            try:
                self._history.add(await asyncio.to_thread(self._look, self._url))
                self._show()
            except (OSError, ValueError, LookupError, http.client.HTTPException) as error:
                self.query_one("#head", Static).update(
                    escape(f"no frontend answers at {self._url}: {error or type(error).__name__}")
                )
            await asyncio.sleep(self._interval_s)

    # -- what is shown ------------------------------------------------------------------------------------------------

    def _show(self) -> None:
        if not self._history.moments:
            return
        models, workers = self._history.models(), self._history.workers()
        self._show_head(models)
        wanted = self._wanted.lower()
        rows = [_model(row) for row in models if wanted in row.name.lower()]
        self._fill("models", rows)
        shown = [row for row in workers if wanted in f"{row.instance_id} {row.address} {row.model}".lower()]
        self._fill("workers", sorted(map(_worker, shown), key=lambda row: _sortable(row[self._sort_by])))
        now = time.time()
        self._fill("errors", [_error(row, now) for row in self._history.errors()[:20]])

    def _show_head(self, models: Sequence[ModelRow]) -> None:
        moment = self._history.moments[-1]
        health, registry = moment.health, moment.health.get("registry", {})
        figures = [
            f"{health.get('status', '?')}  {len(models)} models  {len(health.get('instances', ()))} workers",
            f"{sum(row.num_running for row in models)} run, {sum(row.num_queued for row in models)} of them wait",
            f"{sum(row.requests_per_s for row in models):.1f} req/s",
            f"{sum(row.tokens_per_s for row in models):.0f} tok/s",
        ]
        lines = [f"[b]{self._url}[/b]  " + "   ".join(figures)]
        if problem := registry.get("problem") or health.get("message"):
            lines.append(f"[yellow]{escape(problem)}[/yellow]")
        lines.append(
            escape(self._said) or f"sorted by {_WORKERS[self._sort_by]}; rates and percentiles of the last 10 s"
        )
        self.query_one("#head", Static).update("\n".join(lines))

    def _fill(self, name: str, rows: Sequence[Sequence[str]]) -> None:
        table = self.query_one(f"#{name}", DataTable)
        kept = table.cursor_row
        table.clear()
        for row in rows:
            table.add_row(*map(Text, row))  # not markup: names and messages are others' words
        if rows:
            table.move_cursor(row=min(kept, len(rows) - 1))

    # -- keys ---------------------------------------------------------------------------------------------------------

    def action_sort(self) -> None:
        """Sort workers by the next column."""
        self._sort_by = (self._sort_by + 1) % len(_WORKERS)
        self._show()

    def action_filter(self) -> None:
        """Ask what to show."""
        field = self.query_one("#filter", Input)
        field.display = True
        field.focus()

    def action_unfilter(self) -> None:
        """Show all."""
        self._wanted = self._armed = self._said = ""
        self._close_filter()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self._wanted = event.value
        self._close_filter()

    def _close_filter(self) -> None:
        self.query_one("#filter", Input).display = False
        self.query_one("#workers").focus()
        self._show()

    async def action_drain(self) -> None:
        """Drain the worker under the cursor; at the second press."""
        table = self.query_one("#workers", DataTable)
        if not table.row_count:
            return
        row = table.get_row_at(table.cursor_row)
        worker, address = str(row[0]), str(row[1])
        if self._armed != worker:
            self._armed, self._said = worker, f"press d again to drain {worker} at {address}, escape to leave it"
        else:
            self._armed, self._said = "", await drain(address)
        self._show()


def _number(value: float | None, text: str = "{:.0f}") -> str:
    return "-" if value is None or math.isnan(value) else text.format(value)


def _ms(value_s: float) -> str:
    return _number(value_s * 1e3, "{:.1f}")


def _model(row: ModelRow) -> list[str]:
    rates = [f"{row.requests_per_s:.1f}", f"{row.errors_per_s:.1f}", f"{row.tokens_per_s:.0f}"]
    counts = [str(row.num_workers), str(row.num_running), str(row.num_queued)]
    return [row.name, *counts, *rates, *map(_ms, (*row.ttft_s, *row.gap_s))]


def _worker(row: WorkerRow) -> list[str]:
    blocks = _number(None if row.blocks is None else row.blocks * 100, "{:.0f} %")
    counts = [_number(row.num_running), _number(row.num_queued)]
    rates = [f"{row.requests_per_s:.1f}", f"{row.tokens_per_s:.0f}"]
    return [row.instance_id, row.address, row.model, row.state, *counts, *rates, blocks]


def _error(row: Any, now: float) -> list[str]:
    message = str(row["message"]).replace("\n", " ")[:200]
    return [f"{now - row['at']:.0f} s", str(row["status"]), row["error_type"], row["model"], row["id"][:12], message]


def _sortable(text: str) -> tuple[int, float, str]:
    """Numbers from the largest, then texts, then what isn't known."""
    number = text.removesuffix(" %")
    try:
        return 0, -float(number), ""
    except ValueError:
        return (2, 0.0, "") if text == "-" else (1, 0.0, text)


@click.command(
    cls=MeshCommand,
    epilog="""\b
Examples:
  dynamo-grpc top
  dynamo-grpc top --frontend http://gateway:8000 --interval-s 2

\b
Keys: s sorts the workers, / shows those alone whose name has a text, d (twice) drains one, q ends.""",
)
@option("--frontend", "Address of the frontend.", default="http://localhost:8000", envvar="DYN_FRONTEND", metavar="URL")
@option("--interval-s", "Seconds between two looks.", default=1.0, type=click.FloatRange(0.1))
def top(frontend: str, interval_s: float) -> None:
    """Watch models, workers, rates and errors."""
    url = (frontend if "//" in frontend else f"http://{frontend}").rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise click.ClickException(f"{frontend!r} is no URL of a frontend, such as http://localhost:8000")
    Top(url, interval_s).run()
