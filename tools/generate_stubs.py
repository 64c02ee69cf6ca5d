"""Generate the Python stubs of protos/ into the packages of the same names, with type stubs.

`--check` compares what is committed with what the protos give, and writes nothing.
The generator is the oldest grpcio-tools that we support: generated code refuses runtimes that are older than it.
"""

from __future__ import annotations

import filecmp
import re
import shutil
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
#: Where each package lies.
PACKAGES = {"dynamo_grpc": ROOT, "dynamo_frontend": ROOT / "frontend"}


def generate(out: Path) -> None:
    """Write all stubs below `out`."""
    contract = sorted(str(p) for p in (PROTOS / "dynamo_grpc" / "v1").glob("*.proto"))
    contract.append(str(PROTOS / "dynamo_frontend" / "oip" / "open_inference.proto"))
    etcd = [str(PROTOS / "dynamo_grpc" / "registry" / "etcd.proto")]
    include = ["", f"-I{PROTOS}", f"-I{files('grpc_tools') / '_proto'}"]
    plugin = f"--plugin=protoc-gen-mypy={Path(sys.executable).parent / 'protoc-gen-mypy'}"
    plugin_grpc = f"--plugin=protoc-gen-mypy_grpc={Path(sys.executable).parent / 'protoc-gen-mypy_grpc'}"
    python = [f"--python_out={out}", plugin, f"--mypy_out=quiet:{out}"]
    grpc = [f"--grpc_python_out={out}", plugin_grpc, f"--mypy_grpc_out=quiet:{out}"]
    services = [p for p in contract if re.search(r"^service ", Path(p).read_text(encoding="utf-8"), re.MULTILINE)]
    for args in ([*include, *python, *contract, *etcd], [*include, *grpc, *services]):
        if protoc.main(args) != 0:
            raise SystemExit("protoc failed")


def place(made: Path) -> Path:
    """Where a stub belongs."""
    return PACKAGES[made.parts[0]] / made


def committed() -> list[Path]:
    """The stubs that are there."""
    found = (path for package, root in PACKAGES.items() for path in (root / package).rglob("*_pb2*.py*"))
    return [path for path in found if path.suffix != ".pyc"]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        made = sorted(p.relative_to(folder) for p in Path(folder).rglob("*_pb2*"))
        if "--check" in sys.argv:
            stale = [
                p for p in made if not place(p).exists() or not filecmp.cmp(Path(folder) / p, place(p), shallow=False)
            ]
            stale += sorted(set(committed()) - {place(p) for p in made})
            if stale:
                raise SystemExit(f"stubs differ from protos/, run `make proto`: {', '.join(map(str, stale))}")
            print(f"{len(made)} stub files are what protos/ gives")
            return
        for old in committed():
            old.unlink()
        for path in made:
            shutil.copyfile(Path(folder) / path, place(path))
        print(f"wrote {len(made)} stub files")


if __name__ == "__main__":
    main()
