"""Write docs/contract.md, the contract's reference, from the comments of the protos; `--check` compares only.

Run by the interpreter that has grpcio-tools, as tools/generate_stubs.py is: the comments are in protoc's descriptors.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
PAGE = ROOT / "docs" / "contract.md"
PACKAGE = ".dynamo_grpc.v1."
ORDER = ("inference", "endpoint", "control", "model_card", "orca")
HEAD = """# The contract

<!-- written by tools/contract_page.py from the comments in protos/dynamo_grpc/v1; `make proto` does it -->

What clients, frontends and workers say to each other, message by message: the reference of
[`protos/dynamo_grpc/v1`](../protos/dynamo_grpc/v1), which has the same words beside each field. What a worker must do
with it: [workers in any language](workers-in-any-language.md). How clients use it: [clients over gRPC](grpc.md).

A field marked *optional* tells zero from unset: unset means the model's own default. Nothing that is here changes its
number, its type, its name or its meaning: `buf breaking` holds that against the last release, and the golden files in
`tests/wire` against what was sent before.
"""
_SCALARS = {
    number: name.removeprefix("TYPE_").lower() for name, number in descriptor_pb2.FieldDescriptorProto.Type.items()
}


def parse() -> dict[str, descriptor_pb2.FileDescriptorProto]:
    """The protos with their comments, by name."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image"
        paths = [str(PROTOS / "dynamo_grpc" / "v1" / f"{name}.proto") for name in ORDER]
        include = [f"-I{PROTOS}", f"-I{files('grpc_tools') / '_proto'}"]
        if protoc.main(["", *include, f"--descriptor_set_out={image}", "--include_source_info", *paths]) != 0:
            raise SystemExit("protoc failed")
        parsed = descriptor_pb2.FileDescriptorSet.FromString(image.read_bytes())
    by_name = {Path(file.name).stem: file for file in parsed.file}
    if missing := {path.stem for path in (PROTOS / "dynamo_grpc" / "v1").glob("*.proto")} - by_name.keys():
        raise SystemExit(f"add {', '.join(missing)} to ORDER")
    return by_name


class Page:
    """One file's part of the page."""

    def __init__(self, file: descriptor_pb2.FileDescriptorProto) -> None:
        self._file = file
        self._comments = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}

    def lines(self) -> Iterator[str]:
        """What it says, in the order of the file: services, then messages and enums."""
        yield f"\n## {Path(self._file.name).name}\n"
        yield self._comment((2,)) + "\n"  # of the package statement
        for number, service in enumerate(self._file.service):
            yield f"\n### Service `{self._file.package}.{service.name}`\n"
            yield self._comment((6, number)) + "\n"
            yield "| method | request | response | |\n|---|---|---|---|"
            for index, method in enumerate(service.method):
                response = ("stream of " if method.server_streaming else "") + _link(method.output_type)
                says = self._cell((6, number, 2, index))
                yield f"| `{method.name}` | {_link(method.input_type)} | {response} | {says} |"
        places = [((4, i), m) for i, m in enumerate(self._file.message_type)]
        places += [((5, i), e) for i, e in enumerate(self._file.enum_type)]
        lines_at = {tuple(place.path): place.span[0] for place in self._file.source_code_info.location}
        for path, thing in sorted(places, key=lambda place: lines_at[place[0]]):
            yield f"\n### {thing.name}\n"
            yield self._comment(path) + "\n"
            if isinstance(thing, descriptor_pb2.EnumDescriptorProto):
                yield "| value | number | |\n|---|---|---|"
                for index, value in enumerate(thing.value):
                    yield f"| `{value.name}` | {value.number} | {self._cell((*path, 2, index))} |"
            elif thing.field:
                yield from self._fields(path, thing)

    def _fields(self, path: tuple[int, ...], message: descriptor_pb2.DescriptorProto) -> Iterator[str]:
        yield "| field | number | type | |\n|---|---|---|---|"
        entries = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
        for index, field in enumerate(message.field):
            kind = _type(field, entries)
            if field.proto3_optional:
                kind = f"*optional* {kind}"
            elif field.HasField("oneof_index"):
                kind = f"{kind}, one of `{message.oneof_decl[field.oneof_index].name}`"
            yield f"| `{field.name}` | {field.number} | {kind} | {self._cell((*path, 2, index))} |"

    def _comment(self, path: tuple[int, ...]) -> str:
        lines = [line.strip() for line in self._comments.get(path, "").splitlines()]
        return "\n".join(line for line in lines if not line.startswith("buf:lint")).strip()

    def _cell(self, path: tuple[int, ...]) -> str:
        return " ".join(self._comment(path).split()).replace("|", "\\|")


def _type(field: descriptor_pb2.FieldDescriptorProto, entries: dict[str, descriptor_pb2.DescriptorProto]) -> str:
    entry = entries.get(field.type_name.rpartition(".")[2]) if field.type_name else None
    if entry is not None:
        return f"map of {_scalar(entry.field[0])} to {_scalar(entry.field[1])}"
    is_repeated = field.label == descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED
    return ("repeated " if is_repeated else "") + _scalar(field)


def _scalar(field: descriptor_pb2.FieldDescriptorProto) -> str:
    return _link(field.type_name) if field.type_name else _SCALARS[field.type]


def _link(name: str) -> str:
    if name.startswith(PACKAGE):
        short = name.removeprefix(PACKAGE)
        return f"[{short}](#{short.lower()})"
    return f"`{name.removeprefix('.')}`"


def main() -> None:
    parsed = parse()
    text = HEAD + "\n".join(line for name in ORDER for line in Page(parsed[name]).lines()) + "\n"
    if "--check" not in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
        print(f"wrote {PAGE.relative_to(ROOT)}")
    elif PAGE.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{PAGE.relative_to(ROOT)} is not what the protos say: run `make proto`")


if __name__ == "__main__":
    main()
