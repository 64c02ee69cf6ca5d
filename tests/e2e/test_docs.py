"""What the documentation shows, is: examples are run, links lead somewhere, flags exist."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from dynamo_grpc.cli import main
from dynamo_grpc.conformance import RULES
from dynamo_grpc.status import BY_REASON

from ..conftest import ROOT, Process
from ..etcd import free_port
from .test_up import Up

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "examples" / "README.md",
    ROOT / "examples" / "nim" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_readmes_worker_is_the_example_that_is_run() -> None:
    assert blocks(ROOT / "README.md", "python")[1:] == [(ROOT / "examples" / "worker" / "shout.py").read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_documentation_is_python(page: Path) -> None:
    for block in blocks(page, "python"):
        wrapped = "async def page():\n" + "".join(f"    {line}\n" for line in block.splitlines())
        ast.parse(block if "\nasync with" not in block and not block.startswith("client =") else wrapped)


def test_every_error_has_its_line() -> None:
    page = (ROOT / "docs" / "grpc.md").read_text()
    lines = re.findall(r"^\| (`[A-Z_`, ]+`) \| (?:`([A-Z_]+)`)?", page, re.MULTILINE)
    told = {reason: code for reasons, code in lines for reason in re.findall(r"`(\w+)`", reasons)}
    for reason, cls in BY_REASON.items():
        assert reason in told, f"docs/grpc.md has no line for {reason}"
        assert told[reason] in ("", cls.code.name), reason
    assert set(told) <= set(BY_REASON)


def test_every_rule_is_explained() -> None:
    page = (ROOT / "docs" / "workers-in-any-language.md").read_text()
    assert {rule.name for rule in RULES} <= set(re.findall(r"`([a-z-]+)`", page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_readmes_python_client_works(cli: Callable[..., Process]) -> None:
    up = Up(cli)
    up.wait_ready()
    snippet = blocks(ROOT / "README.md", "python")[0]
    code = snippet.replace("http://localhost:8000", f"http://127.0.0.1:{up.http}")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert len(done.stdout) > 40


def test_the_readmes_commands_work(cli: Callable[..., Process]) -> None:
    up = Up(cli)
    up.wait_ready()
    text = (ROOT / "README.md").read_text()
    (command,) = re.findall(r"^curl .*$", text, re.MULTILINE)
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is missing")
    words = shlex.split(command.replace("localhost:8000", f"127.0.0.1:{up.http}"))
    out = subprocess.run([curl, "-s", *words[1:]], capture_output=True, text=True, timeout=30).stdout
    assert out.endswith("data: [DONE]\n\n")
    assert out.count("chat.completion.chunk") > 64


@pytest.mark.full
def test_grpcurl_as_the_pages_have_it(cli: Callable[..., Process], tool: Callable[[str], str]) -> None:
    port = free_port()
    up = Up(cli, env={"DYN_GRPC_PORT": str(port)})
    up.wait_ready()
    said = []
    for page in (ROOT / "README.md", ROOT / "docs" / "grpc.md"):
        for command in re.findall(r"^(?:\$ )?(grpcurl .*)$", page.read_text(), re.MULTILINE):
            there = command.replace("localhost:9000", f"127.0.0.1:{up.port}")
            words = shlex.split(there.replace("localhost:8001", f"127.0.0.1:{port}"))
            done = subprocess.run([tool("grpcurl"), *words[1:]], capture_output=True, text=True, timeout=30)
            assert done.returncode == 0, done.stderr
            said.append(done.stdout)
    assert len(said) == 5
    assert '"text"' in said[0]
    assert said[1].count("token_ids") == 8
    assert '"name": "tiny"' in said[-1]


def test_every_command_has_help_with_variables() -> None:
    runner = CliRunner()
    servers = ("call", "chat", "doctor", "drain", "frontend", "ps", "registry", "top", "up", "worker")
    tools = ("card", "conformance", "protos")  # what they are to do is each call's own
    listed = runner.invoke(main, ["--help"]).output
    for name in (*servers, *tools):
        assert f"  {name} " in listed
        shown = runner.invoke(main, [name, "--help"])
        assert shown.exit_code == 0
        command = main.get_command(click.Context(main), name)
        assert command is not None
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                variable = option.envvar if isinstance(option.envvar, str) else (option.envvar or [""])[0]
                assert variable.startswith("DYN_") or name in tools, (name, option.name)
                assert option.help, (name, option.name)


def test_the_makefiles_help_names_its_targets() -> None:
    out = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("setup", "run", "test", "test-full", "check", "proto", "bench", "clean"):
        assert re.search(rf"^{target} ", out, re.MULTILINE)
