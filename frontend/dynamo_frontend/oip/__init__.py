"""The Open Inference Protocol v2 at the frontend's gRPC port, for clients of KServe and Triton.

Its messages are of the package `inference`, as every copy of them is: no other one may be imported in the same process.
Hence they are here, where the frontend alone loads them.
"""
