"""`dynamo-grpc conformance`: judge a worker by the contract."""

from __future__ import annotations

import asyncio
import json

import click

from dynamo_grpc.cli.options import MeshCommand
from dynamo_grpc.conformance import RULES, Broken, Report, Verdict, judge

_MARKS = {"passed": ("ok", "green"), "failed": ("FAILED", "red"), "skipped": ("skipped", "yellow")}


@click.command(
    cls=MeshCommand,
    epilog="""\b
Examples:
  dynamo-grpc conformance localhost:9000
  dynamo-grpc conformance localhost:9000 --drain --json > report.json
  dynamo-grpc conformance localhost:9000 --rule cancel --rule deadline
  dynamo-grpc conformance --list""",
)
@click.argument("address", required=False, metavar="HOST:PORT")
@click.option("--model", help="Model to ask for; the first that the worker describes by default.", default="")
@click.option("--rule", "rules", multiple=True, metavar="NAME", help="Only this rule; may be given again.")
@click.option("--drain", help="Also how it leaves: it serves nothing afterwards.", is_flag=True)
@click.option("--pid", type=int, help="The worker's process: it is told to leave by SIGTERM, not by Control.Drain.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
@click.option("--list", "lists", is_flag=True, help="Show the rules.")
def conformance(
    address: str | None, model: str, rules: tuple[str, ...], drain: bool, pid: int | None, as_json: bool, lists: bool
) -> None:
    """Judge a worker in any language by the contract: what it breaks, and what came instead. Exit code 1 if it does."""
    if lists:
        for rule in RULES:
            click.echo(f"{rule.name:18} {rule.wants}")
        return
    if address is None:
        raise click.UsageError("which worker? give HOST:PORT")
    if unknown := set(rules) - {rule.name for rule in RULES}:
        raise click.UsageError(f"no rule {min(unknown)!r}: --list shows them")
    if "drain" in rules and not (drain or pid):
        raise click.UsageError("the rule drain takes the worker out of service: give --drain, or --pid")
    try:
        report = asyncio.run(
            judge(
                address,
                model,
                only=rules,
                drains=drain or pid is not None,
                pid=pid,
                tell=(lambda _: None) if as_json else _say,
            )
        )
    except Broken as broken:
        raise click.ClickException(str(broken)) from None
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _sum_up(report)
    if report.failed:
        raise SystemExit(1)


def _say(verdict: Verdict) -> None:
    mark, colour = _MARKS[verdict.outcome]
    line = f"{click.style(f'{mark:8}', fg=colour)} {verdict.rule:18} {verdict.took_s:6.2f} s"
    if verdict.outcome == "skipped":
        line += f"  {verdict.came}"
    click.echo(line)
    if verdict.outcome == "failed":
        click.echo(f"           wanted: {verdict.wants}\n           came:   {verdict.came}")


def _sum_up(report: Report) -> None:
    counts = report.to_dict()
    click.echo(
        f"model {report.model} at {report.address}: {counts['passed']} passed, {counts['failed']} failed, "
        f"{counts['skipped']} skipped"
    )
