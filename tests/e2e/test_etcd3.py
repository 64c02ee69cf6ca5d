"""The package etcd3 and we read and write the same registry; it runs apart, with protobuf in pure Python."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynamo_grpc.names import INSTANCES
from dynamo_grpc.records import read_instances
from dynamo_grpc.registry import View
from dynamo_grpc.registry.etcd import EtcdRegistry
from dynamo_grpc.registry.etcd_settings import EtcdSettings

from ..conftest import eventually

KEY = f"{INSTANCES}etcd3/backend/generate/0000000000000001"
VALUE = '{"namespace":"etcd3","component":"backend","endpoint":"generate","instance_id":"1","address":"127.0.0.1:1"}'
SCRIPT = f"""
import sys, etcd3
host, port = sys.argv[1].split(":")
client = etcd3.client(host, int(port))
for value, meta in client.get_prefix("{INSTANCES}ours/"):
    print("read", meta.key.decode(), value.decode(), bool(meta.lease_id), flush=True)
lease = client.lease(30)
client.put("{KEY}", '{VALUE}', lease=lease)
print("put", flush=True)
sys.stdin.readline()
lease.revoke()
print("revoked", flush=True)
sys.stdin.readline()
client.delete("{INSTANCES}ours/a")
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with etcd3 0.12.0."""
    folder = tmp_path_factory.mktemp("etcd3")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [folder / "bin" / "pip", "install", "-q", "--disable-pip-version-check", "etcd3==0.12.0", "setuptools<81"]
    subprocess.run(install, check=True)
    return folder / "bin" / "python"


@pytest.mark.full
@pytest.mark.timeout(300)
async def test_both_ways(python: Path, etcd_endpoint: str) -> None:
    async with EtcdRegistry(EtcdSettings((etcd_endpoint,), ttl_s=5)) as registry:
        registration = await registry.register({f"{INSTANCES}ours/a": b"our value"})
        await registration.wait_registered()
        view = View.start(registry, INSTANCES)
        await view.wait_ready()
        env = {**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}
        theirs = subprocess.Popen(
            [python, "-c", SCRIPT, etcd_endpoint], env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert theirs.stdin is not None
        assert theirs.stdout is not None
        assert theirs.stdout.readline() == f"read {INSTANCES}ours/a our value True\n"
        assert theirs.stdout.readline() == "put\n"
        await eventually(lambda: KEY in view.entries)
        found = (record.instance for record in read_instances(view.entries.values()))
        instance = next(instance for instance in found if instance.namespace == "etcd3")
        assert (instance.instance_id, instance.address) == (1, "127.0.0.1:1")
        theirs.stdin.write("\n")
        theirs.stdin.flush()
        assert theirs.stdout.readline() == "revoked\n"
        await eventually(lambda: KEY not in view.entries)
        theirs.stdin.write("\n")
        theirs.stdin.flush()
        await eventually(lambda: f"{INSTANCES}ours/a" not in view.entries)
        assert theirs.wait(20) == 0
        await eventually(lambda: f"{INSTANCES}ours/a" in view.entries)  # its owner puts it back
        await registration.close()
        await view.close()
