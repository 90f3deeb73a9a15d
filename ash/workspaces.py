"""The files of sessions for those who may see the session: whether it runs, sleeps or has ended. Reads and writes nothing else of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import BinaryIO, cast

from ash.config import Config
from ash.errors import Conflict, Overloaded, SessionEnded
from ash.models import ENDED, STARTING, Json, Session
from ash.sandbox import Budget, File, list_files, open_workspace_file, pack, unpack
from ash.store import Store

SKIPPED = frozenset(("node_modules", ".git", "__pycache__"))
"""Folders left out of every listing, as existing clients expect; an archive has them."""
HIDDEN = frozenset((".cache", ".npm", ".pnpm-store", ".yarn", ".venv", "venv", ".tmp", "tmp"))
MOST_ARCHIVES = 8
"""Archives on the server's disk at once, those that somebody still sends or fetches included."""
MOST_OF_TENANT = 4
"""Of those: who sends or fetches very slowly must not keep all others out."""
_CONCURRENT = 2
"""Archives made or taken at once, and folders listed: each keeps a thread and the disk busy, and others need both."""
_WAIT, _RETRY_AFTER = 30.0, 5.0


class Workspaces:
    """Every method raises SessionNotFound for a session of another tenant, NotFound for one without files, and Overloaded."""

    def __init__(self, store: Store, config: Config, limits_of: Callable[[Session], Json]) -> None:
        self._store, self._config, self._limits_of = store, config, limits_of
        self._packing, self._listing = asyncio.Semaphore(_CONCURRENT), asyncio.Semaphore(_CONCURRENT)
        self._archives = 0
        self._archives_of: Counter[str] = Counter()

    async def list(self, tenant_id: str, id: str, *, hidden: bool = True) -> tuple[list[File], bool]:
        """The files by path, and whether there are more than are shown."""
        folder = self._folder(await self._store.get_session(tenant_id, id))
        async with _turn(self._listing):
            return await asyncio.to_thread(list_files, folder, SKIPPED if hidden else SKIPPED | HIDDEN)

    async def open(self, tenant_id: str, id: str, path: str) -> tuple[BinaryIO, os.stat_result]:
        """A file, open for reading, and its state."""
        folder = self._folder(await self._store.get_session(tenant_id, id))
        return await asyncio.to_thread(open_workspace_file, folder, path)

    async def pack(self, tenant_id: str, id: str, target: BinaryIO) -> int:
        """Write the workspace into `target` as tar.gz; returns the number of files and folders."""
        session = await self._store.get_session(tenant_id, id)
        async with _turn(self._packing):
            return await asyncio.to_thread(pack, self._folder(session), target, Budget(self._config.max_workspace_mb << 20))

    async def check_writable(self, tenant_id: str, id: str) -> Session:
        """Raise Conflict for a session that gets its first files just now, and SessionEnded."""
        session = await self._store.get_session(tenant_id, id)
        if session.status == STARTING:
            raise Conflict("Session is starting; try again in a moment")
        if session.status == ENDED:
            raise SessionEnded("Session has ended — create a new session")
        return session

    async def unpack(self, tenant_id: str, id: str, source: BinaryIO) -> int:
        """Put the files of a tar archive, gzipped or not, into the workspace; returns their number."""
        async with _turn(self._packing):
            session = await self.check_writable(tenant_id, id)
            return await asyncio.to_thread(unpack, self._folder(session), source, self._budget(session))

    @contextlib.contextmanager
    def archive(self, tenant_id: str) -> Iterator[BinaryIO]:
        """A file without a name for one archive, on the disk of the data folder: /tmp may be memory.

        Closing it ends whoever still reads or writes it in a thread.
        """
        if self._archives >= MOST_ARCHIVES or self._archives_of[tenant_id] >= MOST_OF_TENANT:
            raise Overloaded("The server has as many archives under way as it takes; try again in a moment", retry_after=_RETRY_AFTER)
        self._archives += 1
        self._archives_of[tenant_id] += 1
        try:
            with tempfile.TemporaryFile(dir=self._config.data_dir) as file:
                yield cast("BinaryIO", file)
        finally:
            self._archives -= 1
            self._archives_of[tenant_id] -= 1

    def _folder(self, session: Session) -> str:
        return os.path.join(self._config.data_dir, "sessions", session.id)

    def _budget(self, session: Session) -> Budget:
        """What comes in has to fit into the session's disk."""
        limits = self._limits_of(session)
        return Budget(self._config.max_workspace_mb << 20, int(limits["diskMb"]) << 20, int(limits["maxFiles"]))


@contextlib.asynccontextmanager
async def _turn(gate: asyncio.Semaphore) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(_WAIT):
            await gate.acquire()
    except TimeoutError as error:
        raise Overloaded("The server is busy with the files of other sessions; try again in a moment", retry_after=_RETRY_AFTER) from error
    try:
        yield
    finally:
        gate.release()
