"""An answer over HTTP that moves after any number of tokens is the answer that never moved: text, logprobs, usage, end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import dynamo_workers.tiny as tiny
import pytest

from dynamo_grpc import DistributedRuntime, RouterMode
from dynamo_grpc.testing import Faults, Mesh
from dynamo_grpc.worker import model_of, serve_options

from ..conftest import both_lanes, both_lanes_long, eventually
from .front import CHAT, Front, front_of

CASES: dict[str, dict[str, Any]] = {
    "seed": {"max_tokens": 12, "temperature": 1.0},
    "limit at the seam": {"max_tokens": 4},
    "end at the seam": {"max_tokens": 5, "min_tokens": 5},
    "logprobs": {"max_tokens": 10, "logprobs": True, "top_logprobs": 2},
    "penalties": {"max_tokens": 12, "presence_penalty": 1.5, "frequency_penalty": 1.0, "repetition_penalty": 1.3},
    "min_tokens": {"max_tokens": 80, "min_tokens": 70},
    "own end": {"max_tokens": 200},
}


class Prefer:
    """A policy that picks one instance for as long as it may."""

    def __init__(self, instance_id: int) -> None:
        self._instance_id = instance_id

    def choose(self, candidates: Sequence[Any]) -> Any:
        return next((c for c in candidates if c.instance_id == self._instance_id), candidates[0])


def seen(text: str) -> dict[str, Any]:
    """What a client knows at the end of a stream."""
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    choices = [choice for event in events for choice in event["choices"]]
    usage = events[-1]["usage"]
    moved = usage.pop("num_migrations", 0)
    logprobs = [entry for choice in choices for entry in (choice.get("logprobs") or {}).get("content") or ()]
    return {
        "text": "".join(choice["delta"].get("content") or "" for choice in choices),
        "ends": [choice["finish_reason"] for choice in choices if choice["finish_reason"]],
        "usage": usage,
        "logprobs": logprobs,
        "moved": moved,
    }


async def serve_two(mesh: Mesh, faults: Faults) -> DistributedRuntime:
    """One worker with faults, whose runtime is returned, and one without."""
    worker = tiny.Tiny()
    await worker.start()
    name = "dynamo.backend.generate"
    leaving = await mesh.serve(name, faults.wrap(worker.generate), model_of(tiny.Tiny), **serve_options(worker))
    await mesh.serve_worker(tiny.Tiny())
    return leaving


async def ask(front: Front, **options: Any) -> dict[str, Any]:
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}, **options}
    response = await front.post(body)
    assert response.text.endswith("data: [DONE]\n\n"), response.text
    return seen(response.text)


@both_lanes_long
async def test_moved_anywhere(mesh: Mesh) -> None:
    faults = Faults()
    leaving = await serve_two(mesh, faults)
    async with front_of(mesh) as front:
        await eventually(front.frontend.catalog.ready)
        (model,) = front.frontend.catalog.all()
        await eventually(lambda: len(model.instances.routable()) == 2)
        model.router._policies[RouterMode.RoundRobin] = Prefer(leaving.instance_id)
        faults.leave_after = None
        whole = await ask(front, max_tokens=40)
        words = whole["text"].split()
        stops = {f"stop at {word!r}": {"max_tokens": 40, "stop": [word]} for word in words[1:8]}
        stops["stop over two words"] = {"max_tokens": 40, "stop": [f"{words[3]} {words[4]}"]}
        for case, options in {**CASES, **stops}.items():
            faults.leave_after = None
            wanted = await ask(front, **options)
            assert wanted["moved"] == 0
            num_tokens = wanted["usage"]["completion_tokens"]
            for cut in (cut for cut in (1, 2, 3, 5, 8) if cut < num_tokens):
                faults.leave_after = cut
                moved = await ask(front, **options)
                assert moved["moved"] == 1, (case, cut)
                assert {**moved, "moved": 0} == wanted, (case, cut)
            faults.leave_after = num_tokens  # it was whole when its worker left
            assert {**(await ask(front, **options)), "moved": 0} == wanted, case


@both_lanes
@pytest.mark.parametrize("options", [{"n": 2}, {"logprobs": True, "n": 3}])
async def test_several_choices_end_with_the_reason(mesh: Mesh, options: dict[str, Any]) -> None:
    leaving = await serve_two(mesh, Faults(leave_after=3))
    async with front_of(mesh) as front:
        await eventually(front.frontend.catalog.ready)
        (model,) = front.frontend.catalog.all()
        model.router._policies[RouterMode.RoundRobin] = Prefer(leaving.instance_id)
        response = await front.post({**CHAT, "stream": True, "max_tokens": 9, **options})
        assert "it can't go on elsewhere: it has several choices at once" in response.text
        assert "[DONE]" not in response.text
