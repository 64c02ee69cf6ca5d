"""Keys under a lease, kept alive by a task; a lost lease is replaced by a new one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import grpc

from dynamo_grpc.registry import etcd_pb2 as pb
from dynamo_grpc.registry import wire
from dynamo_grpc.registry.base import Registration, Renew

if TYPE_CHECKING:
    from dynamo_grpc.registry.etcd import EtcdRegistry

logger = logging.getLogger(__name__)


class EtcdRegistration(Registration):
    """Keys under a lease of their own, kept alive by a task; a lost lease is replaced by a new one."""

    def __init__(self, registry: EtcdRegistry, values: Mapping[str, bytes], renew: Renew | None = None) -> None:
        self._registry, self._renew = registry, renew
        self._values = dict(values)
        self._was_registered = False
        self._registered = asyncio.Event()
        self._changed = asyncio.Event()
        self._lease_id = 0
        self._lease_ends = 0.0
        self._task = asyncio.get_running_loop().create_task(self._run(), name="etcd registration")

    async def wait_registered(self) -> None:
        await self._registered.wait()

    async def update(self, values: Mapping[str, bytes]) -> None:
        self._registered.clear()
        self._values = dict(values)
        self._changed.set()
        await self._registered.wait()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self._lease_id:
            with contextlib.suppress(grpc.RpcError):
                await self._registry.call(wire.LEASE_REVOKE, pb.LeaseRevokeRequest(ID=self._lease_id), timeout_s=2.0)
            self._lease_id = 0

    async def _run(self) -> None:
        backoff_s, is_told = 0.2, False
        while True:
            started = time.monotonic()
            try:
                await self._end_lease()
                await self._hold_lease()
                logger.warning("%s: lease lost, registering again", self._registry.description)
            except grpc.RpcError as error:
                if not is_told:
                    logger.warning(
                        "%s: not registered, trying again: %s", self._registry.description, wire.describe(error)
                    )
                    is_told = True
                self._registry.rotate(error)
            if time.monotonic() - started > 5.0:
                backoff_s, is_told = 0.2, False
            await asyncio.sleep(backoff_s * self._registry.rng.uniform(0.5, 1.0))
            backoff_s = min(backoff_s * 2, 2.0)

    async def _end_lease(self) -> None:
        """See to it that the lease before is over, before another one is granted.

        A put that timed out may still be applied; if its lease lived, it would move the keys to it, and they would go
        with it. Under a lease that is over it fails.
        """
        if not self._lease_id:
            return
        try:
            await self._registry.call(wire.LEASE_REVOKE, pb.LeaseRevokeRequest(ID=self._lease_id))
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND and time.monotonic() < self._lease_ends:
                raise  # tried again until it is revoked, or over by itself
        self._lease_id = 0

    async def _hold_lease(self) -> None:
        """Grant a lease, put the keys, keep both alive; returns when the lease is lost."""
        self._changed.clear()
        granted = await self._registry.call(wire.LEASE_GRANT, pb.LeaseGrantRequest(TTL=self._registry.settings.ttl_s))
        self._lease_id = granted.ID
        expires = self._lease_ends = time.monotonic() + granted.TTL
        if self._was_registered and self._renew is not None:
            self._values = dict(self._renew())
        keys = await self._put_all(self._values, set())
        self._was_registered = True
        self._registered.set()
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), granted.TTL / 3 * self._registry.rng.uniform(0.8, 1.0))
            if self._changed.is_set():
                self._changed.clear()
                keys = await self._put_all(self._values, keys)
                self._registered.set()
            asked = time.monotonic()
            self._lease_ends = asked + granted.TTL + granted.TTL / 3
            try:
                ttl_s = await self._keep_alive(granted.TTL / 3)
                if ttl_s and not await self._has_keys(keys):
                    keys = await self._put_all(self._values, keys)
            except (grpc.RpcError, TimeoutError) as error:
                self._registry.rotate(error)
                ttl_s = None
            if ttl_s == 0 or (ttl_s is None and time.monotonic() >= expires):
                return
            if ttl_s:
                expires = asked + ttl_s

    async def _put_all(self, values: Mapping[str, bytes], old_keys: set[str]) -> set[str]:
        puts = [
            pb.RequestOp(request_put=pb.PutRequest(key=key.encode(), value=value, lease=self._lease_id))
            for key, value in values.items()
        ]
        gone = [
            pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key.encode()))
            for key in old_keys - values.keys()
        ]
        await self._registry.call(wire.TXN, pb.TxnRequest(success=puts + gone))
        return set(values)

    async def _has_keys(self, keys: set[str]) -> bool:
        """Whether the keys hang on our lease: somebody may have deleted them."""
        request = pb.LeaseTimeToLiveRequest(ID=self._lease_id, keys=True)
        answer = await self._registry.call(wire.LEASE_TIME_TO_LIVE, request)
        return {key.decode() for key in answer.keys} >= keys

    async def _keep_alive(self, timeout_s: float) -> int:
        """Ask for another full time to live; 0 says that the lease is gone."""
        registry = self._registry
        call = wire.stream(registry.channel(), wire.LEASE_KEEP_ALIVE)(metadata=registry.metadata() + wire.LEADER)
        try:
            async with asyncio.timeout(timeout_s):
                await call.write(pb.LeaseKeepAliveRequest(ID=self._lease_id))
                response = await call.read()
                if response is grpc.aio.EOF:
                    raise TimeoutError("keep-alive stream ended")
                return int(response.TTL)
        finally:
            call.cancel()
