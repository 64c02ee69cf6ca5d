"""The standard services of every server: health with List, and reflection v1 beside v1alpha."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer as _HealthServicer
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha._async import ReflectionServicer

HEALTH = "grpc.health.v1.Health"
_REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
_REFLECTION_V1ALPHA = "grpc.reflection.v1alpha.ServerReflection"

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def _health_with_list() -> descriptor_pb2.FileDescriptorProto:
    """Health's file with List, which the package has since 1.81 alone."""
    file = descriptor_pb2.FileDescriptorProto()
    health_pb2.DESCRIPTOR.CopyToProto(file)
    if any(message.name == "HealthListRequest" for message in file.message_type):
        return file
    file.message_type.add(name="HealthListRequest")
    response = file.message_type.add(name="HealthListResponse")
    package, kinds = ".grpc.health.v1", descriptor_pb2.FieldDescriptorProto
    entry = response.nested_type.add(name="StatusesEntry", options={"map_entry": True})
    entry.field.add(name="key", number=1, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    for message, name, number, label, kind in (
        (entry, "value", 2, kinds.LABEL_OPTIONAL, f"{package}.HealthCheckResponse"),
        (response, "statuses", 1, kinds.LABEL_REPEATED, f"{package}.HealthListResponse.StatusesEntry"),
    ):
        message.field.add(name=name, number=number, type=kinds.TYPE_MESSAGE, label=label, type_name=kind)
    types = {"input_type": f"{package}.HealthListRequest", "output_type": f"{package}.HealthListResponse"}
    file.service[0].method.add(name="List", **types)
    return file


def _reflection_v1() -> descriptor_pb2.FileDescriptorProto:
    """v1alpha's file under v1's names: no Python package has it."""
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    text = file.SerializeToString().replace(b"grpc.reflection.v1alpha", b"grpc.reflection.v1_____")
    file = descriptor_pb2.FileDescriptorProto.FromString(text)  # same lengths, so still a valid message
    file.name, file.package = "grpc/reflection/v1/reflection.proto", "grpc.reflection.v1"
    for message in file.message_type:
        for field in (f for f in message.field if f.type_name):
            field.type_name = field.type_name.replace("v1_____", "v1")
    for method in file.service[0].method:
        method.input_type = method.input_type.replace("v1_____", "v1")
        method.output_type = method.output_type.replace("v1_____", "v1")
    return file


#: Of files that no package registers, or not as they are here: a pool of their own, so that the default one takes the
#: packages' files of the same names.
_POOL = descriptor_pool.DescriptorPool()
for _file in (_health_with_list(), _reflection_v1()):
    _POOL.Add(_file)  # type: ignore[no-untyped-call,unused-ignore]
_ListRequest: Any = message_factory.GetMessageClass(_POOL.FindMessageTypeByName("grpc.health.v1.HealthListRequest"))
_ListResponse: Any = message_factory.GetMessageClass(_POOL.FindMessageTypeByName("grpc.health.v1.HealthListResponse"))


class HealthServicer(_HealthServicer):  # type: ignore[misc]
    """Health with `List`, which the package's servicer leaves out."""

    async def List(self, request: Any, context: Any) -> Any:
        """All services with their status."""
        response = _ListResponse()
        for service, status in self._server_status.items():
            response.statuses[service].status = status
        return response


def add_health(server: grpc.aio.Server) -> HealthServicer:
    """Add the health service; everything is NOT_SERVING until set."""
    servicer = HealthServicer()
    methods = {
        "Check": grpc.unary_unary_rpc_method_handler(
            servicer.Check, health_pb2.HealthCheckRequest.FromString, health_pb2.HealthCheckResponse.SerializeToString
        ),
        "Watch": grpc.unary_stream_rpc_method_handler(
            servicer.Watch, health_pb2.HealthCheckRequest.FromString, health_pb2.HealthCheckResponse.SerializeToString
        ),
        "List": grpc.unary_unary_rpc_method_handler(
            servicer.List, _ListRequest.FromString, _ListResponse.SerializeToString
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(HEALTH, methods),))
    return servicer


class _Pool:
    """The default descriptor pool behind our own."""

    def __getattr__(self, name: str) -> Any:
        def find(*args: Any) -> Any:
            try:
                return getattr(_POOL, name)(*args)
            except KeyError:
                return getattr(descriptor_pool.Default(), name)(*args)

        return find


def add_reflection(server: grpc.aio.Server, services: list[str]) -> None:
    """Add reflection v1alpha and v1 (their messages are the same) for `services`."""
    names = sorted({*services, HEALTH, _REFLECTION_V1, _REFLECTION_V1ALPHA})
    servicer = ReflectionServicer(names, pool=_Pool())
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handler = grpc.method_handlers_generic_handler(_REFLECTION_V1, {"ServerReflectionInfo": method})
    server.add_generic_rpc_handlers((handler,))
