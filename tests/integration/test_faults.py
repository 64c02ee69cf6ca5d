"""Workers that are stuck, blocked or broken, by the faults that `dynamo_grpc.testing` injects."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynamo_grpc import ConfigurationError, InternalError, OverloadedError, ResponseTimeoutError
from dynamo_grpc.router import Router
from dynamo_grpc.runtime import DistributedRuntime
from dynamo_grpc.testing import Faults, Mesh

from ..conftest import both_lanes, both_lanes_long, eventually
from .handlers import NAME, collect, toy
from .test_migration import Counting, read, request


async def numbers(request: Any) -> AsyncIterator[int]:
    for number in range(request):
        yield number


def limit_silence(client: Any, first_s: float | None, gap_s: float | None) -> Router:
    router: Router = client._router
    router.first_output_s, router.output_gap_s = first_s, gap_s
    return router


async def serve_counting(mesh: Mesh, faults: Faults | None = None, **kwargs: Any) -> DistributedRuntime:
    counting = Counting()
    handler = faults.wrap(counting.generate) if faults else counting.generate
    return await mesh.serve(NAME, handler, toy(10_000), **kwargs)


@both_lanes
@pytest.mark.parametrize("after", [0, 7])
async def test_a_stuck_handler_is_left_and_the_answer_goes_on_elsewhere(mesh: Mesh, after: int) -> None:
    stuck = await serve_counting(mesh, Faults(stall_after=after))
    client = await mesh.client(NAME)
    limit_silence(client, 0.3, 0.3)
    reading = asyncio.ensure_future(read(await client.generate(request())))
    await eventually(lambda: len(stuck.server.requests) == 1)
    await serve_counting(mesh)
    await eventually(lambda: len(client.instance_ids()) == 2)
    tokens, ends = await asyncio.wait_for(reading, 10)
    assert (tokens, len(ends)) == (list(range(20)), 1)
    await eventually(lambda: not stuck.server.requests)  # it was cancelled there


@both_lanes
async def test_with_nobody_else_it_is_told_as_a_timeout(mesh: Mesh) -> None:
    await serve_counting(mesh, Faults(stall_after=3))
    client = await mesh.client(NAME)
    limit_silence(client, 0.3, 0.3)
    with pytest.raises(ResponseTimeoutError, match=r"gave no further output for 0.3 s, though its connection stands"):
        await asyncio.wait_for(read(await client.generate(request())), 10)


@both_lanes_long
async def test_a_slow_one_that_goes_on_and_a_reader_that_pauses_are_left_alone(mesh: Mesh) -> None:
    await serve_counting(mesh, Faults(slow_s=0.05))
    client = await mesh.client(NAME)
    limit_silence(client, 1.0, 1.0)
    tokens, _ = await read(await client.generate(request(max_tokens=30)))  # 1.5 s in all
    assert tokens == list(range(30))
    await serve_counting(mesh)
    stream = await client.generate(request())
    first = await anext(stream)
    await asyncio.sleep(1.4)  # our own fault
    rest = [item async for item in stream]
    assert first
    assert rest


@both_lanes
async def test_one_whose_answers_fail_is_left_out_and_taken_back(mesh: Mesh, caplog: pytest.LogCaptureFixture) -> None:
    faults = Faults(fail_after=0)
    broken = await mesh.serve(NAME, faults.wrap(numbers))
    well = await mesh.serve(NAME, numbers)
    client = await mesh.client(NAME)
    await eventually(lambda: len(client.instance_ids()) == 2)
    num_failed = 0
    for _ in range(40):
        try:
            assert await collect(await client.generate(2)) == [0, 1]
        except InternalError:
            num_failed += 1
    assert num_failed == 5
    assert client.instance_ids() == [well.instance_id]
    assert len(client.instances()) == 2
    faults.fail_after = None
    await eventually(lambda: broken.instance_id in client.instance_ids(), 5)
    for _ in range(4):
        assert await collect(await client.generate(2)) == [0, 1]
    assert client._instances._ejections.is_ejected("") is False
    assert not client._instances._ejections


@both_lanes
async def test_the_half_of_the_workers_is_never_taken_out(mesh: Mesh) -> None:
    for _ in range(3):
        await mesh.serve(NAME, Faults(fail_after=0).wrap(numbers))
    client = await mesh.client(NAME)
    await eventually(lambda: len(client.instance_ids()) == 3)
    for _ in range(60):
        with pytest.raises(InternalError):
            await collect(await client.generate(2))
    assert len(client.instance_ids()) >= 2


async def test_a_retry_storm_is_held_back(mesh: Mesh) -> None:
    """Workers that end streams without a finish: an answer, so the budget holds."""

    async def unfinished(request: Any) -> AsyncIterator[int]:
        raise OverloadedError("no room", retry_after_s=1.0)
        yield 1

    runtimes = [await mesh.serve(NAME, unfinished) for _ in range(4)]
    client = await mesh.client(NAME)
    await eventually(lambda: len(client.instance_ids()) == 4)
    router = limit_silence(client, None, None)
    for _ in range(100):
        with pytest.raises(OverloadedError):
            await collect(await client.generate(1))
        client._instances._full.clear()  # as if 0.1 s were over
    assert router.budget._num_retries <= 10 + 0.2 * 100 + 1
    assert runtimes


async def test_a_blocked_loop_takes_no_worker_out(mesh: Mesh, caplog: pytest.LogCaptureFixture) -> None:
    runtime = await serve_counting(mesh, Faults(block_s=0.3))
    client = await mesh.client(NAME)
    with caplog.at_level(logging.WARNING):
        tokens, _ = await read(await client.generate(request(max_tokens=3)))
    assert tokens == [0, 1, 2]
    assert client.instance_ids() == [runtime.instance_id]
    assert "blocks the event loop" in caplog.text


async def test_a_dropped_lease_is_not_the_end_of_its_worker(mesh: Mesh) -> None:
    runtime = await mesh.serve(NAME, numbers)
    client = await mesh.client(NAME)
    await Faults(drop_lease_s=0.0).run(runtime)
    assert await collect(await client.generate(2)) == [0, 1]


def test_a_share_is_hit_the_same_for_the_same_seed() -> None:
    def hits(seed: int) -> list[bool]:
        async def one() -> list[bool]:
            handler, seen = Faults(share=0.5, refuse=True, seed=seed).wrap(numbers), []
            for _ in range(50):
                try:
                    async for _ in handler(1, None):  # type: ignore[arg-type]
                        seen.append(False)
                except OverloadedError:
                    seen.append(True)
            return seen

        return asyncio.run(one())

    assert hits(1) == hits(1) != hits(2)
    assert 10 < sum(hits(1)) < 40


def test_faults_from_text() -> None:
    assert Faults.parse("die_after=20, share=0.1,refuse=yes,stall_s=2") == Faults(
        die_after=20, share=0.1, refuse=True, stall_s=2.0
    )
    with pytest.raises(ConfigurationError, match=r"no fault 'explode': there are share, refuse, fail_after"):
        Faults.parse("explode=1")
    with pytest.raises(ConfigurationError, match=r"fault die_after='soon' should be a number"):
        Faults.parse("die_after=soon")
