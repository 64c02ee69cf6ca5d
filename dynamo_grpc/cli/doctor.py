"""`dynamo-grpc doctor`."""

from __future__ import annotations

import asyncio
import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any

import click
import grpc

from dynamo_grpc.cli.options import MeshCommand, configure_logging, log_option, option, registry_from, static_option
from dynamo_grpc.doctor import Facts, Level, examine, likely_reason
from dynamo_grpc.errors import ConfigurationError, RegistryError
from dynamo_grpc.names import FAMILY, INSTANCES, MODELS, ROOT, check_address
from dynamo_grpc.records import InstanceRecord, parse_card, parse_instance
from dynamo_grpc.registry import Entry, Registry, wire
from dynamo_grpc.registry.etcd import EtcdRegistry
from dynamo_grpc.survey import ask, survey
from dynamo_grpc.version import __version__

_FRONTEND = "http://127.0.0.1:8000"
_COLOURS = {Level.OK: "green", Level.NOTE: "blue", Level.WARNING: "yellow", Level.PROBLEM: "red"}


@click.command(
    cls=MeshCommand,
    epilog="""\b
Examples:
  dynamo-grpc doctor
  dynamo-grpc doctor tiny                       why does nobody answer for this model?
  dynamo-grpc doctor dynamo.backend.generate    or for this endpoint?
  dynamo-grpc doctor 10.0.0.7:9000              why is this worker not found?

\b
Ends with 1 when there is a problem.""",
)
@click.argument("wanted", nargs=-1, metavar="[MODEL|NAMESPACE.COMPONENT.ENDPOINT|HOST:PORT]...")
@option("--frontend", "Frontend to ask what it sees.", envvar="DYN_FRONTEND", default=_FRONTEND, metavar="URL")
@static_option
@log_option
def doctor(wanted: tuple[str, ...], frontend: str, static: str, log_level: str) -> None:
    """Look at registry, instances and frontend, and say why requests are not answered."""
    configure_logging("error" if log_level == "info" else log_level)
    addresses = [text for text in wanted if _is_address(text)]
    others = [text for text in wanted if not _is_address(text)]
    if len(others) > 1:
        raise ConfigurationError(f"one model or endpoint at a time, not {', '.join(others)}")
    facts = asyncio.run(_look(registry_from(static), addresses, "".join(others), frontend))
    findings = examine(facts)
    click.echo(f"looking at {facts.registry}")
    about = ""
    for finding in findings:
        if finding.about != about:
            about = finding.about
            click.echo(f"\n{about}")
        click.echo(f"  {click.style(finding.level.value.ljust(8), fg=_COLOURS[finding.level])} {finding.text}")
    reason = likely_reason(findings)
    click.echo("\n" + (f"most likely: {reason.text}" if reason else "nothing is wrong"))
    if reason:
        raise SystemExit(1)


def _is_address(text: str) -> bool:
    try:
        check_address(text)
    except ValueError:
        return False
    return True


async def _look(registry: Registry, addresses: list[str], wanted: str, frontend: str) -> Facts:
    async with registry:
        members = await _members(registry)
        entries: list[Entry] = []
        unreachable = ""
        try:
            entries = await registry.list(FAMILY)
        except RegistryError as error:
            unreachable = error.message
    records: list[InstanceRecord] = []
    bad: list[tuple[str, str]] = []
    for entry in entries:
        try:
            if entry.key.startswith(INSTANCES):
                records.append(parse_instance(entry))
            elif entry.key.startswith(MODELS):
                parse_card(entry)
        except ValueError as error:
            bad.append((entry.key, str(error)))
    sightings, answers, (health, problem) = await asyncio.gather(
        survey(records), asyncio.gather(*map(ask, addresses)), asyncio.to_thread(_health, frontend)
    )
    known = {record.instance.instance_id for record in records}
    strangers = [a for a in answers if a.said is None or all(i.instance_id not in known for i in a.said.instances)]
    return Facts(
        registry=registry.description,
        version=__version__,
        members=members,
        unreachable=unreachable,
        sightings=sightings,
        bad=bad,
        newer=[entry.key for entry in entries if not entry.key.startswith(ROOT)],
        strangers=strangers,
        frontend=health,
        frontend_url=frontend,
        frontend_error=problem,
        wanted=wanted,
    )


async def _members(registry: Registry) -> list[tuple[str, str, bool]]:
    """What each of etcd's endpoints answers: address, text, whether it is up."""
    if not isinstance(registry, EtcdRegistry):
        return []
    members = []
    for endpoint in registry.settings.endpoints:
        started = time.monotonic()
        try:
            status = await registry.client.status(endpoint)
        except grpc.aio.AioRpcError as error:
            is_answer = wire.is_refusal(error)
            text = (
                f"answers, and does not tell its status: {wire.describe(error)}" if is_answer else wire.describe(error)
            )
            members.append((endpoint, text, is_answer))
            continue
        text = f"answers in {(time.monotonic() - started) * 1000:.1f} ms, etcd {status.version}"
        members.append((endpoint, text + ("" if status.leader else ", knows no leader"), bool(status.leader)))
    return members


def _health(url: str) -> tuple[dict[str, Any] | None, str]:
    """What a frontend says of itself, or why it doesn't."""
    if not url:
        return None, ""
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{url.rstrip('/')}/health", timeout=3.0) as answer:
            body = answer.read()
    except urllib.error.HTTPError as error:  # 503 has a body that says why
        body = error.read()
    except (OSError, ValueError, http.client.HTTPException) as error:
        return None, f"does not answer: {getattr(error, 'reason', error)}"
    try:
        health = json.loads(body)
        if isinstance(health["registry"], dict) and isinstance(health["instances"], list):
            return health, ""
    except (ValueError, TypeError, KeyError):
        pass
    return None, "what answers there is no frontend of dynamo-grpc"
