"""`dynamo-grpc chat`: a chat in the terminal, over the frontend's HTTP API."""

from __future__ import annotations

import contextlib
import http.client
import json
import urllib.parse
from collections.abc import Iterator
from typing import Any

import click

from dynamo_grpc.cli.options import MeshCommand, option


class ChatClient:
    """Talks to a frontend. The standard library is enough: one request at a time.

    Raises (from its methods):
        click.ClickException: the frontend can't be reached, or answered with an error.
    """

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise click.ClickException(f"{url!r} is no URL of a frontend, such as http://localhost:8000")
        self._parts, self._url = parts, url

    def _open(self) -> http.client.HTTPConnection:
        make = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        return make(self._parts.hostname or "", self._parts.port, timeout=600)

    def models(self) -> list[str]:
        """Names of the models that can be asked."""
        with contextlib.closing(self._open()) as connection:
            response = self._request(connection, "GET", "/v1/models", None)
            return [model["id"] for model in json.loads(response.read())["data"]]

    def answer(self, model: str, messages: list[dict[str, str]]) -> Iterator[str]:
        """Pieces of the answer as they come. Closing the iterator ends the request."""
        body = json.dumps({"model": model, "messages": messages, "stream": True}).encode()
        with contextlib.closing(self._open()) as connection:
            response = self._request(connection, "POST", "/v1/chat/completions", body)
            for line in response:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event: dict[str, Any] = json.loads(line[6:])
                if "error" in event:
                    raise click.ClickException(event["error"]["message"])
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""

    def _request(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None
    ) -> http.client.HTTPResponse:
        try:
            connection.request(method, path, body, {"content-type": "application/json"})
            response = connection.getresponse()
        except OSError as error:
            raise click.ClickException(
                f"no frontend answers at {self._url}: {error} (start one: dynamo-grpc up)"
            ) from error
        if response.status != 200:
            text = response.read()
            try:
                message = json.loads(text)["error"]["message"]
            except (ValueError, KeyError, TypeError):
                message = f"{response.status} {response.reason}"
            raise click.ClickException(message)
        return response


@click.command(
    cls=MeshCommand,
    epilog="""\b
Examples:
  dynamo-grpc chat
  dynamo-grpc chat --url http://gpu-box:8000 --model my-model --system "Answer briefly." """,
)
@option("--url", "The frontend.", default="http://localhost:8000")
@option("--model", "Model to talk to; the first one by default.", envvar="DYN_CHAT_MODEL")
@option("--system", "System message.", envvar="DYN_CHAT_SYSTEM", default="")
def chat(url: str, model: str | None, system: str) -> None:
    """Chat in the terminal. Ctrl-C stops an answer, Ctrl-D ends the chat."""
    client = ChatClient(url)
    if model is None:
        models = client.models()
        if not models:
            raise click.ClickException(f"{url} serves no model yet")
        model = models[0]
    click.echo(f"{model} at {url}; Ctrl-C stops an answer, Ctrl-D ends the chat.")
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            text = input("> ").strip()
        except KeyboardInterrupt:
            click.echo()
            continue
        except EOFError:
            click.echo()
            return
        if not text:
            continue
        messages.append({"role": "user", "content": text})
        try:
            messages.append({"role": "assistant", "content": _show(client.answer(model, messages))})
        except click.ClickException as error:
            error.show()
            messages.pop()


def _show(pieces: Iterator[str]) -> str:
    """Print an answer as it comes; gives what was printed, also when Ctrl-C ended it."""
    said: list[str] = []
    try:
        for piece in pieces:
            said.append(piece)
            click.echo(piece, nl=False)
        click.echo()
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
        click.echo(" [stopped]")
    return "".join(said)
