"""Several whole frontends behind one port: each has its own event loop, its own calls and its own core.

The parent opens the sockets (SO_REUSEPORT: the kernel spreads the connections) and keeps them, so a connection that
waits for a process that died is served by the next one. It serves nothing itself.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence

import click
from prometheus_client import multiprocess

from dynamo_grpc.supervision import Supervisor

#: Where prometheus_client's processes share their figures.
METRICS_DIR = "PROMETHEUS_MULTIPROC_DIR"


async def run(
    count: int, args: Sequence[str], listen: Callable[[int], socket.socket], stop_s: float, ready: Callable[[int], str]
) -> None:
    """Run `count` frontends until SIGINT or SIGTERM.

    Args:
        args: their command line, without sockets.
        listen: opens one more socket on a port; 0 takes a free one.
        ready: what to say when all are ready, from the port.
    """
    first = listen(0)
    port = first.getsockname()[1]
    listeners = [first, *(listen(port) for _ in range(count - 1))]
    ready_read, ready_write = os.pipe()
    metrics = tempfile.mkdtemp(prefix="dynamo-grpc-metrics-")
    env = {**os.environ, METRICS_DIR: metrics, "PYTHONUNBUFFERED": "1"}
    supervisor = Supervisor(stop_s)
    supervisor.catch_signals()
    loop = asyncio.get_running_loop()
    num_ready = 0

    def one_is_ready() -> None:
        nonlocal num_ready
        num_ready += len(os.read(ready_read, 64))
        if num_ready >= count:
            loop.remove_reader(ready_read)
            click.echo(ready(port))

    loop.add_reader(ready_read, one_is_ready)
    try:
        async with asyncio.TaskGroup() as tasks:
            kept = []
            for number, listener in enumerate(listeners, start=1):
                fds = (listener.fileno(), ready_write)
                command = [*args, "--http-fd", str(fds[0]), "--ready-fd", str(fds[1])]
                kept.append(
                    tasks.create_task(
                        supervisor.keep(
                            f"frontend process {number}",
                            command,
                            env,
                            pass_fds=fds,
                            on_end=lambda pid: multiprocess.mark_process_dead(pid, metrics),
                        )
                    )
                )
            await supervisor.stop.wait()
            for listener in listeners:
                listener.close()  # the processes have theirs; a new connection goes to none of them
            await supervisor.end(f"frontend process {number}" for number in range(1, count + 1))
            for task in kept:
                task.cancel()
    finally:
        shutil.rmtree(metrics, ignore_errors=True)
