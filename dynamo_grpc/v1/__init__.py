"""The generated stubs of `protos/dynamo_grpc/v1`: the message classes are the data model in Python too."""
