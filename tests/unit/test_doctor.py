"""What the doctor concludes from what it sees."""

import dataclasses
import time
from typing import Any

import grpc
import pytest

from dynamo_grpc.doctor import Facts, Level, examine, likely_reason
from dynamo_grpc.records import InstanceRecord
from dynamo_grpc.survey import Answer, Sighting, shown_age
from dynamo_grpc.v1 import control_pb2, model_card_pb2

ETCD = "etcd at etcd-0:2379"
READY = control_pb2.WORKER_STATE_READY


def sighting(instance_id: int = 1, state: int | None = READY, refused: str = "", **changes: Any) -> Sighting:
    """An instance of model `m`; `state` None does not answer."""
    fields = {
        "namespace": "prod",
        "component": "backend",
        "endpoint": "generate",
        "model": "m",
        "address": "10.0.0.1:9000",
        "version": "1",
    }
    ahead_s, registry = changes.pop("ahead_s", 0.0), changes.pop("registry", None)
    instance = model_card_pb2.Instance(instance_id=instance_id, **{**fields, **changes})
    record = InstanceRecord(f"/i/{instance_id}", instance_id, instance)
    if state is None:
        error = "UNAVAILABLE: connection refused"
        return Sighting(record, Answer(instance.address, error=error, code=grpc.StatusCode.UNAVAILABLE))
    said = control_pb2.DescribeResponse(instances=[instance], state=state, registry=registry)  # type: ignore[arg-type]
    return Sighting(record, Answer(instance.address, said, clock_ahead_s=ahead_s), refused)


def reason(facts: Facts) -> str:
    found = likely_reason(examine(facts))
    return found.text if found else ""


def facts(*sightings: Sighting, **changes: Any) -> Facts:
    return dataclasses.replace(Facts(ETCD, "1", sightings=sightings), **changes)


def health(*instance_ids: int, **changes: Any) -> dict[str, Any]:
    return {
        "status": "healthy",
        "version": "1",
        "namespace": None,
        "models": ["m"],
        "registry": {"description": ETCD, "unreachable_since": None},
        "instances": [{"instance_id": f"{i:016x}"} for i in instance_ids],
        **changes,
    }


def seen(*instance_ids: int, **changes: Any) -> dict[str, Any]:
    return {"frontend": health(*instance_ids, **changes), "frontend_url": "http://f:8000"}


def test_a_mesh_that_is_well() -> None:
    registry = control_pb2.RegistryStatus(description=ETCD)
    findings = examine(facts(sighting(1, registry=registry), sighting(2), **seen(1, 2), wanted="m"))
    texts = "\n".join(finding.text for finding in findings)
    assert f"registered - ago with {ETCD}" in texts  # which registry and namespace each side sees
    assert f"all namespaces of {ETCD}" in texts
    assert {finding.level for finding in findings} == {Level.OK}
    assert likely_reason(findings) is None


@pytest.mark.parametrize(
    ("case", "told"),
    [
        (facts(unreachable="etcd at etcd-0:2379 does not answer: refused"), "does not answer: refused"),
        (facts(), f"no instance is registered in {ETCD}"),
        (facts(newer=["/dynamo_grpc/v2/instances/x"]), "another schema than this version"),
        (facts(sighting(1, None)), "listed, and doesn't answer: UNAVAILABLE"),
        (facts(sighting(1, None, address="127.0.0.1:1")), "see --advertise"),
        (facts(sighting(1, refused="another card holds")), "another card holds"),
        (facts(sighting(1), wanted="prod.backend.generat"), "did you mean 'prod.backend.generate'"),
        (facts(sighting(1), wanted="other"), "nobody registers it; there is 'm', 'prod.backend.generate'"),
        (facts(sighting(1, control_pb2.WORKER_STATE_DRAINING), wanted="m"), "1 registered, none is ready: 'draining'"),
        (
            facts(sighting(1), **seen(namespace="dev", models=[])),
            "serves namespace 'dev' alone, there are models in 'prod'",
        ),
        (
            facts(sighting(1), **seen(models=[], registry={"description": "etcd at other:2379"})),
            f"it looks at etcd at other:2379, and the instances are in {ETCD}",
        ),
        (facts(sighting(1), sighting(2), **seen(1)), "0000000000000002' are ready and it doesn't route to them"),
    ],
)
def test_the_likely_reason(case: Facts, told: str) -> None:
    assert told in reason(case)


@pytest.mark.parametrize(
    ("registry", "told"),
    [
        ({"description": "etcd at other:2379"}, f"registers with etcd at other:2379, and you look at {ETCD}"),
        ({"description": ETCD, "problem": "permission denied"}, "can't register with etcd at etcd-0:2379: permission"),
        ({}, "doesn't say where it registers"),
        ({"description": ETCD}, "on its way, or was taken away"),
    ],
)
def test_a_worker_that_is_not_in_the_registry(registry: dict[str, str], told: str) -> None:
    stranger = sighting(9, registry=control_pb2.RegistryStatus(**registry)).answer
    assert told in reason(facts(sighting(1), strangers=[stranger]))
    assert "does not answer: refused" in reason(facts(strangers=[Answer("h:1", error="refused")]))


def test_what_is_odd_and_no_problem() -> None:
    cut_off = control_pb2.RegistryStatus(description=ETCD, problem="keeping leases alive: UNAVAILABLE")
    odd = facts(
        sighting(1, ahead_s=-3600.0),
        sighting(2, registry=cut_off),
        sighting(3, control_pb2.WORKER_STATE_STARTING),
        sighting(4, version="0"),
        bad=[("/x", "it is no Instance")],
        members=[("etcd-0:2379", "answers in 1.0 ms, etcd 3.5.1", True), ("etcd-1:2379", "UNAVAILABLE", False)],
        frontend_url="http://f:8000",
        frontend_error="does not answer: refused",
    )
    findings = examine(odd)
    assert likely_reason(findings) is None
    texts = "\n".join(f"{finding.level.value} {finding.text}" for finding in findings)
    for told in (
        "its clock is 3600 s behind ours",
        "can't reach its registry (etcd at etcd-0:2379): keeping leases alive",
        "starting, takes no new requests",
        "version 0, this one is 1",
        "/x is left out: it is no Instance",
        "warning etcd-1:2379: UNAVAILABLE",
        "note http://f:8000: does not answer",
    ):
        assert told in texts


def test_states() -> None:
    assert sighting(1).state == "ready"
    assert sighting(1, None).state == "unreachable"
    other = sighting(2).answer
    assert dataclasses.replace(sighting(1), answer=other).state == "gone"
    no_control = Answer("h:1", error="UNIMPLEMENTED", code=grpc.StatusCode.UNIMPLEMENTED)
    assert dataclasses.replace(sighting(1), answer=no_control).state == "ready"


def test_ages_are_by_the_workers_own_clock() -> None:
    seen = sighting(1)
    assert seen.age_s is None
    assert seen.answer.said is not None
    seen.record.instance.registered_at.FromSeconds(int(time.time()) + 3600)
    seen.answer.said.measured_at.FromSeconds(int(time.time()) + 3642)
    assert seen.age_s is not None
    assert 41 <= seen.age_s <= 43
    assert [shown_age(s) for s in (None, -1, 42, 119, 120, 7_300, 200_000)] == [
        "-",
        "0s",
        "42s",
        "119s",
        "2m",
        "2h",
        "2d",
    ]
