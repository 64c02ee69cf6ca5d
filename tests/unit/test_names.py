import pytest

from dynamo_grpc import InvalidNameError
from dynamo_grpc.names import EndpointName, nearest


@pytest.mark.parametrize("text", ["ns.comp.ep", "dyn://ns.comp.ep"])
def test_a_name_has_three_parts(text: str) -> None:
    name = EndpointName.parse(text)
    assert (name.namespace, name.component, name.endpoint) == ("ns", "comp", "ep")
    assert str(name) == "ns.comp.ep"
    assert name.instance_key(255) == "/dynamo_grpc/v1/instances/ns/comp/ep/00000000000000ff"


@pytest.mark.parametrize("text", ["", "a", "a.b", "a.b.c.d", "a..c", "a.b/c.d", "a.b.c ", "-a.b.c", "a.b." + "x" * 64])
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(InvalidNameError):
        EndpointName.parse(text)


def test_nearest() -> None:
    assert nearest("dynamo.backend.genrate", ["dynamo.backend.generate", "x.y.z"]) == "dynamo.backend.generate"
    assert nearest("abc", ["xyz"]) is None
