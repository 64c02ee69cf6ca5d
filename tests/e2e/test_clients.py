"""Other people's clients, as they are: OpenAI's in Node, LangChain, LiteLLM, schemathesis."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from ..conftest import ROOT, Process
from .test_up import until

HERE = Path(__file__).parent / "clients"
PYTHON = ROOT / ".tools" / "clients" / "bin" / "python"


@pytest.fixture
def url(cli: Callable[..., Process]) -> str:
    """A frontend with the tiny model, and one that calls tools."""
    names = ("tiny", str(ROOT / "examples" / "tools" / "worker.py"))
    workers = [cli("worker", name, "--discovery-backend", "static") for name in names]
    addresses = ",".join(worker.wait_for(r"worker ready at (\S+)")[1] for worker in workers)
    frontend = cli("frontend", "--http-port", "0", "--static", addresses)
    found = frontend.wait_for(r"ready at (http://\S+)")[1]
    until(lambda: len(httpx.get(f"{found}/health").json()["models"]) == 2)
    return found


def needs(is_there: bool, what: str) -> None:
    """Skip, or fail in CI."""
    if not is_there:
        if os.environ.get("CI"):
            pytest.fail(f"{what} is missing, and this is CI")
        pytest.skip(f"{what} is missing: `make test-full` installs it")


def run(*command: str | Path, **kwargs: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=240, **kwargs)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.mark.full
def test_openais_client_in_node(url: str, tmp_path: Path) -> None:
    node = shutil.which("node")
    needs(node is not None and (ROOT / ".tools" / "node_modules" / "openai").exists(), "node, or its package openai")
    assert node is not None
    (tmp_path / "node_modules").symlink_to(ROOT / ".tools" / "node_modules")
    shutil.copy(HERE / "openai_client.mjs", tmp_path)
    assert "all is well" in run(node, tmp_path / "openai_client.mjs", url)
    page = (ROOT / "README.md").read_text()
    (snippet,) = re.findall(r"```js\n(.*?)```", page, re.DOTALL)
    (tmp_path / "page.mjs").write_text(snippet.replace("http://localhost:8000", url))
    assert len(run(node, tmp_path / "page.mjs")) > 40


@pytest.mark.full
@pytest.mark.timeout(300)
def test_langchain_and_litellm(url: str) -> None:
    needs(PYTHON.exists(), "the clients' environment")
    assert "all is well" in run(PYTHON, HERE / "frameworks.py", url)


@pytest.mark.full
@pytest.mark.timeout(300)
def test_tritons_client(cli: Callable[..., Process]) -> None:
    """In a process of its own: its messages have the names of ours."""
    needs(PYTHON.exists(), "the clients' environment")
    worker = cli("worker", "tiny", "--discovery-backend", "static").wait_for(r"worker ready at (\S+)")[1]
    front = cli("frontend", "--http-port", "0", "--grpc-port", "0", "--static", worker)
    address = front.wait_for(r"gRPC at (\S+);")[1]
    front.wait_for("model 'tiny' is ready")
    assert "all is well" in run(PYTHON, HERE / "triton_client.py", address)
    front.wait_for("model_stream_infer model=tiny status=499")  # the stream that it left


@pytest.mark.full
@pytest.mark.timeout(300)
def test_whatever_the_document_allows_is_answered_as_it_says(url: str, tmp_path: Path) -> None:
    """Schemathesis makes bodies from /openapi.json, right and wrong ones."""
    needs(PYTHON.exists(), "the clients' environment")
    document = httpx.get(f"{url}/openapi.json").json()
    for schema in document["components"]["schemas"].values():
        fields = schema.get("properties", {})
        if "model" in fields:
            fields["model"] = {"const": "tiny"}
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):  # short answers
            if name in fields:
                fields[name] = {"type": "integer", "minimum": 1, "maximum": 4}
                schema["required"] = [*schema.get("required", []), name]
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    args = ("--max-examples", "30", "--checks", checks, "--seed", "1", "--no-color")
    command = PYTHON.with_name("schemathesis")
    run(command, "run", tmp_path / "openapi.json", "--url", url, *args, cwd=tmp_path)
