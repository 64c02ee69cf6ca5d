"""Which instance gets a request: pure policies, no I/O."""

from dynamo_grpc.routing.policies import POLICIES, Candidate, Policy, RouterMode, make_policy

__all__ = ["POLICIES", "Candidate", "Policy", "RouterMode", "make_policy"]
