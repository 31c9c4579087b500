"""Which adapters the engine child has, and who waits for one to come or go.

Owns that table and its futures; knows nothing of sockets, processes or versions. A child that dies
takes its adapters with it, and nobody here loads them again: that is for whoever knows why they
were loaded. Runs on the server's event loop.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from heedful_server.errors import EngineRequestError, HeedfulServerError
from heedful_server.protocol import (
    AdapterLoaded,
    AdapterRole,
    AdapterUnloaded,
    LoadAdapter,
    UnloadAdapter,
)


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """An adapter in a slot of the engine; num_heads is 0 unless it is a reward model."""

    adapter_id: str
    path: str
    role: AdapterRole
    num_bytes: int
    rank: int
    num_heads: int


@dataclass(frozen=True, slots=True)
class _Load:
    order: int
    message: LoadAdapter
    future: asyncio.Future[AdapterInfo]


@dataclass(frozen=True, slots=True)
class _Unload:
    order: int
    future: asyncio.Future[None]


class AdapterTable:
    """The adapters of a living child.

    The child answers a message after those that were sent before it, so whether a load or an unload
    has the last word is known here by the order in which they were sent.
    """

    def __init__(self, send: Callable[[LoadAdapter | UnloadAdapter], None]) -> None:
        self._send = send
        self._orders = count(1)
        self.loaded: dict[str, AdapterInfo] = {}
        self._loads: dict[str, _Load] = {}
        self._unloads: dict[str, list[_Unload]] = {}

    async def load(self, adapter_id: str, path: str, role: AdapterRole) -> AdapterInfo:
        """Ask for an adapter and wait until it serves."""
        order = next(self._orders)
        message = LoadAdapter(f"load-{order}", adapter_id, path, role)
        load = _Load(order, message, asyncio.get_running_loop().create_future())
        # It stays when the caller is cancelled, because the child will have the adapter all the
        # same.
        self._loads[message.request_id] = load
        self._send(message)
        return await load.future

    async def unload(self, adapter_id: str) -> None:
        """Take no more requests for an adapter and wait until its slot is free."""
        self.loaded.pop(adapter_id, None)
        unload = _Unload(next(self._orders), asyncio.get_running_loop().create_future())
        self._unloads.setdefault(adapter_id, []).append(unload)
        self._send(UnloadAdapter(adapter_id))
        await unload.future

    def take_loaded(self, message: AdapterLoaded) -> None:
        """The child says that an adapter serves, unless an unload is on its way already."""
        load = self._loads.pop(message.request_id)
        unloads = self._unloads.get(message.adapter_id, [])
        if any(unload.order > load.order for unload in unloads):
            _fail(load.future, EngineRequestError("not_loaded", "the adapter was unloaded again"))
            return
        revived = EngineRequestError("resource", "the adapter was loaded again before it had left")
        for unload in self._unloads.pop(message.adapter_id, ()):
            _fail(unload.future, revived)
        self.loaded[message.adapter_id] = info = _info(load.message, message)
        if not load.future.done():
            load.future.set_result(info)

    def take_unloaded(self, message: AdapterUnloaded) -> None:
        """The child says that an adapter is gone."""
        for unload in self._unloads.pop(message.adapter_id, ()):
            _free(unload)

    def take_failure(self, request_id: str, error: HeedfulServerError) -> None:
        """The child says that a request failed, which may be a load."""
        load = self._loads.pop(request_id, None)
        if load is not None:
            _fail(load.future, error)

    def lose_all(self, error: HeedfulServerError) -> None:
        """The child died: loads fail, and whatever should go is gone."""
        self.loaded.clear()
        for load in self._loads.values():
            _fail(load.future, error)
        for unloads in self._unloads.values():
            for unload in unloads:
                _free(unload)
        self._loads.clear()
        self._unloads.clear()


def _info(wanted: LoadAdapter, message: AdapterLoaded) -> AdapterInfo:
    return AdapterInfo(
        adapter_id=message.adapter_id,
        path=wanted.path,
        role=wanted.role,
        num_bytes=message.num_bytes,
        rank=message.rank,
        num_heads=message.num_heads,
    )


def _fail(future: asyncio.Future[AdapterInfo] | asyncio.Future[None], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _free(unload: _Unload) -> None:
    if not unload.future.done():
        unload.future.set_result(None)
