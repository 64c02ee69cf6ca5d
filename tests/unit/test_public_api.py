"""The public surface is a list; the core stays slim."""

import subprocess
import sys

import dynamo_grpc

PUBLIC = [
    "Annotated",
    "CardMismatchError",
    "Client",
    "ConfigurationError",
    "Context",
    "ContextLengthError",
    "DeadlineError",
    "DistributedRuntime",
    "DrainingError",
    "EndpointNotFoundError",
    "EngineShutdown",
    "HandlerEndedError",
    "HandlerOutputError",
    "HttpError",
    "InstanceLostError",
    "InternalError",
    "InvalidNameError",
    "InvalidRequestError",
    "MeshError",
    "ModelInput",
    "ModelNotFoundError",
    "ModelType",
    "NoInstancesError",
    "OverloadedError",
    "RegistryError",
    "RequestCancelledError",
    "ResponseStream",
    "ResponseTimeoutError",
    "RouterMode",
    "SlowReaderError",
    "TooLargeError",
    "UnsupportedError",
    "Worker",
    "__version__",
    "configure_dynamo_logging",
    "current_context",
    "dynamo_endpoint",
    "dynamo_worker",
    "prompt_text",
    "register_llm",
    "register_model",
    "register_server",
    "run",
    "set_fields",
]


def test_the_public_surface_is_frozen() -> None:
    assert sorted(dynamo_grpc.__all__) == sorted(PUBLIC)
    assert all(hasattr(dynamo_grpc, name) for name in PUBLIC)


def test_importing_the_library_imports_nothing_heavy() -> None:
    code = "import sys, dynamo_grpc; print(*sorted(sys.modules))"
    modules = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    heavy = {"fastapi", "pydantic", "tokenizers", "uvicorn", "jinja2", "prometheus_client", "orjson", "click"}
    assert not modules & heavy
    assert not any(module.startswith("opentelemetry.sdk") for module in modules)


def test_log_lines_end_with_the_ids_that_clients_are_told() -> None:
    code = """
import logging
from dynamo_grpc.cli.options import configure_logging
configure_logging("info")
logging.getLogger("x").error("it failed", extra={"request_id": "r1", "error_id": "e1"})
logging.getLogger("x").error("r1 failed", extra={"request_id": "r1", "error_id": ""})
logging.getLogger("x").error("plain")
"""
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.splitlines()
    ends = [line.split("x: ")[1] for line in lines]
    assert ends == ["it failed request_id=r1 error_id=e1", "r1 failed", "plain"]
