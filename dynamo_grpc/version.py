"""The version of the library."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("dynamo-grpc")
except PackageNotFoundError:  # run from a folder that isn't installed
    __version__ = "0+unknown"
