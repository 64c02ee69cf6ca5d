"""Keys under a lease: what a process registers, and the one task that keeps all its leases alive.

Only etcd says that a lease is over. While it can't be asked, nothing is decided: the process works on, and when etcd
answers again the lease either still lives, or is replaced by a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Mapping
from typing import Any

import grpc

from dynamo_grpc.cancelling import is_being_cancelled
from dynamo_grpc.errors import RegistryError
from dynamo_grpc.registry import etcd_pb2 as pb
from dynamo_grpc.registry import wire
from dynamo_grpc.registry.backoff import Backoff
from dynamo_grpc.registry.base import Registration, Renew
from dynamo_grpc.registry.etcd_client import EtcdClient
from dynamo_grpc.registry.outages import Outages, TakenError

logger = logging.getLogger(__name__)

#: Keep-alives that are sent before the first answer is read; more could fill both windows and stand still.
_AT_ONCE = 100
#: How long the end of a lease may take at one member, and in all when a process leaves.
_REVOKE_S, _LEAVE_S = 1.0, 2.0


class LeaseKeeper:
    """Keeps the leases of a process alive: all of them in one turn, over one stream, each third of their time to live.

    Args:
        rng: for jitter, so that a fleet that started together doesn't ask together.
    """

    def __init__(self, client: EtcdClient, outages: Outages, rng: random.Random) -> None:
        self._client, self._rng = client, rng
        self._activity = outages.activity("keeping leases alive")
        self._on_lost: dict[int, Callable[[], None]] = {}
        self._ttl_s = 0
        self._has_leases = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def add(self, lease_id: int, ttl_s: int, on_lost: Callable[[], None]) -> None:
        """Keep a lease alive; `on_lost` is called once, when etcd says that it is over."""
        self._ttl_s = min(ttl_s, self._ttl_s) if self._on_lost else ttl_s
        self._on_lost[lease_id] = on_lost
        self._has_leases.set()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="etcd keep-alive")

    def remove(self, lease_id: int) -> None:
        """Do nothing for a lease any more."""
        self._on_lost.pop(lease_id, None)
        if not self._on_lost:
            self._has_leases.clear()

    async def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        backoff = Backoff(0.2, 1.0, self._rng)
        while True:
            if not self._on_lost:
                self._activity.close()  # there is nothing that could fail
            await self._has_leases.wait()
            try:
                async with self._client.stream(wire.LEASE_KEEP_ALIVE) as call:
                    while self._on_lost:
                        async with asyncio.timeout(self._ttl_s / 3):
                            await self._renew(call)
                        self._activity.works()
                        backoff.reset()
                        await asyncio.sleep(self._ttl_s / 3 * self._rng.uniform(0.8, 1.0))
            except (grpc.RpcError, RegistryError, TimeoutError) as error:
                self._activity.failed(error)
                await asyncio.sleep(backoff.next_s())
            except asyncio.CancelledError:
                if is_being_cancelled():
                    raise
                self._activity.broke(RegistryError("the keep-alive was cancelled"))  # by something below, not by us
                await asyncio.sleep(1.0)
            except Exception as error:  # without this task all leases end
                self._activity.broke(error)
                await asyncio.sleep(1.0)

    async def _renew(self, call: Any) -> None:
        """Ask for another full time to live for each lease."""
        lease_ids = list(self._on_lost)
        for start in range(0, len(lease_ids), _AT_ONCE):
            part = lease_ids[start : start + _AT_ONCE]
            for lease_id in part:
                await call.write(pb.LeaseKeepAliveRequest(ID=lease_id))
            for _ in part:
                answer = await call.read()
                if answer is grpc.aio.EOF:
                    raise RegistryError(f"the keep-alive stream ended: {await call.details()}")
                if answer.TTL <= 0 and (on_lost := self._on_lost.get(answer.ID)):
                    self.remove(answer.ID)
                    on_lost()


class EtcdRegistration(Registration):
    """Keys under a lease of their own; a lost lease is replaced by a new one.

    A put whose answer was lost may still be applied, after newer ones. So it is never repeated under the same lease:
    that one is revoked first, and under a lease that is over the late put fails.
    """

    def __init__(
        self,
        client: EtcdClient,
        keeper: LeaseKeeper,
        outages: Outages,
        rng: random.Random,
        values: Mapping[str, bytes],
        renew: Renew | None = None,
    ) -> None:
        self._client, self._keeper, self._rng, self._renew = client, keeper, rng, renew
        self._values, self._keys = dict(values), set[str]()
        self._activity = outages.activity("registering")
        self._lease_id, self._ttl_s = 0, 0
        self._is_lost = self._is_renewal_due = False
        self._registered, self._wake = asyncio.Event(), asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run(), name="etcd registration")

    async def wait_registered(self) -> None:
        await self._registered.wait()

    async def update(self, values: Mapping[str, bytes]) -> None:
        self._registered.clear()
        self._values = dict(values)
        self._wake.set()
        await self._registered.wait()

    async def orphan(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._keeper.remove(self._lease_id)
        self._activity.close()

    async def close(self) -> None:
        await self.orphan()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LEAVE_S):
                for _ in self._client.settings.endpoints if self._lease_id else ():
                    with contextlib.suppress(grpc.RpcError):  # another member may answer
                        await self._end_lease()
                        break
        self._lease_id = 0

    async def _run(self) -> None:
        backoff = Backoff(0.2, 2.0, self._rng)
        while True:
            problem: Exception | None = None
            try:
                await self._end_lease()
                await self._take_lease()
                backoff.reset()
                self._is_renewal_due = True  # whatever comes after this lease is another registration
                await self._hold_lease()
                logger.warning("the lease of %s was lost, registering again", next(iter(self._values), "nothing"))
            except (grpc.RpcError, TakenError, TimeoutError) as error:
                self._activity.failed(error)
                problem = error
            except Exception as error:  # a registration that dies unseen is a worker without traffic
                self._activity.broke(error)
            await asyncio.sleep(backoff.next_s(is_refused=wire.is_refusal(problem)))

    async def _end_lease(self) -> None:
        """See to it that the lease before is over, before another one is granted."""
        if not self._lease_id:
            return
        self._keeper.remove(self._lease_id)
        try:
            await self._client.call(wire.LEASE_REVOKE, pb.LeaseRevokeRequest(ID=self._lease_id), timeout_s=_REVOKE_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
        self._lease_id = 0

    async def _take_lease(self) -> None:
        """Grant a lease and put the keys under it."""
        granted = await self._client.call(wire.LEASE_GRANT, pb.LeaseGrantRequest(TTL=self._client.settings.ttl_s))
        self._lease_id, self._ttl_s, self._is_lost = granted.ID, granted.TTL, False
        if self._is_renewal_due and self._renew is not None:
            self._values = dict(self._renew())
        self._is_renewal_due = False
        self._keeper.add(granted.ID, granted.TTL, self._on_lost)
        await self._claim()

    def _on_lost(self) -> None:
        self._is_lost = True
        self._wake.set()

    async def _hold_lease(self) -> None:
        """Keep the keys as they should be; returns when the lease is lost."""
        while not self._is_lost:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._ttl_s * self._rng.uniform(0.8, 1.0)):
                    await self._wake.wait()
            is_asked = self._wake.is_set()
            self._wake.clear()
            if self._is_lost:
                return
            try:
                await self._claim(is_check=not is_asked)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:  # the lease: it ended before its keep-alive told
                    return
                raise

    async def _claim(self, *, is_check: bool = False) -> None:
        """Put what isn't there as it should be: at first, after an update, and when somebody changed or deleted it.

        Raises:
            TakenError: another process holds one of the keys.
            grpc.aio.AioRpcError: it may or may not have been put.
        """
        while True:
            values = self._values
            try:
                found = await self._read(values)
            except grpc.aio.AioRpcError as error:
                if is_check:
                    self._activity.failed(error)
                    return  # nothing was written, so nothing is in doubt; it is looked again
                raise
            wrong = [k for k, kv in found.items() if (kv.lease, kv.value) != (self._lease_id, values[k])]
            if not wrong and self._keys <= values.keys():
                if values is self._values:
                    break
                continue
            if await self._put(values, {key: found[key] for key in wrong}):
                self._keys = set(values)
                if is_check:
                    logger.warning("somebody had changed or deleted %s: put back", ", ".join(sorted(wrong)))
        self._activity.works()
        self._registered.set()

    async def _read(self, values: Mapping[str, bytes]) -> dict[str, pb.KeyValue]:
        """The keys as they stand in etcd; those that are missing have revision 0.

        Raises:
            TakenError: another process holds one of them.
        """
        reads = [pb.RequestOp(request_range=pb.RangeRequest(key=key.encode())) for key in values]
        answer = await self._client.call(wire.TXN, pb.TxnRequest(success=reads))
        found = {}
        for key, response in zip(values, answer.responses, strict=True):
            kvs = response.response_range.kvs
            found[key] = kvs[0] if kvs else pb.KeyValue()
            if kvs and kvs[0].lease not in (0, self._lease_id):
                text = kvs[0].value.decode(errors="replace")
                raise TakenError(f"{key} is registered by another process: {text[:300]}")
        return found

    async def _put(self, values: Mapping[str, bytes], wrong: Mapping[str, pb.KeyValue]) -> bool:
        """Put keys that still are as they were read, and delete those that are wanted no more; False if they aren't."""
        compare = [
            pb.Compare(target=pb.Compare.MOD, result=pb.Compare.EQUAL, key=key.encode(), mod_revision=kv.mod_revision)
            for key, kv in wrong.items()
        ]
        changes = [
            pb.RequestOp(request_put=pb.PutRequest(key=key.encode(), value=values[key], lease=self._lease_id))
            for key in wrong
        ] + [
            pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key.encode()))
            for key in self._keys - values.keys()
        ]
        answer = await self._client.call(wire.TXN, pb.TxnRequest(compare=compare, success=changes))
        return bool(answer.succeeded)
