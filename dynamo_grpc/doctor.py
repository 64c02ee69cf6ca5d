"""Why a mesh doesn't serve: what is seen of it, and what follows from that. Pure; `cli.doctor` looks and prints."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dynamo_grpc.errors import names
from dynamo_grpc.names import nearest
from dynamo_grpc.records import endpoint_of, holding_everywhere
from dynamo_grpc.survey import Answer, Sighting, shown_age

#: Clocks further apart than this make logs and traces hard to read; nothing in the mesh depends on them.
_SKEW_S = 2.0


class Level(enum.Enum):
    """How bad a finding is."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        about: registry, instances, frontend, or what was asked for.
        reason: for a problem: how likely it is the reason why nobody answers; the highest is told at the end.
    """

    about: str
    level: Level
    text: str
    reason: int = 0


@dataclass(frozen=True, slots=True)
class Facts:
    """What was seen.

    Attributes:
        registry: what it is, as this process is configured.
        members: what each of its endpoints answered: address and text, or an error.
        unreachable: why it could not be read; empty if it could.
        sightings: the instances, and what they say.
        bad: keys of entries that hold no instance or card, and why.
        newer: keys of another schema than ours.
        strangers: answers of processes that were named, and that no instance in the registry belongs to.
        frontend: its /health; None if it doesn't answer.
        frontend_url: where it was asked; empty if it wasn't.
        frontend_error: why it didn't answer.
        wanted: a model, or namespace.component.endpoint, that should be there; empty means any.
        version: of this library.
    """

    registry: str
    version: str
    members: Sequence[tuple[str, str, bool]] = ()
    unreachable: str = ""
    sightings: Sequence[Sighting] = ()
    bad: Sequence[tuple[str, str]] = ()
    newer: Sequence[str] = ()
    strangers: Sequence[Answer] = ()
    frontend: dict[str, Any] | None = None
    frontend_url: str = ""
    frontend_error: str = ""
    wanted: str = ""


def examine(facts: Facts) -> list[Finding]:
    """All findings, in the order in which a request would meet what they are about."""
    return [
        *_registry(facts),
        *(finding for sighting in facts.sightings for finding in _instance(sighting, facts)),
        *(finding for stranger in facts.strangers for finding in _stranger(stranger, facts)),
        *_frontend(facts),
        *_wanted(facts),
    ]


def likely_reason(findings: Sequence[Finding]) -> Finding | None:
    """The problem that explains most, if there is one."""
    problems = [finding for finding in findings if finding.level is Level.PROBLEM]
    return max(problems, key=lambda finding: finding.reason, default=None)


def _registry(facts: Facts) -> list[Finding]:
    about = "registry"
    findings = [
        Finding(about, Level.OK if is_up else Level.WARNING, f"{address}: {text}")
        for address, text, is_up in facts.members
    ]
    if facts.unreachable:
        findings.append(Finding(about, Level.PROBLEM, facts.unreachable, 100))
        return findings
    if not facts.members:
        findings.append(Finding(about, Level.OK, "can be read"))
    findings += [Finding(about, Level.WARNING, f"{key} is left out: {why}") for key, why in facts.bad]
    if facts.newer:
        text = (
            f"{names(facts.newer, 3)} are of another schema than this version ({facts.version}) reads: "
            "it sees nothing of them, upgrade it"
        )
        findings.append(Finding(about, Level.WARNING if facts.sightings else Level.PROBLEM, text, 80))
    if not facts.sightings:
        text = f"no instance is registered in {facts.registry}: are the workers started, and with the same setting?"
        findings.append(Finding("instances", Level.PROBLEM, text, 50))
    return findings


def _instance(sighting: Sighting, facts: Facts) -> list[Finding]:
    instance, answer = sighting.record.instance, sighting.answer
    where = f"{endpoint_of(instance)} {instance.instance_id:016x} at {instance.address}"
    match sighting.state:
        case "ready":
            model = f", model {instance.model}" if instance.model else ""
            text = f"{where}: ready{model}, epoch {instance.epoch}, registered {shown_age(sighting.age_s)} ago"
            if answer.said is not None and answer.said.registry.description:
                text += f" with {answer.said.registry.description}"
            findings = [Finding("instances", Level.OK, text)]
        case "refused":
            findings = [Finding("instances", Level.PROBLEM, f"{where}: {sighting.refused_because}", 72)]
        case "unreachable":
            hint = ""
            if instance.address.startswith(("127.", "localhost:", "[::1]:", "0.0.0.0:")):
                hint = "; such an address works on the worker's own machine alone, see --advertise"
            text = f"{where}: listed, and doesn't answer: {answer.error}{hint}"
            findings = [Finding("instances", Level.PROBLEM, text, 45)]
        case "busy":
            text = f"{where}: a step that never awaits blocks its event loop (its log names it); its connection stands"
            findings = [Finding("instances", Level.WARNING, text, 40)]
        case "gone":
            text = f"{where}: another process answers there; the entry goes when its lease ends"
            findings = [Finding("instances", Level.WARNING, text)]
        case state:
            findings = [Finding("instances", Level.WARNING, f"{where}: {state}, takes no new requests")]
    if (said := answer.said) is not None and said.registry.problem:
        text = f"{where}: can't reach its registry ({said.registry.description}): {said.registry.problem}"
        findings.append(Finding("instances", Level.WARNING, text))
    return [*findings, *_skew(where, instance.version, answer, facts)]


def _skew(where: str, version: str, answer: Answer, facts: Facts) -> list[Finding]:
    findings = []
    if answer.clock_ahead_s is not None and abs(answer.clock_ahead_s) > _SKEW_S:
        direction = "ahead of" if answer.clock_ahead_s > 0 else "behind"
        text = (
            f"{where}: its clock is {abs(answer.clock_ahead_s):.0f} s {direction} ours; logs and traces won't line up"
        )
        findings.append(Finding("instances", Level.NOTE, text))
    if version and version != facts.version:
        findings.append(Finding("instances", Level.NOTE, f"{where}: version {version}, this one is {facts.version}"))
    return findings


def _stranger(answer: Answer, facts: Facts) -> list[Finding]:
    about = "instances"
    if answer.said is None:
        return [Finding(about, Level.PROBLEM, f"{answer.address}: does not answer: {answer.error}", 60)]
    said = answer.said
    served = [endpoint_of(instance) for instance in said.instances]
    if facts.unreachable:
        where = said.registry.description
        text = f"{answer.address}: serves {names(served)}, is {answer.state}, and registers with {where}"
        return [Finding(about, Level.NOTE, text)]
    if answer.state != "ready" and not said.registry.problem:
        why = f"it is {answer.state}"
    elif not said.registry.description:
        why = "it doesn't say where it registers"
    elif said.registry.problem:
        why = f"it can't register with {said.registry.description}: {said.registry.problem}"
    elif not _is_same(said.registry.description, facts.registry):
        why = f"it registers with {said.registry.description}, and you look at {facts.registry}"
    else:
        why = "its registration is on its way, or was taken away"
    text = f"{answer.address}: serves {names(served)}, and is not in the registry: {why}"
    return [Finding(about, Level.PROBLEM, text, 90), *_skew(answer.address, "", answer, facts)]


def _frontend(facts: Facts) -> list[Finding]:
    about = "frontend"
    if not facts.frontend_url:
        return []
    health = facts.frontend
    if health is None:
        return [Finding(about, Level.NOTE, f"{facts.frontend_url}: {facts.frontend_error}")]
    findings = []
    registry = health.get("registry", {})
    models = names(health.get("models", []))
    spaces = f"namespace {health['namespace']!r}" if health.get("namespace") else "all namespaces"
    text = f"{facts.frontend_url}: {health.get('status')}, models: {models}, {spaces} of {registry.get('description')}"
    findings.append(Finding(about, Level.OK if health.get("models") else Level.WARNING, text))
    if registry.get("unreachable_since"):
        text = f"its registry doesn't answer since {registry['unreachable_since']}: {registry.get('problem')}"
        findings.append(Finding(about, Level.WARNING, text))
    if (version := health.get("version")) and version != facts.version:
        findings.append(Finding(about, Level.NOTE, f"version {version}, this one is {facts.version}"))
    return [*findings, *_routed(health, facts)]


def _routed(health: dict[str, Any], facts: Facts) -> list[Finding]:
    """What a frontend should route to, and doesn't."""
    about, namespace, described = "frontend", health.get("namespace"), health["registry"].get("description")
    ready = [s for s in facts.sightings if s.state == "ready" and s.record.instance.model]
    findings = []
    hidden = [s for s in ready if namespace and s.record.instance.namespace != namespace]
    if hidden:
        others = sorted({s.record.instance.namespace for s in hidden})
        text = f"it serves namespace {namespace!r} alone, there are models in {names(others)} too"
        findings.append(Finding(about, Level.NOTE if len(hidden) < len(ready) else Level.PROBLEM, text, 70))
    left_out = [] if namespace else _in_another_card(ready)
    if left_out:
        models = names(sorted({s.record.instance.model for s in left_out}))
        spaces = names(sorted({s.record.instance.namespace for s in left_out}))
        text = f"it serves all namespaces, and {models} has another card in {spaces}: start it with --namespace"
        findings.append(Finding(about, Level.PROBLEM, text, 71))
    shown = {instance.get("instance_id") for instance in health["instances"]}
    expected = [s for s in ready if s not in hidden and s not in left_out]
    unseen = [i for s in expected if (i := f"{s.record.instance.instance_id:016x}") not in shown]
    if unseen and len(unseen) == len(ready) and not _is_same(described, facts.registry):
        text = f"it looks at {described}, and the instances are in {facts.registry}"
        findings.append(Finding(about, Level.PROBLEM, text, 85))
    elif unseen:
        text = f"{names(unseen, 3)} are ready and it doesn't route to them: can it reach their addresses?"
        findings.append(Finding(about, Level.PROBLEM, text, 65))
    return findings


