"""Starting one sandbox on a folder that is ready, and taking back what it had when it is gone.

Of a start that fails, for whatever reason and at whatever moment, nothing stays. Knows no sessions and no pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
from collections.abc import Awaitable, Callable
from typing import IO, Any, NamedTuple, TypeVar

from ash.errors import SandboxFailed
from ash.isolation import cgroup as cgroups
from ash.isolation import folders, launch, leftovers
from ash.isolation.disk import bind_folder
from ash.isolation.folders import Folders, Uids
from ash.isolation.launch import Process
from ash.isolation.link import Link
from ash.isolation.logbook import Logbook
from ash.isolation.prepare import Descriptors, Isolation, Place
from ash.isolation.records import Limits
from ash.isolation.running import Sandbox
from ash.models import SandboxHandle
from ash.tasks import Tasks

log = logging.getLogger(__name__)

T = TypeVar("T")
OnOpen = Callable[[str, str], Awaitable[None]]
OnClose = Callable[[str], Awaitable[None]]


class Ground(NamedTuple):
    """What a sandbox is started on: its folder, whose it is, and what it may use."""

    id: str
    folder: str
    uid: int | None
    limits: Limits


class Starter:
    """Starts sandboxes and knows those that are alive. `on_gone(sandbox)` is told of each that has ended.

    `alive` holds every sandbox with a process, `starting` the ids of those that are not ready yet, which counts from before the
    first folder is made.
    """

    def __init__(
        self, places: Folders, uids: Uids, tasks: Tasks, *, start_timeout: float, orphan_timeout: float,
        on_open: OnOpen, on_close: OnClose, on_gone: Callable[[Sandbox], None],
    ) -> None:  # fmt: skip
        self._folders, self._uids, self._tasks = places, uids, tasks
        self._start_timeout, self._orphan_timeout = start_timeout, orphan_timeout
        self._on_open, self._on_close, self._on_gone = on_open, on_close, on_gone
        self.alive: dict[str, Sandbox] = {}
        self.starting: set[str] = set()

    def own_ids(self) -> set[str]:
        """An id counts as ours before its first folder is made."""
        return self.alive.keys() | self.starting

    async def start(self, isolation: Isolation, ground: Ground) -> Sandbox:
        """A sandbox whose bridge is ready. Raises SandboxFailed with what it said. The uid is then no longer held by this id."""
        try:
            return await self._start(isolation, ground)
        except BaseException:  # whatever went wrong, nothing of a failed start stays
            self._uids.let_go(ground.id)
            raise

    async def _start(self, isolation: Isolation, ground: Ground) -> Sandbox:
        place = await self._open_place(isolation, ground)
        logbook = sandbox = None
        try:
            logbook = Logbook(os.path.join(ground.folder, folders.LOG_FILE))
            async with asyncio.timeout(self._start_timeout):
                sandbox = await self._launch(isolation, ground.id, place, logbook)
                await sandbox.ready()
        except BaseException as error:  # whatever went wrong, nothing of a failed start stays
            tail = logbook.tail() if logbook is not None else ""
            await asyncio.shield(sandbox.stop(grace=0) if sandbox is not None else self._close_place(ground.id, place, logbook))
            if isinstance(error, TimeoutError | SandboxFailed):
                raise _start_error(error, tail, self._start_timeout) from error
            raise
        logbook.system("sandbox started")
        return sandbox

    async def _open_place(self, isolation: Isolation, ground: Ground) -> Place:
        id = ground.id
        socket_path = self._folders.socket_path(id, "gw", "gateway.sock")
        run_dir = self._folders.run_dir(id)
        place = Place(ground.uid, None, ground.folder, run_dir, socket_path, ground.limits, min_free_mb=isolation.min_free_disk_mb)
        try:
            if isolation.quota is not None and await in_thread(bind_folder, isolation.quota, ground.folder, ground.uid, ground.limits):
                place = place._replace(quota=isolation.quota)
            self._folders.make_run_dir(id, ground.uid)
            await self._on_open(id, socket_path)
            if isolation.cgroups is not None:
                place = place._replace(cgroup=isolation.cgroups.create(id, ground.limits), device=isolation.cgroups.device)
        except BaseException:  # whatever went wrong, nothing of a failed start stays
            await asyncio.shield(self._close_place(id, place, None))
            raise
        return place

    async def _launch(self, isolation: Isolation, id: str, place: Place, logbook: Logbook) -> Sandbox:
        bridge_path = self._folders.socket_path(id, leftovers.BRIDGE_SOCKET)
        popen, info = self._spawn(isolation, place, bridge_path, logbook)
        process = None
        try:
            # Twice: should the server die before it knows the namespace's first process, the next one finds that process' parent.
            leftovers.write_handle(_handle(id, place, popen.pid, launch.find_start_time(popen.pid) or 0))
            pid = popen.pid if info is None else await launch.find_init(info)
            process = Process(popen, pid, place.cgroup, has_namespace=info is not None)
            leftovers.write_handle(_handle(id, place, pid, process.start_time))
            link = await Link.open(bridge_path, logbook.report)
        except BaseException as error:  # whatever went wrong, the processes go
            await asyncio.shield(self._abandon(id, popen, place))
            for held in (process, info):
                if held is not None:
                    held.close()
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                raise SandboxFailed("the agent's process ended at once") from error
            raise
        sandbox = self.alive[id] = Sandbox(id, place, process, link, logbook, self._gone)
        _ = self._tasks.start(sandbox.live(), f"sandbox {id}")
        return sandbox

    @staticmethod
    async def _abandon(id: str, popen: subprocess.Popen[bytes], place: Place) -> None:
        await asyncio.to_thread(launch.abandon, popen, place.cgroup)
        await leftovers.end_holders({id})

    def _spawn(
        self, isolation: Isolation, place: Place, bridge_path: str, logbook: Logbook
    ) -> tuple[subprocess.Popen[bytes], IO[bytes] | None]:  # fmt: skip
        """The process, and the pipe on which bubblewrap says which one is the sandbox's first."""
        with contextlib.ExitStack() as on_failure, contextlib.ExitStack() as stack:
            listener = stack.enter_context(_listen(bridge_path))
            fds, reader = Descriptors(listener.fileno()), None
            if isolation.kind == "bwrap":
                reader_fd, info = os.pipe()
                stack.callback(os.close, info)
                reader = on_failure.enter_context(os.fdopen(reader_fd, "rb", 0))
                options, rules = (stack.enter_context(launch.memory_file(data)) for data in (isolation.options(place), isolation.filter))
                fds = fds._replace(info=info, options=options.fileno(), filter=rules.fileno())
            passed = {fd for fd in fds if fd >= 0}
            if place.gateway_socket.startswith("/proc/self/fd/") and isolation.kind == "none":
                passed.add(self._folders.run_fd)
            argv = isolation.command(place, fds, self._orphan_timeout)
            popen = launch.spawn(argv, isolation.environment(place), passed, logbook.output)
            _ = on_failure.pop_all()
            return popen, reader

    # Ending one

    async def _gone(self, sandbox: Sandbox) -> None:
        """Take back what a sandbox had. An unclaimed slot goes with it; a session's folder stays."""
        self.alive.pop(sandbox.id, None)
        self._on_gone(sandbox)
        await self._close_place(sandbox.id, sandbox.place, None)
        if os.path.dirname(sandbox.place.folder) == self._folders.slots:
            await asyncio.to_thread(self.remove_folder, sandbox.place.folder, sandbox.place.uid)
        self._uids.let_go(sandbox.id)

    def remove_folder(self, folder: str, uid: int | None) -> None:
        """The uid is free for others only once nothing belongs to it any more. Blocks."""
        folders.remove_tree(folder)
        if uid is not None and not os.path.lexists(folder):
            self._uids.release(uid)

    async def _close_place(self, id: str, place: Place, logbook: Logbook | None) -> None:
        if logbook is not None:
            logbook.close()
        try:
            await self._on_close(id)
        except Exception:  # the edge to another part: its failure must not keep what is ours
            log.exception("sandbox %s: closing its gateway failed", id)
        await asyncio.to_thread(folders.remove_tree, place.run_dir)
        if place.cgroup is not None and not await asyncio.to_thread(cgroups.remove, place.cgroup):
            log.warning("sandbox %s: its cgroup could not be removed", id)


async def in_thread(function: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """Like asyncio.to_thread, but who is cancelled waits for the thread: what is then removed must not be made again behind it."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *arguments, **named))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait((work,))
        if not work.cancelled():
            work.exception()  # nobody else will ask for it
        raise


def _handle(id: str, place: Place, pid: int, start_time: int) -> SandboxHandle:
    return SandboxHandle(id, pid, start_time, place.cgroup, place.run_dir, place.folder, place.uid)


def _listen(path: str) -> socket.socket:
    """The server binds the bridge's socket, so that nothing inside can put another in its place."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(4)
    except BaseException:
        listener.close()
        raise
    return listener


def _start_error(error: TimeoutError | SandboxFailed, tail: str, timeout: float) -> SandboxFailed:
    """Why a sandbox did not start, with the last that it printed."""
    why = str(error) if isinstance(error, SandboxFailed) else f"the sandbox was not ready within {timeout:g} s"
    return SandboxFailed(why if not tail or tail.splitlines()[-1] in why else f"{why}: {tail}")
