"""`dynamo-grpc protos`: the contract as files, for generators of other languages."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from dynamo_grpc.cli.options import MeshCommand
from dynamo_grpc.errors import ConfigurationError

_PACKAGE = Path(__file__).resolve().parent.parent
#: Where they are in an installed package, and in a clone of the repository.
_PLACES = (_PACKAGE / "protos", _PACKAGE.parent / "protos")
_FOLDERS = ("dynamo_grpc/v1", "google/rpc")


@click.command(
    cls=MeshCommand,
    epilog="""\b
Example:
  dynamo-grpc protos protos && buf generate protos --path protos/dynamo_grpc/v1""",
)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def protos(folder: Path) -> None:
    """Write the contract's .proto files below FOLDER, with those of google.rpc that error details are made of."""
    source = next((place for place in _PLACES if (place / _FOLDERS[0]).is_dir()), None)
    if source is None:
        raise ConfigurationError(f"the .proto files are missing beside {_PACKAGE}")
    for name in _FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for path in sorted((source / name).glob("*.proto")):
            shutil.copyfile(path, folder / name / path.name)
            click.echo(folder / name / path.name)
