"""etcd with TLS, client certificates and passwords; and what wrong ones are told."""

import logging
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from dynamo_grpc.registry import View
from dynamo_grpc.registry.etcd import EtcdRegistry
from dynamo_grpc.registry.etcd_settings import EtcdSettings

from ..conftest import etcd_binary, eventually, free_port


class SecureEtcd:
    """A real etcd that takes TLS alone, with client certificates, and knows a user."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.ca, self.cert, self.key = (str(folder / name) for name in ("ca.pem", "cert.pem", "key.pem"))
        authority.cert_pem.write_to_path(self.ca)
        issued = authority.issue_cert("localhost", "127.0.0.1", common_name="root")
        issued.private_key_pem.write_to_path(self.key)
        issued.cert_chain_pems[0].write_to_path(self.cert)
        port, peer = free_port(), free_port()
        self.endpoint = f"https://127.0.0.1:{port}"
        args = ["--data-dir", folder / "data", "--listen-client-urls", self.endpoint, "--log-level", "error"]
        args += ["--advertise-client-urls", self.endpoint, "--listen-peer-urls", f"http://127.0.0.1:{peer}"]
        args += ["--cert-file", self.cert, "--key-file", self.key, "--client-cert-auth", "--trusted-ca-file", self.ca]
        self.process = subprocess.Popen([etcd_binary(), *args], stderr=subprocess.DEVNULL)
        end = time.monotonic() + 20
        while self.ctl("endpoint", "health", check=False):
            assert time.monotonic() < end, "etcd does not come up"
            time.sleep(0.1)
        self.ctl("user", "add", "root:secret")
        self.ctl("user", "grant-role", "root", "root")
        self.ctl("auth", "enable")

    def ctl(self, *args: str, check: bool = True) -> int:
        tls = ["--cacert", self.ca, "--cert", self.cert, "--key", self.key, "--endpoints", self.endpoint]
        return subprocess.run([etcd_binary("etcdctl"), *tls, *args], check=check, capture_output=True).returncode

    def env(self, **changes: str) -> dict[str, str]:
        return {
            "ETCD_ENDPOINTS": self.endpoint,
            "ETCD_LEASE_TTL": "5",
            "ETCD_AUTH_CA": self.ca,
            "ETCD_AUTH_CLIENT_CERT": self.cert,
            "ETCD_AUTH_CLIENT_KEY": self.key,
            "ETCD_AUTH_USERNAME": "root",
            "ETCD_AUTH_PASSWORD": "secret",
            **changes,
        }


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureEtcd]:
    server = SecureEtcd(tmp_path_factory.mktemp("secure"))
    yield server
    server.process.kill()
    server.process.wait()


async def test_register_and_watch_with_tls_and_a_password(secure: SecureEtcd) -> None:
    async with EtcdRegistry(EtcdSettings.from_env(secure.env())) as registry:
        view = View.start(registry, "/secure/")
        registration = await registry.register({"/secure/a": b"1"})
        await eventually(lambda: "/secure/a" in view.entries)
        registry._token = "stale"  # as after a restart of etcd
        await registration.update({"/secure/b": b"2"})
        await eventually(lambda: view.entries.keys() == {"/secure/b"})
        await registration.close()
        await eventually(lambda: not view.entries)
        await view.close()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"ETCD_AUTH_PASSWORD": "wrong"}, "authentication failed"),
        ({"ETCD_AUTH_USERNAME": "", "ETCD_AUTH_CLIENT_CERT": "", "ETCD_AUTH_CLIENT_KEY": ""}, "UNAVAILABLE"),
        ({"ETCD_AUTH_CA": "other"}, "CERTIFICATE_VERIFY_FAILED"),
    ],
    ids=["password", "no certificate", "CA"],
)
async def test_what_is_wrong_is_told_and_tried_again(
    secure: SecureEtcd, tmp_path: Path, change: dict[str, str], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    if change.get("ETCD_AUTH_CA"):
        trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
        change = {"ETCD_AUTH_CA": str(tmp_path / "other.pem")}
    with caplog.at_level(logging.WARNING):
        async with EtcdRegistry(EtcdSettings.from_env(secure.env(**change))) as registry:
            view = View.start(registry, "/secure/")
            await eventually(lambda: told in caplog.text, 15)
            assert secure.endpoint in caplog.text
            assert "secret" not in caplog.text
            assert not view.is_ready
            await view.close()
