"""Processes of ours that are kept running: started again when they die, ended together."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import click

_MAX_BACKOFF_S = 10.0
#: The pauses begin anew for one that ran for so long; one that was asked to end before this has failed.
_STEADY_S, _BRIEF_S = 30.0, 1.0


class Supervisor:
    """Runs `dynamo-grpc` commands.

    Args:
        stop_s: how long they may take to end.

    Attributes:
        stop: set by the first SIGINT or SIGTERM; a second one kills what still runs.
    """

    def __init__(self, stop_s: float) -> None:
        self._stop_s = stop_s
        self.stop = asyncio.Event()
        self._processes: dict[str, asyncio.subprocess.Process] = {}

    def catch_signals(self) -> None:
        """Take SIGINT and SIGTERM."""
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if not self.stop.is_set():
            self.stop.set()
            return
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    async def keep(
        self,
        name: str,
        args: Sequence[str],
        env: Mapping[str, str],
        *,
        pass_fds: Iterable[int] = (),
        on_end: Callable[[int], None] = lambda pid: None,
    ) -> None:
        """Run a command, again and again until the stop.

        Args:
            name: in messages, and for `end`.
            on_end: called with its process id when it has ended.
        """
        backoff_s = 0.5
        while not self.stop.is_set():
            started = time.monotonic()
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "dynamo_grpc", *args, env=env, stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True, preexec_fn=_die_with_parent, pass_fds=tuple(pass_fds),
            )  # fmt: skip
            self._processes[name] = process
            if self.stop.is_set():  # it came while the process was being made
                process.terminate()
            code = await process.wait()
            del self._processes[name]
            on_end(process.pid)
            if self.stop.is_set():
                return
            ran_s = time.monotonic() - started
            if ran_s > _STEADY_S:
                backoff_s = 0.5
            if code in (0, -signal.SIGTERM) and ran_s > _BRIEF_S:
                continue  # somebody restarts it: there is nothing to be careful about
            click.echo(f"{name} ended ({_describe(code)}), starting it again in {backoff_s:g} s", err=True)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(backoff_s):
                    await self.stop.wait()
            backoff_s = min(backoff_s * 2, _MAX_BACKOFF_S)

    async def end(self, names: Iterable[str]) -> None:
        """Terminate some of them, and kill those that don't end in time."""
        processes = [self._processes[name] for name in names if name in self._processes]
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        try:
            async with asyncio.timeout(self._stop_s):
                await asyncio.gather(*(process.wait() for process in processes))
        except TimeoutError:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()


def _die_with_parent() -> None:
    """Linux: end with the supervisor, even if it is killed."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _describe(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
