"""Workers that are killed under load: every answer is the one it would have been."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable

import httpx
import pytest

from ..conftest import Process
from .test_up import CHAT, until

Start = Callable[..., Process]
NUM_STREAMS, NUM_TOKENS = 12, 120


def ask(url: str, seed: int) -> str:
    """The text of one streamed answer, or what went wrong."""
    body = {**CHAT, "seed": seed, "stream": True, "max_tokens": NUM_TOKENS, "temperature": 0.9}
    body["ignore_eos"] = True
    try:
        response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    except httpx.HTTPError as error:
        return repr(error)
    if response.status_code != 200 or not response.text.endswith("data: [DONE]\n\n"):
        return f"{response.status_code}: {response.text[-500:]}"
    return "".join(re.findall(r'"content":"((?:[^"\\]|\\.)*)"', response.text))


@pytest.mark.full
@pytest.mark.timeout(300)
def test_workers_are_killed_again_and_again(cli: Start) -> None:
    registry = cli("registry", "--port", "0")
    env = {"ETCD_ENDPOINTS": registry.wait_for(r"registry ready at (\S+)")[1], "ETCD_LEASE_TTL": "2"}
    workers = [cli("worker", "tiny", env=env) for _ in range(3)]
    for worker in workers:
        worker.wait_for("worker ready")
    # a slow machine may lose an answer's worker more than three times
    front = cli("frontend", "--http-port", "0", "--migration-limit", "100", env=env)
    url = front.wait_for(r"ready at (http://\S+)")[1]
    until(lambda: len(httpx.get(f"{url}/health").json()["instances"]) == 3)
    wanted = [ask(url, seed) for seed in range(NUM_STREAMS)]
    assert len(set(wanted)) == NUM_STREAMS
    assert all(len(text) > NUM_TOKENS for text in wanted), wanted

    stop, wrong, num_answers = threading.Event(), [], itertools.count()

    def load(seed: int) -> None:
        while not stop.is_set():
            if (text := ask(url, seed)) != wanted[seed]:
                wrong.append((seed, text))
            next(num_answers)

    threads = [threading.Thread(target=load, args=(seed,), daemon=True) for seed in range(NUM_STREAMS)]
    for thread in threads:
        thread.start()
    for turn in range(20):
        time.sleep(1.0)
        workers[turn % 3].close_at_once()
        workers[turn % 3] = cli("worker", "tiny", env=env)
        workers[turn % 3].wait_for("worker ready")
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not wrong, "\n".join(f"{seed}: {text}" for seed, text in wrong)
    metrics = httpx.get(f"{url}/metrics").text
    moved = re.search(
        r'model_migration_total\{dynamo_namespace="dynamo",migration_type="ongoing_request",model="tiny"\} (\d+)',
        metrics,
    )
    assert moved, "no answer was ever in the middle when its worker was killed"
    print(f"{next(num_answers)} answers, {moved[1]} went on elsewhere")
    assert "migrations=1" in front.output
