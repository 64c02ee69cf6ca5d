"""For tests of workers and clients: a mesh inside one process, on real gRPC, without a registry server; and faults."""

from dynamo_grpc.testing.clock import FakeClock
from dynamo_grpc.testing.faults import Faults
from dynamo_grpc.testing.mesh import Mesh

__all__ = ["FakeClock", "Faults", "Mesh"]
