"""The version of the library."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("dynamo-grpc")
except PackageNotFoundError:  # run from a folder that isn't installed
    VERSION = "0+unknown"
