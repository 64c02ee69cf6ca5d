"""Write the golden wire files: the bytes of each message of the contract, with every field set.

What is there stays as it is, for it is what other versions and other languages have sent; only what is missing is
written. `tests/wire/expected.json` has what each file says. Tests in Python, Go, Node, Java and Rust read them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf import duration_pb2, json_format, message_factory, struct_pb2, timestamp_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from dynamo_grpc.v1 import control_pb2, endpoint_pb2, inference_pb2, model_card_pb2, orca_pb2

WIRE = Path(__file__).resolve().parent.parent / "tests" / "wire"
FILES = (inference_pb2, endpoint_pb2, control_pb2, model_card_pb2, orca_pb2)
_DEEPEST = 6


class Filler:
    """Fills messages with what is easily lost on the way: large numbers, all of Unicode's planes, zero bytes."""

    def __init__(self) -> None:
        self._count = 0

    def fill(self, message: Message, chosen: str = "", depth: int = 0) -> None:
        """Set every field; of a oneof, `chosen` or the first."""
        if isinstance(message, struct_pb2.Struct):
            message.update({"ключ": [0.5, "🙂", True, None]})
            return
        if isinstance(message, struct_pb2.Value):
            message.string_value = self.scalar(FieldDescriptor.TYPE_STRING)
            return
        if isinstance(message, (timestamp_pb2.Timestamp, duration_pb2.Duration)):
            message.seconds, message.nanos = 1_700_000_000, 500_000_000
            return
        taken: set[str] = set()
        for field in message.DESCRIPTOR.fields:
            oneof = field.containing_oneof
            if oneof is not None and len(oneof.fields) > 1:
                wanted = chosen if chosen in [f.name for f in oneof.fields] else oneof.fields[0].name
                if field.name != wanted or oneof.name in taken:
                    continue
                taken.add(oneof.name)
            self._set(message, field, depth)

    def _set(self, message: Message, field: FieldDescriptor, depth: int) -> None:
        target: Any = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key, value = field.message_type.fields
            target[self.scalar(key.type)] = self.scalar(value.type)
        elif field.message_type is not None and depth >= _DEEPEST:
            return
        elif field.is_repeated:
            for _ in range(2):
                if field.message_type is not None:
                    self.fill(target.add(), depth=depth + 1)
                else:
                    target.append(self.scalar(field.type, field))
        elif field.message_type is not None:
            target.SetInParent()
            self.fill(target, depth=depth + 1)
        else:
            setattr(message, field.name, self.scalar(field.type, field))

    def scalar(self, kind: int, field: FieldDescriptor | None = None) -> Any:
        """The next value of a type."""
        self._count += 1
        number = self._count
        match kind:
            case FieldDescriptor.TYPE_STRING:
                return f"text {number}, größe 你 🙂"
            case FieldDescriptor.TYPE_BYTES:
                return bytes([0, 255, number % 256])
            case FieldDescriptor.TYPE_BOOL:
                return True
            case FieldDescriptor.TYPE_FLOAT | FieldDescriptor.TYPE_DOUBLE:
                return number + 0.25
            case FieldDescriptor.TYPE_ENUM:
                assert field is not None
                return field.enum_type.values[-1].number
            case FieldDescriptor.TYPE_UINT64 | FieldDescriptor.TYPE_FIXED64:
                return 2**64 - number
            case FieldDescriptor.TYPE_INT64:
                return -(2**62) - number
            case FieldDescriptor.TYPE_INT32:
                return -number
        return 2**32 - number


def messages() -> Iterator[tuple[str, Message]]:
    """Each message by the name of its file: one for each alternative of its oneofs, and one whose options are zero."""
    for file in FILES:
        for descriptor in file.DESCRIPTOR.message_types_by_name.values():
            cls = message_factory.GetMessageClass(descriptor)
            oneofs = [oneof for oneof in descriptor.oneofs if len(oneof.fields) > 1]
            for chosen in [field.name for oneof in oneofs for field in oneof.fields] or [""]:
                message = cls()
                Filler().fill(message, chosen)
                yield f"{descriptor.name}.{chosen}" if chosen else descriptor.name, message
            if optional := _optional(descriptor):
                message = cls()
                for field in optional:
                    setattr(message, field.name, field.default_value)
                yield f"{descriptor.name}.zeros", message


def _optional(descriptor: Descriptor) -> list[FieldDescriptor]:
    """Scalars that are there or not, whatever their value: zero is not unset."""
    return [f for f in descriptor.fields if f.message_type is None and f.has_presence and _is_alone(f)]


def _is_alone(field: FieldDescriptor) -> bool:
    return field.containing_oneof is not None and len(field.containing_oneof.fields) == 1


def says(message: Message) -> Any:
    """A message as JSON."""
    return json.loads(json_format.MessageToJson(message, preserving_proto_field_name=True))


def main() -> None:
    path = WIRE / "expected.json"
    expected = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    num_written = 0
    for name, message in messages():
        if not (WIRE / f"{name}.binpb").exists():
            (WIRE / f"{name}.binpb").write_bytes(message.SerializeToString(deterministic=True))
            expected[name] = says(message)
            num_written += 1
    path.write_text(json.dumps(expected, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    print(f"wrote {num_written} of {len(expected)} files")


if __name__ == "__main__":
    main()
