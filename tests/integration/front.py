"""A frontend over real HTTP for tests, and a model whose handler tells when it ends."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import dynamo_workers.tiny as tiny
import httpx
import openai
import uvicorn
from dynamo_frontend.app import Frontend
from dynamo_frontend.settings import FrontendSettings
from dynamo_frontend.wire import WireProtocol

from dynamo_grpc import Context, Worker
from dynamo_grpc.testing import Mesh
from dynamo_grpc.v1 import inference_pb2

from ..conftest import eventually

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Tell me about the sea"}], "seed": 1}
FOLDER = Path(tiny.__file__).parent / "model"


class Front:
    """A frontend that listens on a free port."""

    def __init__(self, frontend: Frontend, url: str) -> None:
        self.frontend, self.url = frontend, url
        self.http = httpx.AsyncClient(base_url=url, timeout=30)
        self.openai = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    async def post(self, body: Any, path: str = "/v1/chat/completions", **kwargs: Any) -> httpx.Response:
        content = body if isinstance(body, (bytes, str)) else json.dumps(body)
        return await self.http.post(path, content=content, **kwargs)

    async def error(self, body: Any, status: int, path: str = "/v1/chat/completions", **kwargs: Any) -> dict[str, Any]:
        response = await self.post(body, path, **kwargs)
        assert response.status_code == status, response.text
        error: dict[str, Any] = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code", "request_id"}
        assert error["request_id"] == response.headers["x-request-id"]
        return error


@contextlib.asynccontextmanager
async def front_of(mesh: Mesh, http: Any = WireProtocol, **settings: Any) -> AsyncIterator[Front]:
    frontend = Frontend(FrontendSettings(**settings), mesh.runtime)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(frontend, http=http, log_level="warning", access_log=False, lifespan="on"))
    task = asyncio.ensure_future(server.serve(sockets=[listener]))
    front = Front(frontend, f"http://127.0.0.1:{listener.getsockname()[1]}")
    try:
        await eventually(lambda: server.started or task.done())
        yield front
    finally:
        await front.http.aclose()
        await front.openai.close()
        server.should_exit = True
        await task
        listener.close()


class Watched(Worker):
    """Generates for ever, or waits for ever, and says when it was ended."""

    model_path = FOLDER
    model_name = "watched"

    def __init__(self) -> None:
        self.started, self.ended = asyncio.Event(), asyncio.Event()
        self.is_silent = False

    async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> AsyncIterator[int]:
        self.started.set()
        try:
            while True:
                if not self.is_silent:
                    yield 300
                await asyncio.sleep(0.01)
        finally:
            self.ended.set()


async def serve_beside(mesh: Mesh, front: Front, worker: Worker) -> None:
    """Serve a second model, and return when the frontend knows it."""
    await mesh.serve_worker(worker)
    await eventually(lambda: len(front.frontend.catalog.ready()) == 2)
