"""A frontend over both ways of writing, and a model to watch.

Imports are inside: other tests here run where the frontend's packages are missing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest

from dynamo_grpc.testing import Mesh

from ..conftest import eventually

if TYPE_CHECKING:
    from .front import Front, Watched


@pytest.fixture
async def front(mesh: Mesh, request: pytest.FixtureRequest) -> AsyncIterator[Front]:
    """A frontend; what is about writing and leaving runs over both ways: `@both_servers`."""
    import dynamo_workers.tiny as tiny
    from dynamo_frontend.wire import WireProtocol

    from .front import front_of

    await mesh.serve_worker(tiny.Tiny())
    http = WireProtocol if getattr(request, "param", "wire") == "wire" else "httptools"
    async with front_of(mesh, http, instance_wait_s=1.0) as opened:
        await eventually(opened.frontend.catalog.ready)
        yield opened


@pytest.fixture
async def watched(mesh: Mesh, front: Front) -> Watched:
    from .front import Watched, serve_beside

    worker = Watched()
    await serve_beside(mesh, front, worker)
    return worker
