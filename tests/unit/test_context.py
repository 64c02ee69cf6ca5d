from dynamo_grpc import Context
from dynamo_grpc.testing import FakeClock


class Link:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def stop(self) -> None:
        self.seen.append("stop")

    def kill(self) -> None:
        self.seen.append("kill")


def test_stop_and_kill_reach_the_children_once() -> None:
    context, link = Context("r1"), Link()
    context.link(link)
    context.stop_generating()
    context.stop_generating()
    assert (context.is_stopped(), context.is_killed(), link.seen) == (True, False, ["stop"])
    context.kill()
    context.kill()
    assert (context.is_killed(), link.seen) == (True, ["stop", "kill"])


def test_a_late_child_ends_at_once() -> None:
    context, link, other = Context(), Link(), Link()
    context.stop_generating()
    context.link(link)
    assert link.seen == ["stop"]
    context.kill()
    context.link(other)
    assert other.seen == ["kill"]


def test_an_unlinked_child_is_left_alone() -> None:
    context, link = Context(), Link()
    context.link(link)
    context.unlink(link)
    context.kill()
    assert link.seen == []


def test_the_deadline_is_a_point_in_time() -> None:
    clock = FakeClock()
    context = Context(timeout_s=5.0, clock=clock)
    clock.advance(3.0)
    assert context.remaining_s() == 2.0
    clock.advance(3.0)
    assert context.remaining_s() == 0.0
    assert Context().remaining_s() is None


async def test_waiting_for_the_stop() -> None:
    context = Context()
    future = context.async_killed_or_stopped()
    assert not future.done()
    context.stop_generating()
    assert await future
    assert await context.async_killed_or_stopped()
