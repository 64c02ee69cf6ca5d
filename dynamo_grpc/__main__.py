"""`python -m dynamo_grpc` is `dynamo-grpc`."""

from dynamo_grpc.cli import main

main(prog_name="dynamo-grpc")
