"""A frontend over both ways of writing, and a model to watch."""

from collections.abc import AsyncIterator

import dynamo_workers.tiny as tiny
import pytest
from dynamo_frontend.wire import WireProtocol

from dynamo_grpc.testing import Mesh

from ..conftest import eventually
from .front import Front, Watched, front_of


@pytest.fixture(params=[WireProtocol, "httptools"], ids=["wire", "any ASGI server"])
async def front(mesh: Mesh, request: pytest.FixtureRequest) -> AsyncIterator[Front]:
    await mesh.serve_worker(tiny.Tiny())
    async with front_of(mesh, request.param, instance_wait_s=1.0) as opened:
        await eventually(opened.frontend.catalog.ready)
        yield opened


@pytest.fixture
async def watched(mesh: Mesh, front: Front) -> Watched:
    worker = Watched()
    await mesh.serve_worker(worker)
    await eventually(lambda: len(front.frontend.catalog.ready()) == 2)
    return worker
