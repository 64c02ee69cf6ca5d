"""Models of another server that speaks OpenAI's API (NIM, vLLM, llama.cpp, a cloud), as models of the mesh.

    OPENAI_BASE_URL=http://nim:8000/v1 dynamo-grpc worker openai

Text goes in and text comes out: template, tokenizer and limits are the other server's. Its models are registered as
they come and go; cancels, deadlines, stops and errors are passed on. What it reads from the environment:

    OPENAI_BASE_URL        where the server is; http://localhost:8000/v1 by default
    OPENAI_API_KEY         its key, or a file that holds it: OPENAI_API_KEY_FILE (read again at each poll)
    DYN_UPSTREAM_MODELS    names to serve, with wildcards: llama-*,qwen; all by default
    DYN_UPSTREAM_POLL_S    how often its models and metrics are asked for (5)
    DYN_UPSTREAM_RETRIES   how often a request is tried again before its first output (2)
    DYN_UPSTREAM_METRICS   where its Prometheus metrics are; /metrics beside /v1 by default, `off` for none
"""

from __future__ import annotations

import asyncio
import logging

from dynamo_grpc import ConfigurationError, DistributedRuntime, dynamo_worker
from dynamo_workers.upstream.server import Server
from dynamo_workers.upstream.settings import Settings

logger = logging.getLogger(__name__)

#: A server that didn't answer so often in a row is taken for gone, and its models with it.
_MAX_FAILURES = 3


class Registrar:
    """Serves each of a server's models while the server has it."""

    def __init__(self, runtime: DistributedRuntime, server: Server, settings: Settings) -> None:
        self._runtime, self._server, self._settings = runtime, server, settings
        self._served: dict[str, asyncio.Task[None]] = {}
        self._num_failures = 0

    async def run(self) -> None:
        """Until shutdown; then until what runs has ended."""
        try:
            while not self._runtime.is_shutting_down:
                await self.look()
                await self._runtime.or_shutdown(asyncio.sleep(self._settings.poll_s))
            await asyncio.gather(*self._served.values(), return_exceptions=True)
        finally:
            for task in self._served.values():
                task.cancel()

    async def look(self) -> None:
        """Ask for the models, once."""
        names = await self._names()
        for name in set(self._served) - names:
            logger.warning("model %r is gone: the server at %s has it no more", name, self._settings.base_url)
            self._served.pop(name).cancel()
        for name in sorted(names - set(self._served)):
            task = self._served[name] = asyncio.ensure_future(self._server.serve(self._runtime, name))
            task.add_done_callback(lambda done, name=name: self._ended(name, done))
        if self._served:
            if await self._server.is_of_the_mesh(self._runtime.instance_id):
                raise ConfigurationError(
                    f"{self._settings.base_url} is a frontend of this mesh: OPENAI_BASE_URL must name another server"
                )
            await self._server.ask_metrics()

    async def _names(self) -> set[str]:
        """What the server has; what it had, while it may be gone for a moment."""
        try:
            names = {name for name in await self._server.models() if self._settings.wants(name)}
        except Exception as error:  # whatever it is, it may be well again
            self._num_failures += 1
            if self._num_failures in (1, _MAX_FAILURES):
                logger.warning("the server at %s does not tell its models: %s", self._settings.base_url, error)
            return set(self._served) if self._num_failures < _MAX_FAILURES else set()
        if not names and not self._served and not self._num_failures:
            logger.warning("the server at %s has no model that is wanted", self._settings.base_url)
        self._num_failures = 0
        return names

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        """A model that could not be served is tried again at the next look."""
        if self._served.get(name) is task:
            del self._served[name]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("model %r can't be served: %s", name, error)


@dynamo_worker()
async def main(runtime: DistributedRuntime) -> None:
    """Serve the models of the server at OPENAI_BASE_URL until SIGTERM."""
    settings = Settings.from_environment()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request and each poll
    async with Server(settings) as server:
        await Registrar(runtime, server, settings).run()
