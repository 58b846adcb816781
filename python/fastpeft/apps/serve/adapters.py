"""The adapters of a server by name: those of its directory, and what requests may change about them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from pathlib import Path
from typing import Any

from ... import CONFIG_NAME, AdapterFileError, check_adapter_name
from ...pool import AdapterLoadError, PoolFull, UnknownAdapterError
from .answers import model_entry
from .engine import Engine
from .errors import ApiError, bad, short, unknown, unusable

logger = logging.getLogger("fastpeft.apps.serve")

_LOAD = 60.0  # seconds for an adapter that a request loads


class Adapters:
    """base: the name of the model without adapter, which no adapter can have. by_request: whether requests may load and
    unload adapters, of folders below `directory`. every: seconds after which the directory is looked through again."""

    def __init__(
        self, engine: Engine, base: str, directory: Path | None, by_request: bool, every: float
    ) -> None:
        self.engine, self.base, self.every = engine, base, every
        self.pool = engine.pool
        self.directory = None if directory is None else directory.resolve()
        self.by_request = by_request and self.pool is not None
        self.created = int(time.time())
        self._unloaded: set[str] = set()  # by request; their folders are still in the directory
        self._loading: dict[str, object] = {}  # what stands for the last load of a name by a request
        self._looked = 0.0
        self._looking = asyncio.Lock()

    def names(self) -> list[str]:
        known = [] if self.pool is None else self.pool.names()
        return [name for name in known if name != self.base and name not in self._unloaded]

    def entries(self) -> list[dict[str, Any]]:
        return [self.entry(name) for name in (self.base, *self.names())]

    def entry(self, name: str) -> dict[str, Any]:
        return model_entry(name, None if name == self.base else self.base, self.created)

    async def find(self, name: str) -> None:
        """Raise 404 for a name that is no adapter's, after another look at the directory if it has such a folder."""
        if not self._known(name) and self._is_folder(name):
            await self.look()
        if not self._known(name):
            raise unknown(name)

    def _is_folder(self, name: str) -> bool:
        """True if a look at the directory might find it. Unknown names alone cost no look."""
        if self.pool is None or self.directory is None or name in self.pool or name in self.pool.registry.refused:
            return False
        try:
            folder: Path = self.directory / check_adapter_name(name)
            return (folder / str(CONFIG_NAME)).is_file()
        except (AdapterFileError, OSError):
            return False

    def _known(self, name: str) -> bool:
        return self.pool is not None and name in self.pool and name not in self._unloaded

    async def look(self, at_most_every: float = 0.0) -> None:
        """Look through the directory, on a thread: adapters that are new, gone or changed."""
        if self.pool is None:
            return
        async with self._looking:
            if time.monotonic() - self._looked >= at_most_every:
                gone = await asyncio.to_thread(self._rescan, set(self._unloaded))
                self._unloaded -= gone
                self._looked = time.monotonic()

    def _rescan(self, unloaded: set[str]) -> set[str]:
        """On a thread: the pool's look, and those of these names that have no folder any more."""
        assert self.pool is not None
        self.pool.rescan()
        return {name for name in unloaded if not self._in_directory(name)}

    def _in_directory(self, name: str) -> bool:
        """True if there is a folder of this name, which is an adapter's."""
        return self.directory is not None and (self.directory / name / str(CONFIG_NAME)).is_file()

    async def keep_looking(self) -> None:
        while True:
            await asyncio.sleep(self.every)
            try:
                await self.look(self.every / 2)
            except OSError as error:  # the directory is away for a while
                logger.warning("cannot look through %s: %s", self.directory, error)

    async def load(self, name: str, path: str) -> None:
        """Make the adapter of a folder below the directory known by this name. Raises ApiError."""
        assert self.directory is not None
        try:
            folder = (self.directory / path).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # a character that no path has, a loop of links
            raise bad(f"lora_path: {short(path)} cannot be a path", "lora_path") from error
        if self.directory not in folder.parents:
            raise bad(f"lora_path: {short(path)} is not below the server's directory of adapters", "lora_path")
        if name == self.base:
            raise bad(f"lora_name: {name!r} is the base model's", "lora_name")
        hidden = name in self._unloaded
        if hidden:
            self._unloaded.discard(name)
            self._remove(name)  # found again in the directory
        try:
            await self._load(name, path, folder)
        except ApiError:
            if hidden and not self._known(name):
                self._unloaded.add(name)
            raise

    async def _load(self, name: str, path: str, folder: Path) -> None:
        pool = self.pool
        assert pool is not None
        try:
            pool.add(name, folder)
        except FileNotFoundError as error:
            why = f"lora_path: {short(path)} holds no adapter"
            raise ApiError(404, why, "adapter_not_found", "lora_path") from error
        except OSError as error:
            raise bad(f"lora_path: {short(path)} cannot be read: {error.strerror}", "lora_path") from error
        except ValueError as error:
            raise bad(f"lora_name: {error}", "lora_name") from error
        mine = self._loading[name] = object()
        try:
            await asyncio.to_thread(lambda: pool.acquire(name, _LOAD).release())
        except AdapterLoadError as error:
            if self._loading.get(name) is not mine:  # and by this name there may be another one now
                why = f"adapter {short(name)} was unloaded while it was loaded"
                raise ApiError(409, why, "adapter_unloaded", "lora_name") from error
            self._remove(name)
            raise unusable(error) from error
        except PoolFull:
            pass  # it is read when there is room
        finally:
            if self._loading.get(name) is mine:
                del self._loading[name]

    def unload(self, name: str) -> None:
        """Forget an adapter; requests that run with it end with it. Raises ApiError."""
        if self.pool is None or not self._known(name):
            raise unknown(name)
        self._loading.pop(name, None)
        self._remove(name)
        if self._in_directory(name):  # where the next look finds it again
            self._unloaded.add(name)

    def _remove(self, name: str) -> None:
        assert self.pool is not None
        with contextlib.suppress(UnknownAdapterError):  # gone meanwhile, by a look at the directory
            self.pool.remove(name)
