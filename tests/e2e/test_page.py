"""The page at `/`: its files over HTTP, and all of it in a real browser."""

from __future__ import annotations

import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from ..conftest import ROOT, Process
from ..etcd import free_port

PYTHON = ROOT / ".tools" / "clients" / "bin" / "python"


@pytest.fixture
def env(cli: Callable[..., Process]) -> dict[str, str]:
    registry = cli("registry", "--port", "0")
    return {"ETCD_ENDPOINTS": registry.wait_for(r"registry ready at (\S+)")[1], "ETCD_LEASE_TTL": "2"}


def missing(what: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(f"{what} is missing, and this is CI")
    pytest.skip(f"{what} is missing: run `make test-full` where it can be had")


def get(url: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def test_its_files(cli: Callable[..., Process], env: dict[str, str]) -> None:
    with_page, without = free_port(), free_port()
    cli("frontend", "--http-port", str(with_page), env=env).wait_for("frontend ready")
    cli("frontend", "--http-port", str(without), "--no-page", env=env).wait_for("frontend ready")
    base = f"http://127.0.0.1:{with_page}"
    status, headers, body = get(f"{base}/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'self'" in headers["content-security-policy"]
    assert b"<script>" not in body
    assert b"http" not in body.replace(b"http-equiv", b"")  # nothing comes from elsewhere
    for name in ("app.js", "api.js", "chat.js", "mesh.js", "style.css", "icon.svg"):
        status, headers, body = get(f"{base}/page/{name}")
        assert status == 200
        assert body
        again = {"If-None-Match": headers["etag"]}
        assert get(f"{base}/page/{name}", **again)[0] == 304
    assert get(f"{base}/page/../page.py")[0] == 404
    assert get(f"{base}/docs")[2] == get(f"{base}/")[2]
    assert get(f"http://127.0.0.1:{without}/")[0] == 404
    assert get(f"http://127.0.0.1:{without}/page/app.js")[0] == 404


@pytest.mark.full
def test_in_a_browser(cli: Callable[..., Process], env: dict[str, str], tmp_path: Path) -> None:
    if not Path("/usr/bin/chromium").exists():
        missing("/usr/bin/chromium")
    if subprocess.run([PYTHON, "-c", "import playwright"], capture_output=True, check=False).returncode:
        missing("playwright")
    port = free_port()
    cli("worker", "tiny", env=env).wait_for("worker ready")
    echo = cli("worker", "echo", env=env)
    echo.wait_for("worker ready")
    frontend = cli("frontend", "--http-port", str(port), env=env)
    frontend.wait_for("'tiny' is ready")
    frontend.wait_for("'echo' is ready")
    script = ROOT / "tests" / "e2e" / "clients" / "page.py"
    words = [str(PYTHON), str(script), f"http://127.0.0.1:{port}/", str(echo.pid), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.endswith("all is well\n"), done.stdout + done.stderr
