"""The golden wire files: what was sent once is read for ever. Other languages read them in tests/e2e/test_languages.py."""

import importlib.util
import json
from typing import Any

import pytest
from google.protobuf import message_factory
from google.protobuf.unknown_fields import UnknownFieldSet

from dynamo_grpc.v1 import control_pb2, endpoint_pb2, inference_pb2, model_card_pb2, orca_pb2

from ..conftest import ROOT

WIRE = ROOT / "tests" / "wire"
EXPECTED = json.loads((WIRE / "expected.json").read_text(encoding="utf-8"))
MODULES = (inference_pb2, endpoint_pb2, control_pb2, model_card_pb2, orca_pb2)


def tool() -> Any:
    spec = importlib.util.spec_from_file_location("golden_wire", ROOT / "tools" / "golden_wire.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def message_class(name: str) -> Any:
    kind = name.partition(".")[0]
    found = [m.DESCRIPTOR.message_types_by_name[kind] for m in MODULES if kind in m.DESCRIPTOR.message_types_by_name]
    return message_factory.GetMessageClass(found[0])


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_file_is_read_and_written_as_it_was(name: str) -> None:
    data = (WIRE / f"{name}.binpb").read_bytes()
    message = message_class(name).FromString(data)
    assert tool().says(message) == EXPECTED[name]
    assert len(UnknownFieldSet(message)) == 0
    assert message.SerializeToString(deterministic=True) == data


def test_every_message_has_its_files() -> None:
    wanted = {name for name, _ in tool().messages()}
    assert wanted == set(EXPECTED) == {path.stem for path in WIRE.glob("*.binpb")}, "run tools/golden_wire.py"


def test_zero_is_not_unset() -> None:
    zeros = inference_pb2.SamplingOptions.FromString((WIRE / "SamplingOptions.zeros.binpb").read_bytes())
    assert zeros.HasField("temperature")
    assert zeros.HasField("top_k")
    assert not inference_pb2.SamplingOptions().HasField("temperature")
