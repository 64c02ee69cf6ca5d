"""Two hundred random faults on three etcd members, a frontend and three workers, under load.

`CHAOS_SEED=7 CHAOS_FAULTS=1000 pytest -m full tests/e2e/test_chaos.py` for other ones, and more.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dynamo_grpc.names import INSTANCES
from dynamo_grpc.records import decode_instance
from dynamo_grpc.registry import View
from dynamo_grpc.registry.etcd import EtcdRegistry
from dynamo_grpc.registry.etcd_settings import EtcdSettings

from ..conftest import Process
from ..etcd import Etcd, Member
from ..proxy import Proxy
from .rig import Rig, open_files

SEED = int(os.environ.get("CHAOS_SEED", "4"))
NUM_FAULTS = int(os.environ.get("CHAOS_FAULTS", "200"))

Heal = Callable[[], None]


class Watcher:
    """A view of the instances in this process, in a thread of its own, and how many tasks it takes."""

    def __init__(self, endpoints: str) -> None:
        self._settings = EtcdSettings(tuple(endpoints.split(",")))
        self.values: dict[str, bytes] = {}
        self.num_tasks = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()

    async def _run(self) -> None:
        async with EtcdRegistry(self._settings) as registry:
            view = View.start(registry, INSTANCES, decode_instance)
            while not self._stop.is_set():
                self.values = {key: entry.value for key, entry in view.entries.items()}
                self.num_tasks = len(asyncio.all_tasks())
                await asyncio.sleep(0.05)
            await view.close()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(10)


class Injector:
    """Draws faults and does them; each gives back what undoes it."""

    def __init__(self, mesh: Rig, rng: random.Random) -> None:
        self._mesh, self._rng = mesh, rng
        self._etcd = mesh.etcd
        self.log: list[str] = []
        self.num_by_hand = self.num_done_by_hand = 0
        self._of_etcd = [
            self.freeze_a_member,
            self.freeze_all_members,
            self.kill_a_member,
            self.kill_the_leader,
            self.kill_two_members,
            self.kill_all_members,
            self.lose_all_data,
            self.lose_all_data_and_the_id,
        ]
        self._others = [
            self.compact,
            self.revoke_a_lease,
            self.delete_a_key,
            self.change_a_key,
            self.cut_off,
            self.cut_off_from_one_member,
            self.pause_a_worker,
        ]

    def round(self) -> int:
        """A few faults at once, then all of them undone; gives their number."""
        rng = self._rng
        faults = rng.sample(self._others, rng.randrange(1, 5))
        if rng.random() < 0.6:
            faults.insert(rng.randrange(len(faults) + 1), rng.choice(self._of_etcd))
        heals: list[Heal] = []
        self.log.append(" + ".join(fault.__name__ for fault in faults))
        try:
            for fault in faults:
                heals.append(fault())
                time.sleep(rng.uniform(0.0, 1.5))
            time.sleep(rng.uniform(0.0, 3.0))
        finally:
            rng.shuffle(heals)
            for heal in heals:
                heal()
            self._etcd.start()
        return len(faults)

    # -- etcd's processes

    def _freeze(self, members: list[Member]) -> Heal:
        for member in members:
            member.signal(signal.SIGSTOP)
        return lambda: [member.signal(signal.SIGCONT) for member in members if member.process] and None

    def _kill(self, members: list[Member]) -> Heal:
        for member in members:
            member.kill()
        return lambda: [self._etcd.start_member(member) for member in members] and None

    def freeze_a_member(self) -> Heal:
        return self._freeze([self._rng.choice(self._etcd.members)])

    def freeze_all_members(self) -> Heal:
        return self._freeze(self._etcd.members)

    def kill_a_member(self) -> Heal:
        return self._kill([self._rng.choice(self._etcd.members)])

    def kill_the_leader(self) -> Heal:
        return self._kill([self._etcd.leader()])

    def kill_two_members(self) -> Heal:
        return self._kill(self._rng.sample(self._etcd.members, 2))

    def kill_all_members(self) -> Heal:
        return self._kill(self._etcd.members)

    def lose_all_data(self) -> Heal:
        self._etcd.lose_data()
        return lambda: None

    def lose_all_data_and_the_id(self) -> Heal:
        self._etcd.lose_data(f"token {len(self.log)}")
        return lambda: None

    # -- what stands in it; while it can't be reached, nothing happens

    def _by_hand(self, work: Callable[[str], None]) -> Heal:
        self.num_by_hand += 1
        try:
            if keys := sorted(self._etcd.instances()):
                work(self._rng.choice(keys))
                self.num_done_by_hand += 1
        except subprocess.SubprocessError as error:  # etcdctl's, or its time-out
            self.log.append(f"   (by hand: {error})"[:100])
        return lambda: None

    def compact(self) -> Heal:
        return self._by_hand(lambda _: self._etcd.compact())

    def revoke_a_lease(self) -> Heal:
        return self._by_hand(
            lambda _: (
                [self._etcd.ctl("lease", "revoke", i) for i in self._rng.sample(self._etcd.lease_ids(), 1)] and None
            )
        )

    def delete_a_key(self) -> Heal:
        return self._by_hand(lambda key: self._etcd.ctl("del", key) and None)

    def change_a_key(self) -> Heal:
        def change(key: str) -> None:
            value = self._etcd.instances()[key]
            self._etcd.ctl("put", key, json.dumps({**value, "address": "127.0.0.1:1"}))

        return self._by_hand(change)

    # -- the network, and workers

    def cut_off(self) -> Heal:
        name = self._rng.choice(sorted(self._mesh.proxies))
        self._mesh.cut(name, self._rng.choice([Proxy.drop, Proxy.refuse]))
        return self._mesh.heal

    def cut_off_from_one_member(self) -> Heal:
        proxies = self._mesh.proxies[self._rng.choice(sorted(self._mesh.proxies))]
        self._rng.choice([Proxy.drop, Proxy.refuse])(self._rng.choice(proxies))
        return self._mesh.heal

    def pause_a_worker(self) -> Heal:
        """For less than the 15 s after which pings give up a connection, and with it what runs there."""
        worker = self._rng.choice(self._mesh.workers)
        worker.signal(signal.SIGSTOP)
        timer = threading.Timer(self._rng.uniform(1.0, 8.0), worker.signal, (signal.SIGCONT,))
        timer.start()
        return timer.join


@pytest.fixture
def mesh(cli: Callable[..., Process], tmp_path: Path) -> Iterator[Rig]:
    etcd = Etcd(tmp_path, size=3)
    try:
        etcd.start()
        made = Rig(cli, etcd, num_workers=3, cut_off=("frontend", "worker 0", "worker 1", "worker 2"))
        try:
            yield made
        finally:
            made.close()
    finally:
        etcd.close()


@pytest.mark.full
@pytest.mark.timeout(60 + 6 * NUM_FAULTS)
def test_random_faults(mesh: Rig) -> None:
    injector = Injector(mesh, random.Random(SEED))
    watcher = Watcher(mesh.etcd.endpoints)
    pids = [process.pid for process in (mesh.frontend, *mesh.workers)]

    def rest() -> None:
        mesh.until_right(20)
        mesh.until(lambda: {k: json.loads(v) for k, v in watcher.values.items()} == mesh.etcd.instances(), 20)

    def held() -> tuple[int, list[int], int]:
        """Leases in etcd, files and sockets of each process, tasks of a watcher."""
        return len(mesh.etcd.lease_ids()), [open_files(pid) for pid in pids], watcher.num_tasks

    num_faults = num_rounds = 0
    try:
        injector.round()
        rest()
        time.sleep(2)
        leases, files, tasks = held()
        while num_faults < NUM_FAULTS:
            num_faults += injector.round()
            num_rounds += 1
            rest()
            mesh.load.go_on()
            assert not mesh.load.failed, mesh.load.failed
        mesh.until(lambda: held()[0] == leases == 3, 20)
        mesh.until(lambda: held()[2] <= tasks, 20)
        mesh.until(lambda: all(now <= then + 4 for now, then in zip(held()[1], files, strict=True)), 60)
        assert injector.num_done_by_hand > injector.num_by_hand / 2, injector.log
        print(f"{num_faults} faults in {num_rounds} rounds, {mesh.load.num_done} requests")
        mesh.check()
    except BaseException:
        print(f"seed {SEED}, rounds so far:", *injector.log, sep="\n  ")
        for process in (mesh.frontend, *mesh.workers):
            print(process.output[-4000:])
        raise
    finally:
        watcher.close()
