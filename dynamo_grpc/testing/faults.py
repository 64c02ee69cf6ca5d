"""Faults on purpose: what a worker's clients must live with, in tests and in development."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from dynamo_grpc.context import Context
from dynamo_grpc.errors import ConfigurationError, EngineShutdown, OverloadedError
from dynamo_grpc.handlers import Handler

if TYPE_CHECKING:
    from dynamo_grpc.runtime import DistributedRuntime

logger = logging.getLogger(__name__)


def die() -> None:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(slots=True)
class Faults:
    """What goes wrong, and how often. Nothing does by default.

    Args:
        share: of the requests that are hit by `refuse`, `fail_after`, `die_after`, `stall_after` and `slow_s`; 0 to 1.
        refuse: they are refused, as by a full worker.
        fail_after: they fail with RuntimeError after so many outputs.
        leave_after: they raise EngineShutdown after so many outputs.
        die_after: the process is killed after so many outputs of one of them.
        stall_after: they stand still after so many outputs …
        stall_s: … for so long; unset is for ever.
        block_s: before each output the event loop is blocked for so long.
        slow_s: each output is so late.
        drop_lease_s: so long after the start the worker's entry goes from the registry, though it lives.
        seed: of chance.

    Example:
        await mesh.serve(NAME, Faults(die_after=20).wrap(handler))
    """

    share: float = 1.0
    refuse: bool = False
    fail_after: int | None = None
    leave_after: int | None = None
    die_after: int | None = None
    stall_after: int | None = None
    stall_s: float | None = None
    block_s: float = 0.0
    slow_s: float = 0.0
    drop_lease_s: float | None = None
    seed: int | None = None
    die: Callable[[], object] = die
    _rng: random.Random | None = None

    @classmethod
    def parse(cls, text: str) -> Faults:
        """From `name=value,…`, such as `die_after=20,share=0.1`.

        Raises:
            ConfigurationError: there is no such fault, or its value is no number.
        """
        known = {f.name: str(f.type) for f in fields(cls) if f.name not in ("die", "_rng")}
        values: dict[str, Any] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = part.partition("=")
            if name not in known:
                raise ConfigurationError(f"no fault {name!r}: there are {', '.join(known)}")
            try:
                if known[name] == "bool":
                    values[name] = value.lower() not in ("0", "false", "no")
                else:
                    values[name] = float(value) if "float" in known[name] else int(value)
            except ValueError:
                raise ConfigurationError(f"fault {name}={value!r} should be a number") from None
        return cls(**values)

    def wrap(self, function: Callable[..., Any]) -> Callable[[Any, Context], AsyncIterator[Any]]:
        """A handler that does what `function` does, until something goes wrong."""
        handler = Handler(function)
        rng = self._rng = self._rng or random.Random(self.seed)

        async def faulty(request: Any, context: Context) -> AsyncIterator[Any]:
            is_hit = rng.random() < self.share
            if is_hit and self.refuse:
                raise OverloadedError("refused on purpose: this worker injects faults", retry_after_s=1.0)
            count = 0
            async with contextlib.aclosing(handler(request, context)) as items:
                await self._before(count, is_hit=is_hit)
                async for item in items:
                    yield item
                    count += 1
                    await self._before(count, is_hit=is_hit)

        faulty.__qualname__ = handler.name
        return faulty

    async def _before(self, count: int, *, is_hit: bool) -> None:
        """What happens before the next output, of a request that gave `count`."""
        if not is_hit:
            return
        if count == self.die_after:
            self.die()
        if count == self.fail_after:
            raise RuntimeError("failed on purpose: this worker injects faults")
        if count == self.leave_after:
            raise EngineShutdown("left on purpose: this worker injects faults")
        if count == self.stall_after:
            await (asyncio.Event().wait() if self.stall_s is None else asyncio.sleep(self.stall_s))
        if self.block_s:
            time.sleep(self.block_s)  # noqa: ASYNC251 - that is the fault
        if self.slow_s:
            await asyncio.sleep(self.slow_s)

    async def run(self, runtime: DistributedRuntime) -> None:
        """What happens to the process itself."""
        if self.drop_lease_s is not None:
            await asyncio.sleep(self.drop_lease_s)
            logger.warning("the lease is dropped on purpose: this worker injects faults")
            await runtime.orphan()
