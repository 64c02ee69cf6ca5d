"""Whose cancel a CancelledError is: grpc.aio raises one too where a call was cancelled below, and the task goes on."""

from __future__ import annotations

import asyncio


def is_being_cancelled() -> bool:
    """Whether it is the current task itself that somebody cancels: then the error has to pass."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