def _in_another_card(ready: Sequence[Sighting]) -> list[Sighting]:
    """Those that a frontend of all namespaces leaves out: another card holds for the name in another namespace."""
    held = holding_everywhere(sighting.record for sighting in ready)
    return [
        sighting
        for sighting in ready
        if sighting.record.instance.card_checksum != held[sighting.record.instance.model].instance.card_checksum
    ]


def _wanted(facts: Facts) -> list[Finding]:
    wanted = facts.wanted.removeprefix("dyn://")
    if not wanted or facts.unreachable:
        return []
    found = [s for s in facts.sightings if wanted in _names(s)]
    if any(sighting.state == "ready" for sighting in found):
        return [Finding(wanted, Level.OK, f"{sum(s.state == 'ready' for s in found)} of {len(found)} are ready")]
    if found:
        states = sorted({sighting.state for sighting in found})
        return [Finding(wanted, Level.PROBLEM, f"{len(found)} registered, none is ready: {names(states)}", 30)]
    known = sorted({name for sighting in facts.sightings for name in _names(sighting)})
    hint = nearest(wanted, known)
    text = f"nobody registers it; there is {names(known)}" + (f" (did you mean {hint!r}?)" if hint else "")
    return [Finding(wanted, Level.PROBLEM, text, 75)]


def _names(sighting: Sighting) -> set[str]:
    """What a request could ask for to reach it: endpoint, model, and the model's other names."""
    instance, said = sighting.record.instance, sighting.answer.said
    cards = said.cards if said is not None else ()
    aliases = {alias for card in cards if card.name == instance.model for alias in card.aliases}
    return {endpoint_of(instance), instance.model, *aliases} - {""}


def _is_same(described: str | None, other: str) -> bool:
    """Whether two descriptions are of one registry, however its endpoints are written."""
    return _endpoints(described or "") == _endpoints(other)


def _endpoints(described: str) -> set[str]:
    kind, _, endpoints = described.rpartition(" ")
    return {kind, *(endpoint.rpartition("//")[2] for endpoint in endpoints.split(","))}
