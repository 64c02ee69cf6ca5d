"""Judges a worker from outside, by the contract alone: any language, any library.

It speaks plain gRPC with the generated stubs and none of the library's clients, so that it sees what other clients see.
"""

from dynamo_grpc.conformance.rule import Broken, NotSeen, Report, Rule, Verdict
from dynamo_grpc.conformance.run import RULES, judge

__all__ = ["RULES", "Broken", "NotSeen", "Report", "Rule", "Verdict", "judge"]
