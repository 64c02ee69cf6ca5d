"""Clients that don't read, and those beside them."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import dynamo_frontend.answer as answer
import pytest

import dynamo_grpc.inbox as inbox
from dynamo_grpc import Context, Worker
from dynamo_grpc.testing import Mesh
from dynamo_grpc.v1 import inference_pb2

from .front import CHAT, FOLDER, Front, Watched, serve_beside

#: More than a kernel takes for a client that doesn't read.
_MANY = 60_000


class Talker(Worker):
    """Gives much at once, then waits until its client is gone."""

    model_path = FOLDER
    model_name = "talker"
    context_length = 2**31

    def __init__(self) -> None:
        self.num_tokens = 0
        self.ended = asyncio.Event()

    async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> AsyncIterator[Any]:
        try:
            for _ in range(self.num_tokens):
                yield 300
            await asyncio.sleep(3600)
        finally:
            self.ended.set()


@pytest.fixture
async def talker(mesh: Mesh, front: Front) -> Talker:
    worker = Talker()
    await serve_beside(mesh, front, worker)
    return worker


def ask(front: Front, model: str) -> socket.socket:
    """Send a request, and read nothing: what the kernel takes for us is small."""
    host, port = front.url.removeprefix("http://").split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((host, int(port)))
    body = json.dumps({**CHAT, "model": model, "stream": True, "max_tokens": 10**8}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client


async def eventually_counted(front: Front, metric: str) -> None:
    """Return when /metrics has something."""
    async with asyncio.timeout(10):
        while metric not in (await front.http.get("/metrics")).text:
            await asyncio.sleep(0.02)


async def test_what_is_kept_for_a_client_is_bounded(
    front: Front, talker: Talker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "MAX_UNREAD_BYTES", 50_000)
    talker.num_tokens = 10**9
    client = ask(front, "talker")
    await asyncio.wait_for(talker.ended.wait(), 60)
    answered = await front.post({**CHAT, "max_tokens": 3})
    assert answered.status_code == 200
    client.close()
    await eventually_counted(
        front, 'inflight_requests{dynamo_namespace="dynamo",endpoint="chat_completions",model="talker"} 0.0'
    )


async def test_a_client_that_takes_no_byte_is_given_up(
    front: Front, talker: Talker, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if "wire" not in request.node.name:
        pytest.skip("ASGI doesn't say what a client takes")
    monkeypatch.setattr(answer, "LOOK_S", 0.05)
    monkeypatch.setattr(answer, "STALL_S", 0.3)
    talker.num_tokens = _MANY
    client = ask(front, "talker")
    await asyncio.wait_for(talker.ended.wait(), 60)
    await eventually_counted(front, 'error_type="slow_reader"')
    received = b""
    with pytest.raises(ConnectionResetError):
        while piece := client.recv(65536):  # what the kernel had already; then the end, which is none of HTTP's
            received += piece
        raise ConnectionResetError
    assert b"[DONE]" not in received
    client.close()


async def test_a_client_that_reads_slowly_keeps_its_stream(
    front: Front, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer, "LOOK_S", 0.02)
    monkeypatch.setattr(answer, "STALL_S", 0.1)
    client = ask(front, "watched")
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    received = 0
    while received < 20_000:
        received += len(await loop.sock_recv(client, 500))
        assert not watched.ended.is_set()
    client.close()
    await asyncio.wait_for(watched.ended.wait(), 5)
