"""etcd with TLS, client certificates and passwords; and what wrong settings are told."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from dynamo_grpc import ConfigurationError, RegistryError
from dynamo_grpc.registry import View, backoff
from dynamo_grpc.registry.etcd import EtcdRegistry
from dynamo_grpc.registry.etcd_settings import EtcdSettings

from ..conftest import eventually
from ..etcd import Etcd, Tls, free_port


class Secure:
    """A real etcd that takes TLS alone, with client certificates, and knows two users."""

    def __init__(self, folder: Path, version: str) -> None:
        authority = trustme.CA()
        ca, cert, key = (str(folder / name) for name in ("ca.pem", "cert.pem", "key.pem"))
        authority.cert_pem.write_to_path(ca)
        issued = authority.issue_cert("localhost", "127.0.0.1", common_name="root")
        issued.private_key_pem.write_to_path(key)
        issued.cert_chain_pems[0].write_to_path(cert)
        self.tls = Tls(ca, cert, key)
        self.etcd = Etcd(folder, version=version, tls=self.tls)
        self.etcd.start()
        self.etcd.ctl("user", "add", "root:secret")
        self.etcd.ctl("user", "grant-role", "root", "root")
        self.etcd.ctl("role", "add", "ours")
        self.etcd.ctl("role", "grant-permission", "ours", "--prefix=true", "readwrite", "/ours/")
        self.etcd.ctl("user", "add", "limited:secret")
        self.etcd.ctl("user", "grant-role", "limited", "ours")
        self.etcd.ctl("auth", "enable")

    def registry(self, **changes: str) -> EtcdRegistry:
        env = {
            "ETCD_ENDPOINTS": self.etcd.endpoints,
            "ETCD_LEASE_TTL": "5",
            "ETCD_AUTH_CA": self.tls.ca,
            "ETCD_AUTH_CLIENT_CERT": self.tls.cert,
            "ETCD_AUTH_CLIENT_KEY": self.tls.key,
            "ETCD_AUTH_USERNAME": "root",
            "ETCD_AUTH_PASSWORD": "secret",
            **changes,
        }
        return EtcdRegistry(EtcdSettings.from_env(env))


@pytest.fixture(
    scope="module",
    params=["3.5", pytest.param("current", marks=pytest.mark.full), pytest.param("3.4", marks=pytest.mark.full)],
)
def secure(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    server = Secure(tmp_path_factory.mktemp("secure"), request.param)
    yield server
    server.etcd.close()


async def test_register_and_watch_with_tls_and_a_password(secure: Secure) -> None:
    async with secure.registry() as registry:
        view = View.start(registry, "/secure/")
        registration = await registry.register({"/secure/a": b"1"})
        await eventually(lambda: "/secure/a" in view.entries)
        registry.client._token = "stale"  # as after a restart of etcd
        await registration.update({"/secure/b": b"2"})
        await eventually(lambda: view.entries.keys() == {"/secure/b"})
        registry.client._token = "stale"
        assert len(await registry.list("/secure/")) == 1
        await registration.close()
        await eventually(lambda: not view.entries)
        await view.close()


async def test_tokens_that_etcd_forgot_are_renewed(secure: Secure) -> None:
    """Simple tokens live in etcd's memory: a restart forgets them."""
    async with secure.registry() as registry:
        view = View.start(registry, "/secure/")
        registration = await registry.register({"/secure/a": b"1"})
        await eventually(lambda: "/secure/a" in view.entries)
        secure.etcd.kill()
        for member in secure.etcd.members:
            secure.etcd.start_member(member)
        async with asyncio.timeout(15):
            while registry.unreachable_since is None:
                await asyncio.sleep(0.05)
            while registry.unreachable_since is not None:
                await asyncio.sleep(0.05)
        await registration.update({"/secure/b": b"2"})
        await eventually(lambda: view.entries.keys() == {"/secure/b"})
        await registration.close()
        await view.close()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"ETCD_AUTH_PASSWORD": "wrong"}, "authentication failed"),
        pytest.param({"ETCD_AUTH_USERNAME": "limited"}, "permission denied", marks=pytest.mark.full),
        pytest.param({"ETCD_AUTH_CLIENT_CERT": "", "ETCD_AUTH_CLIENT_KEY": ""}, "UNAVAILABLE", marks=pytest.mark.full),
        pytest.param({"ETCD_AUTH_CA": "other"}, "CERTIFICATE_VERIFY_FAILED", marks=pytest.mark.full),
    ],
    ids=["password", "permission", "no certificate", "CA"],
)
async def test_what_is_wrong_is_told_once_and_tried_again(
    secure: Secure,
    tmp_path: Path,
    change: dict[str, str],
    told: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backoff, "_REFUSED_S", 0.3)
    if change.get("ETCD_AUTH_CA"):
        trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
        change = {"ETCD_AUTH_CA": str(tmp_path / "other.pem")}
    with caplog.at_level(logging.WARNING):
        async with secure.registry(**change) as registry:
            calls = []
            call = registry.client._call

            async def counting(method: Any, *args: Any) -> Any:
                calls.append(method)
                return await call(method, *args)

            registry.client._call = counting  # type: ignore[method-assign]
            view = View.start(registry, "/secure/")
            registration = await registry.register({"/secure/a": b"1"})
            await eventually(lambda: told in caplog.text and "registering" in caplog.text, 15)
            assert secure.etcd.endpoints in caplog.text
            assert "secret" not in caplog.text
            assert not view.is_ready
            is_refused = "ETCD_AUTH_PASSWORD" in change or "ETCD_AUTH_USERNAME" in change
            assert (registry.unreachable_since is None) is is_refused  # it answers, if only to refuse
            assert told in registry.problem
            tries = len(calls)
            await eventually(lambda: len(calls) > tries + 4)
            for activity in ("watching", "registering"):
                told_texts = [r.message for r in caplog.records if activity in r.message]
                assert len({text.partition("again: ")[2].partition(":")[0] for text in told_texts}) == len(told_texts)
            with pytest.raises(RegistryError, match=f"does not answer: .*{told}"):
                await registry.list("/secure/", timeout_s=4.0)
            await registration.close()
            await view.close()


