"""The system port of a worker: /live, /health and /metrics over plain HTTP, for probes that speak no gRPC.

A thread of its own answers, from the standard library: a loop that is busy with tokens still passes its liveness probe.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dynamo_grpc.errors import ConfigurationError
from dynamo_grpc.lifecycle import State

if TYPE_CHECKING:
    from dynamo_grpc.server import Server


@contextlib.contextmanager
def open_system_server(server: Server, port: int | None) -> Iterator[int | None]:
    """Answer on `port` (0: a free one; None: not at all) while inside; gives the port.

    Raises:
        ConfigurationError: the port is taken.
    """
    if port is None:
        yield None
        return

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, kind, body = _answer(self.path, server)
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Probes are not worth a line each."""

    class HttpServer(http.server.ThreadingHTTPServer):
        allow_reuse_port = False
        daemon_threads = True

    try:
        http_server = HttpServer((server.host, port), Handler)
    except OSError as error:
        raise ConfigurationError(f"can't listen on system port {port}: {error.strerror}") from error
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield http_server.server_address[1]
    finally:
        http_server.shutdown()
        http_server.server_close()
        thread.join()


def _answer(path: str, server: Server) -> tuple[int, str, bytes]:
    match path.partition("?")[0]:
        case "/live":
            return 200, "application/json", b'{"status":"live"}'
        case "/health":
            is_serving, body = _health(server)
            return (200 if is_serving else 503), "application/json", json.dumps(body).encode()
        case "/metrics":
            text = server.metrics.text() if server.metrics else b""
            return 200, "text/plain; version=0.0.4; charset=utf-8", text
        case _:
            return 404, "application/json", b'{"error":"there are /live, /health and /metrics"}'


def _health(server: Server) -> tuple[bool, dict[str, Any]]:
    """Whether requests are served, and the answer. A registry that doesn't answer keeps nobody from serving."""
    served = list(server.served.values())
    is_ready = server.lifecycle.state is State.READY
    is_serving = is_ready and any(not s.why_not for s in served)
    body: dict[str, Any] = {
        "status": "ready" if is_serving else "notready",
        "state": server.lifecycle.state.name.lower(),
        "endpoints": {s.name: s.why_not or ("ready" if is_ready else "notready") for s in served},
        "requests": len(server.requests),
    }
    if (registry := server.registry) is not None:
        body["registry"] = status = registry.status()
        state = "serving" if is_serving else "not serving"
        if status["unreachable_since"]:
            body["message"] = f"{state}, registry unreachable since {status['unreachable_since']}"
        elif status["problem"]:
            body["message"] = f"{state}, {status['problem']}"
    return is_serving, body
