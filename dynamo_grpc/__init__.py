"""dynamo-grpc: a service mesh for inference workers.

This list is the public surface; everything else in the package may change.
"""

import os as _os

# gRPC reads these when it is loaded; set them yourself to have it otherwise.
_os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it has to say comes as exceptions too
_os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # nothing here forks after start; engines must fork before it

from dynamo_grpc.cards import ModelInput, ModelType
from dynamo_grpc.client import Annotated, Client, ResponseStream
from dynamo_grpc.context import Context, current_context
from dynamo_grpc.errors import (
    CardMismatchError,
    ConfigurationError,
    ContextLengthError,
    DeadlineError,
    DrainingError,
    EndpointNotFoundError,
    EngineShutdown,
    HandlerEndedError,
    HandlerOutputError,
    HttpError,
    InstanceLostError,
    InternalError,
    InvalidNameError,
    InvalidRequestError,
    MeshError,
    ModelNotFoundError,
    NoInstancesError,
    OverloadedError,
    RegistryError,
    RequestCancelledError,
    ResponseTimeoutError,
    SlowReaderError,
    TooLargeError,
    UnsupportedError,
)
from dynamo_grpc.handlers import dynamo_endpoint
from dynamo_grpc.messages import prompt_text, set_fields
from dynamo_grpc.routing import RouterMode
from dynamo_grpc.endpoint import register_llm, register_model
from dynamo_grpc.entry import dynamo_worker
from dynamo_grpc.runtime import DistributedRuntime
from dynamo_grpc.serving import register_server
from dynamo_grpc.version import __version__
from dynamo_grpc.logs import configure_dynamo_logging
from dynamo_grpc.worker import Worker, run

__all__ = [
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