async def test_a_user_with_a_role_needs_no_more(secure: Secure) -> None:
    async with secure.registry(ETCD_AUTH_USERNAME="limited") as registry:
        view = View.start(registry, "/ours/")
        registration = await registry.register({"/ours/a": b"1"})
        await eventually(lambda: "/ours/a" in view.entries)
        await registration.close()
        await eventually(lambda: not view.entries)
        await view.close()


async def test_an_endpoint_where_nobody_is(caplog: pytest.LogCaptureFixture) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    async with EtcdRegistry(EtcdSettings((endpoint,))) as registry:
        with pytest.raises(RegistryError, match=f"etcd at {endpoint} does not answer: .*refused"):
            await registry.list("/", timeout_s=1.0)


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"ETCD_ENDPOINTS": "etcd"}, r"'etcd' should be \[http://\|https://\]HOST:PORT, etcd's port is 2379"),
        ({"ETCD_ENDPOINTS": "http://etcd"}, "HOST:PORT"),
        ({"ETCD_ENDPOINTS": "http://root:hunter2@etcd:2379"}, "takes no user and password: .* ETCD_AUTH_PASSWORD$"),
        ({"ETCD_ENDPOINTS": "http://etcd:2379", "ETCD_AUTH_CA": "ca"}, "use https://"),
        ({"ETCD_LEASE_TTL": "99999999999999999999"}, "1 to 86400"),
        ({"ETCD_ENDPOINTS": "tcp://etcd:1"}, "should begin with http"),
        ({"ETCD_ENDPOINTS": "http://etcd:2379/v3"}, "HOST:PORT"),
        ({"ETCD_ENDPOINTS": "https://a:1,http://b:1"}, "either all endpoints are https"),
        ({"ETCD_LEASE_TTL": "0"}, "1 to 86400"),
        ({"ETCD_AUTH_USERNAME": "u"}, "go together"),
        ({"ETCD_AUTH_CLIENT_CERT": "c"}, "go together"),
    ],
)
def test_settings_that_cannot_be_right(env: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        EtcdSettings.from_env(env)


def test_certificate_files_are_looked_at_when_they_are_named(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("not a certificate")
    for name in (str(garbage), "/nowhere.pem"):
        with pytest.raises(ConfigurationError, match=f"{name}.*can't be used"):
            EtcdSettings(("https://a:1",), ca_file=name).credentials()
    authority = trustme.CA()
    issued, other = authority.issue_cert("a"), authority.issue_cert("a")
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    other.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    files = {"cert_file": str(tmp_path / "cert.pem"), "key_file": str(tmp_path / "key.pem")}
    with pytest.raises(ConfigurationError, match=r"can't be used: .*MISMATCH"):
        EtcdSettings(("https://a:1",), **files).credentials()


def test_a_password_in_clear_text_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    from dynamo_grpc.discovery import open_registry

    open_registry(env={"ETCD_AUTH_USERNAME": "u", "ETCD_AUTH_PASSWORD": "p"})
    assert "travels unencrypted" in caplog.text
