"""The files of sessions for those who may see the session: whether it runs, sleeps or has ended. Reads and writes nothing else of it."""

from __future__ import annotations

import asyncio
import os
from typing import BinaryIO

from ash.config import Config
from ash.models import Session
from ash.sandbox import Budget, File, list_files, open_workspace_file, pack, unpack
from ash.store import Store

SKIPPED = frozenset(("node_modules", ".git", "__pycache__"))
"""Folders left out of every listing, as existing clients expect; an archive has them."""
HIDDEN = frozenset((".cache", ".npm", ".pnpm-store", ".yarn", ".venv", "venv", ".tmp", "tmp"))
_CONCURRENT = 2
"""Archives made or taken at once: each keeps a thread and the disk busy."""


class Workspaces:
    """Every method raises SessionNotFound for a session of another tenant, and NotFound for one without files."""

    def __init__(self, store: Store, config: Config) -> None:
        self._store, self._config = store, config
        self._slots = asyncio.Semaphore(_CONCURRENT)

    async def list(self, tenant_id: str, id: str, *, hidden: bool = True) -> tuple[list[File], bool]:
        """The files by path, and whether there are more than are shown."""
        folder = self._folder(await self._store.get_session(tenant_id, id))
        return await asyncio.to_thread(list_files, folder, SKIPPED if hidden else SKIPPED | HIDDEN)

    async def open(self, tenant_id: str, id: str, path: str) -> tuple[BinaryIO, int]:
        """A file, open for reading, and its size."""
        folder = self._folder(await self._store.get_session(tenant_id, id))
        return await asyncio.to_thread(open_workspace_file, folder, path)

    async def pack(self, tenant_id: str, id: str, target: BinaryIO) -> int:
        """Write the workspace into `target` as tar.gz; returns the number of files and folders."""
        session = await self._store.get_session(tenant_id, id)
        async with self._slots:
            return await asyncio.to_thread(pack, self._folder(session), target, self._budget(None))

    async def unpack(self, tenant_id: str, id: str, source: BinaryIO) -> int:
        """Put the files of a tar archive, gzipped or not, into the workspace; returns their number."""
        session = await self._store.get_session(tenant_id, id)
        async with self._slots:
            return await asyncio.to_thread(unpack, self._folder(session), source, self._budget(session))

    def _folder(self, session: Session) -> str:
        return os.path.join(self._config.data_dir, "sessions", session.id)

    def _budget(self, session: Session | None) -> Budget:
        """What comes in has to fit into the session's disk; what goes out is there already."""
        most, config = self._config.max_workspace_mb << 20, self._config
        if session is None:
            return Budget(most, 0)
        limits = session.options.get("limits") or {}
        disk_mb, files = limits.get("disk_mb", config.disk_mb), limits.get("max_files", config.max_files)
        return Budget(min(most, int(disk_mb) << 20) if disk_mb else most, int(files))
