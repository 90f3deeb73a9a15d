"""Sandboxes: start, pool, limit and stop the isolated process tree of a session, and talk to the bridge in it.

The front door of `ash.isolation`. Knows no sessions table, no SQL, no HTTP and no keys; treats all that comes out of a
sandbox as hostile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from types import TracebackType
from typing import IO, Any, TypeVar

from ash import models
from ash.errors import AshError, CapacityReached, IsolationUnavailable, ProtocolError, SandboxFailed, Timeout
from ash.isolation import cgroup as cgroups
from ash.isolation import folders, launch, leftovers
from ash.isolation.folders import Folders, Uids
from ash.isolation.keyring import leave_session_keyring
from ash.isolation.launch import Process
from ash.isolation.link import Link
from ash.isolation.logbook import Logbook
from ash.isolation.prepare import Descriptors, Isolation, Place, prepare
from ash.isolation.records import ExecResult, Limits, PoolStatus, SandboxSpec
from ash.models import SandboxHandle
from ash.tasks import Tasks

__all__ = ["ExecResult", "Limits", "PoolStatus", "Sandbox", "SandboxSpec", "Sandboxes"]

log = logging.getLogger(__name__)

STOPPED = "the sandbox was stopped"
EXIT_GRACE = 1.0
"""Seconds between a bridge's hanging up and its exit, to learn how it ended."""
DRAIN_TIMEOUT = 5.0
"""Seconds to hand on what a dead bridge had still sent."""
TERMINATE_GRACE = 0.5
GONE_TIMEOUT = 10.0
EXEC_GRACE = 15.0
CONCURRENT_STARTS = 2 * (os.cpu_count() or 1) + 2
RETRY_DELAYS = (1.0, 5.0, 15.0, 60.0)
"""Seconds before the pool tries again to start a warm sandbox after a failure, and the next ones."""
REFILL_DELAY = 0.15
"""Seconds before a pool that is not empty starts another sandbox: the session that took the last one is about to be used."""

T = TypeVar("T")
OnOpen = Callable[[str, str], Awaitable[None]]
OnClose = Callable[[str], Awaitable[None]]
OnGone = Callable[["Sandbox"], Awaitable[None]]


class Sandbox:
    """One running sandbox. `failure` says why it is gone, once it is gone."""

    def __init__(self, id: str, place: Place, process: Process, link: Link, logbook: Logbook, on_gone: OnGone) -> None:
        self.id, self.place = id, place
        self.failure: str | None = None
        self._process, self._link, self._logbook = process, link, logbook
        self._on_gone = on_gone
        self._gone = asyncio.Event()
        self._is_stopping = False

    @property
    def handle(self) -> SandboxHandle:
        """What finds this sandbox again after the server was killed."""
        process, place = self._process, self.place
        return SandboxHandle(self.id, process.pid, process.start_time, place.cgroup, place.run_dir, place.folder, place.uid)

    @property
    def is_alive(self) -> bool:
        """Asks the kernel, which knows before we have been told."""
        return self.failure is None and self._process.is_alive()

    async def ready(self) -> None:
        await self._link.ready()

    async def init(self, agent: dict[str, Any], options: dict[str, Any], transcript: list[Any]) -> None:
        """Give the bridge its agent and the conversation so far. Raises SandboxFailed with the bridge's reason when it refuses."""
        self._require_alive()
        answer = await self._link.ask("init", agent=agent, options=options, transcript=transcript)
        if answer["ev"] == "error":
            raise SandboxFailed(f"the agent could not be initialized: {answer['error']}")

    async def query(self, turn_id: str, content: str | list[Any], options: dict[str, Any]) -> None:
        """Start a turn; what comes of it arrives in `batches`."""
        self._require_alive()
        await self._link.query(turn_id, content=content, options=options)

    def batches(self) -> AsyncIterator[list[dict[str, Any]]]:
        """The events of turns, and logs, in order, those that came together in one list; ends when the sandbox is gone.

        For one consumer: asking for more acknowledges.
        """
        return self._link.batches()

    async def interrupt(self, turn_id: str) -> None:
        self._require_alive()
        await self._link.tell("interrupt", turn_id=turn_id)

    async def exec(
        self, command: str, *, timeout: float = 30, cwd: str | None = None, env: dict[str, str] | None = None, stdin: str | None = None
    ) -> ExecResult:
        """Run a shell command beside a turn that may be running. Raises SandboxFailed, Timeout."""
        self._require_alive()
        given = {"cwd": cwd, "env": env, "stdin": stdin}
        fields = {name: value for name, value in given.items() if value is not None}
        try:
            async with asyncio.timeout(timeout + EXEC_GRACE):
                answer = await self._link.ask("exec", command=command, timeout=timeout, **fields)
        except TimeoutError as error:
            raise Timeout(f"the sandbox did not answer within {timeout + EXEC_GRACE:g} s") from error
        if answer["ev"] == "error":
            raise SandboxFailed(answer["error"])
        return ExecResult(*(answer[name] for name in ExecResult._fields))

    def logs(self, after: int = -1) -> list[dict[str, Any]]:
        return self._logbook.read(after)

    def _require_alive(self) -> None:
        if self.failure is not None:
            raise SandboxFailed(self.failure)

    # The end

    async def live(self) -> None:
        """Run the connection until the sandbox is gone, and clean up behind it. Awaited by one task of the owner."""
        reading, exiting = asyncio.ensure_future(self._link.run()), asyncio.ensure_future(self._process.exited())
        try:
            await asyncio.wait((reading, exiting), return_when=asyncio.FIRST_COMPLETED)
            if not exiting.done() and reading.exception() is None:
                await asyncio.wait((exiting,), timeout=EXIT_GRACE)
            why = self._explain(reading, exiting)
            self._process.kill()
            await asyncio.wait((reading, exiting), timeout=0.0 if self._is_stopping else DRAIN_TIMEOUT)
            self.failure = self.failure or why
            await self._clean_up()
        finally:
            for task in (reading, exiting):
                task.cancel()
            await asyncio.gather(reading, exiting, return_exceptions=True)
            self._link.close(self.failure or STOPPED)
            self._gone.set()

    def _explain(self, reading: asyncio.Future[None], exiting: asyncio.Future[int]) -> str:
        broken = reading.exception() if reading.done() else None
        if isinstance(broken, ProtocolError):
            return f"the agent's process broke the bridge protocol: {broken}"
        if broken is not None:
            log.error("sandbox %s: its connection failed", self.id, exc_info=broken)
            return "the connection to the agent's process failed"
        if self.place.cgroup is not None and cgroups.count_oom_kills(self.place.cgroup):
            return "the sandbox ran out of memory (memory_mb is its limit)"
        if exiting.done() and exiting.exception() is None:
            said = self._logbook.tail().splitlines()[-1:] if exiting.result() else []
            return f"the agent's process {launch.describe_exit(exiting.result())}" + (f": {said[0][:200]}" if said else "")
        return "the agent's process closed its connection"

    async def _clean_up(self) -> None:
        """After the kill: wait for the last process, then take back what was given."""
        try:
            async with asyncio.timeout(GONE_TIMEOUT):
                await self._process.gone()
        except TimeoutError:
            log.error("sandbox %s: process %d does not end", self.id, self._process.pid)
        self._link.close(self.failure or STOPPED)
        self._process.close()
        self._logbook.system(f"sandbox ended: {self.failure}")
        self._logbook.close()
        await self._on_gone(self)

    async def stop(self, grace: float = 5.0) -> None:
        """End every process of the sandbox: by asking, for `grace` seconds, then by force. Idempotent; the session's folder stays."""
        self._is_stopping = True
        self.failure = self.failure or STOPPED
        try:
            if grace > 0 and not self._gone.is_set():
                await self._ask_to_end(grace)
        finally:
            if not self._gone.is_set():
                self._process.kill()
                await asyncio.shield(self._gone.wait())

    async def _ask_to_end(self, grace: float) -> None:
        try:
            async with asyncio.timeout(grace):
                await self._link.tell("shutdown")
                await self._gone.wait()
        except (TimeoutError, SandboxFailed):
            self._process.terminate()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TERMINATE_GRACE):
                    await self._gone.wait()


class Sandboxes:
    """Every sandbox of this server, and a pool of warm ones. An async context manager: leaving it stops them all.

    `on_open(id, socket_path)` is awaited before a bridge starts, `on_close(id)` after its sandbox is gone. A host that cannot
    isolate agents is no reason not to start: `claim` then raises IsolationUnavailable, and `status` says why.
    """

    def __init__(
        self, *, data_dir: str, isolation: str, limits: Limits, warm: int, maximum: int, start_timeout: float, orphan_timeout: float,
        python: str = "", cgroup_root: str = "", bridge_source: str | None = None, on_open: OnOpen, on_close: OnClose,
    ) -> None:  # fmt: skip
        self._kind, self._limits, self._maximum = isolation, limits, maximum
        # Without mounts a bridge holds the path of its folder, which must not change under it: nothing to keep warm.
        self._wanted = min(warm, maximum) if isolation == "bwrap" else 0
        self._start_timeout, self._orphan_timeout = start_timeout, orphan_timeout
        self._python, self._cgroup_root, self._bridge_source = python, cgroup_root, bridge_source
        self._on_open, self._on_close = on_open, on_close
        self._folders, self._uids = Folders(os.path.abspath(data_dir)), Uids(data_dir)
        self._isolation: Isolation | None = None
        self._unavailable = ""
        self._preparing = asyncio.Lock()
        self._starts = asyncio.Semaphore(CONCURRENT_STARTS)
        self._alive: dict[str, Sandbox] = {}
        self._warm: deque[Sandbox] = deque()
        self._starting: set[str] = set()
        self._last_failure = ""
        self._warm_claims = self._cold_starts = 0
        self._refill = asyncio.Event()
        self._tasks = Tasks()
        self._replenisher: asyncio.Task[None] | None = None
        self._is_closing = False

    async def __aenter__(self) -> Sandboxes:
        # Here and not in a thread: sandboxes are started by the loop's own thread, and inherit what that one has.
        if problem := leave_session_keyring():
            log.warning("Sandboxes may read keys in the session keyring of whoever started this server: %s", problem)
        await asyncio.to_thread(self._folders.open)
        try:
            await asyncio.to_thread(self._uids.scan, self._folders.sessions)
            with contextlib.suppress(IsolationUnavailable):
                await self._require_isolation()
        except BaseException:
            self._folders.close()
            raise
        for warning in self.status().warnings:
            log.warning(warning)
        if self._wanted:
            self._replenisher = self._tasks.start(self._replenish(), "replenish warm sandboxes")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._is_closing = True
        if self._replenisher is not None:
            self._replenisher.cancel()
            await asyncio.gather(self._replenisher, return_exceptions=True)
        await asyncio.gather(*(sandbox.stop(grace=2.0) for sandbox in list(self._alive.values())), return_exceptions=True)
        await self._tasks.wait(timeout=GONE_TIMEOUT)
        await self._tasks.cancel()
        if self._isolation is not None:
            self._isolation.close()
        self._folders.close()

    async def _require_isolation(self) -> Isolation:
        """How sandboxes are started. A host that could not is asked again: what was missing may have been installed."""
        async with self._preparing:
            if self._isolation is None:
                try:
                    self._isolation = await prepare(
                        self._kind, self._folders, self._limits, self._python, self._cgroup_root, self._bridge_source
                    )
                except IsolationUnavailable as error:
                    self._unavailable = str(error)
                    raise
                self._refill.set()
            return self._isolation

    def status(self) -> PoolStatus:
        isolation, warm = self._isolation, len(self._warm)
        starting, running = len(self._starting), len(self._alive.keys() - self._starting) - warm
        kind = isolation.kind if isolation is not None else "unavailable"
        limits = isolation.describe_limits() if isolation is not None else {}
        warnings = isolation.warnings() if isolation is not None else [self._unavailable]
        if self._last_failure:
            warnings.append(f"The last start of a warm sandbox failed: {self._last_failure}")
        return PoolStatus(
            warm + starting + running, warm, starting, running, self._maximum, kind, limits, warnings, self._warm_claims, self._cold_starts
        )  # fmt: skip

    # Claiming

    async def claim(self, spec: SandboxSpec) -> Sandbox:
        """A sandbox on the session's folder, ready for `init`. Raises CapacityReached, IsolationUnavailable, SandboxFailed."""
        if self._is_closing:
            raise SandboxFailed("the server is shutting down")
        await self._require_isolation()
        try:
            return await self._claim(spec)
        except OSError as error:
            log.exception("a sandbox could not be started")
            raise SandboxFailed(f"a sandbox could not be started: {error.strerror or error}") from error

    async def _claim(self, spec: SandboxSpec) -> Sandbox:
        while spec.fresh and self._warm:
            sandbox = self._warm.popleft()
            self._refill.set()
            if await self._settle(sandbox, spec):
                self._warm_claims += 1
                return sandbox
        sandbox = await self._start_cold(spec)
        self._cold_starts += 1
        return sandbox

    async def _settle(self, sandbox: Sandbox, spec: SandboxSpec) -> bool:
        """Make a warm sandbox that of a session. False when it has died meanwhile."""
        if not sandbox.is_alive:
            return False
        try:
            # One rename, so it may block; from here on the sandbox's end leaves the folder to us.
            self._folders.claim_slot(sandbox.place.folder, spec.session_dir)
            sandbox.place = sandbox.place._replace(folder=spec.session_dir)
            await _in_thread(folders.fill, spec.session_dir, spec.agent_dir, sandbox.place.uid, fresh=True, link=True)
        except BaseException:  # whatever went wrong, neither a half-filled sandbox nor its folder must live on
            await asyncio.shield(self._discard(sandbox, spec))
            raise
        if not sandbox.is_alive:
            await asyncio.shield(self._discard(sandbox, spec))
            return False
        return True

    async def _discard(self, sandbox: Sandbox, spec: SandboxSpec) -> None:
        """End a warm sandbox that did not become a session's. A slot that was not moved goes with it."""
        await sandbox.stop(grace=0)
        if sandbox.place.folder == spec.session_dir:
            await asyncio.to_thread(self._remove_folder, spec.session_dir, sandbox.place.uid)

    async def _start_cold(self, spec: SandboxSpec) -> Sandbox:
        id = models.new_id()
        self._reserve()
        self._starting.add(id)
        try:
            uid = await _in_thread(self._make_folder, id, spec)
            return await self._start(id, spec.session_dir, uid)
        except BaseException:  # a fresh session that does not come to be leaves no folder, whatever went wrong
            if spec.fresh:
                await asyncio.shield(asyncio.to_thread(folders.remove_tree, spec.session_dir))
            self._uids.let_go(id)
            raise
        finally:
            self._starting.discard(id)
            self._refill.set()

    def _make_folder(self, id: str, spec: SandboxSpec) -> int | None:
        """The session's folder, ready to be mounted, and the uid it belongs to."""
        uid = None
        if self._uses_uids:
            uid = self._uids.take(id, None if spec.fresh else folders.find_owner(spec.session_dir))
        try:
            self._folders.make_session_dir(spec.session_dir, uid)
            if uid is not None and folders.find_owner(spec.session_dir) != uid:
                folders.adopt(spec.session_dir, uid)
        except OSError as error:
            raise SandboxFailed(f"the session's folder cannot be used: {error.strerror}") from error
        folders.fill(spec.session_dir, spec.agent_dir, uid, fresh=spec.fresh, link=self._kind == "bwrap")
        return uid

    @property
    def _uses_uids(self) -> bool:
        return self._isolation is not None and self._isolation.is_root

    def _reserve(self) -> None:
        """Room for one more: a warm sandbox gives way to a session. Raises CapacityReached."""
        if len(self._alive.keys() | self._starting) < self._maximum:
            return
        if not self._warm:
            raise CapacityReached(
                f"Sandbox capacity reached: all {self._maximum} are in use. End or pause a session, or raise max_sandboxes"
            )
        victim = self._warm.popleft()
        self._alive.pop(victim.id, None)
        _ = self._tasks.start(victim.stop(grace=0), f"evict warm sandbox {victim.id}")

    # Warm sandboxes

    async def _replenish(self) -> None:
        """Keep the pool full. A start that fails is tried again, later and later."""
        failures = 0
        while True:
            self._refill.clear()
            if self._isolation is None or len(self._warm) >= self._wanted or len(self._alive.keys() | self._starting) >= self._maximum:
                await self._refill.wait()
                if self._warm:  # whoever took the last one is still busy with it; another waits, so there is time
                    await asyncio.sleep(REFILL_DELAY)
                continue
            try:
                self._warm.append(await self._start_warm())
                failures, self._last_failure = 0, ""
            except Exception as error:  # the edge of the loop: whatever it is, the pool must not end without a word
                self._last_failure = str(error) or type(error).__name__
                is_foreseen = isinstance(error, AshError | OSError)
                log.warning("a warm sandbox did not start: %s", self._last_failure, exc_info=None if is_foreseen else error)
                await asyncio.sleep(RETRY_DELAYS[min(failures, len(RETRY_DELAYS) - 1)])
                failures += 1

    async def _start_warm(self) -> Sandbox:
        id = models.new_id()
        slot = os.path.join(self._folders.slots, id)
        uid = self._uids.take(id) if self._uses_uids else None
        self._starting.add(id)
        try:
            await _in_thread(self._folders.make_session_dir, slot, uid)
            return await self._start(id, slot, uid)
        except BaseException:  # whatever went wrong, the slot goes
            await asyncio.shield(asyncio.to_thread(self._remove_folder, slot, uid))
            self._uids.let_go(id)
            raise
        finally:
            self._starting.discard(id)

    def _remove_folder(self, folder: str, uid: int | None) -> None:
        """The uid is free for others only once nothing belongs to it any more."""
        folders.remove_tree(folder)
        if uid is not None and not os.path.lexists(folder):
            self._uids.release(uid)

    # Starting one

    async def _start(self, id: str, folder: str, uid: int | None) -> Sandbox:
        """Start a sandbox on a folder that is ready. Raises SandboxFailed with what it said."""
        isolation = await self._require_isolation()
        async with self._starts:
            place = await self._open_place(isolation, id, folder, uid)
            logbook = Logbook(os.path.join(folder, folders.LOG_FILE))
            sandbox = None
            try:
                async with asyncio.timeout(self._start_timeout):
                    sandbox = await self._launch(isolation, id, place, logbook)
                    await sandbox.ready()
            except BaseException as error:  # whatever went wrong, nothing of a failed start stays
                tail = logbook.tail()
                await asyncio.shield(sandbox.stop(grace=0) if sandbox is not None else self._close_place(id, place, logbook))
                if isinstance(error, TimeoutError | SandboxFailed):
                    raise _start_error(error, tail, self._start_timeout) from error
                raise
        logbook.system("sandbox started")
        return sandbox

    async def _open_place(self, isolation: Isolation, id: str, folder: str, uid: int | None) -> Place:
        socket_path = self._folders.socket_path(id, "gw", "gateway.sock")
        place = Place(uid, None, folder, self._folders.run_dir(id), socket_path)
        try:
            self._folders.make_run_dir(id, uid)
            await self._on_open(id, socket_path)
            if isolation.cgroups is not None:
                place = place._replace(cgroup=isolation.cgroups.create(id, self._limits))
        except BaseException:  # whatever went wrong, nothing of a failed start stays
            await asyncio.shield(self._close_place(id, place, None))
            raise
        return place

    async def _launch(self, isolation: Isolation, id: str, place: Place, logbook: Logbook) -> Sandbox:
        bridge_path = self._folders.socket_path(id, "bridge.sock")
        popen, info_fd = self._spawn(isolation, place, bridge_path, logbook)
        try:
            pid = popen.pid if info_fd is None else await launch.find_init(info_fd)
            process = Process(popen, pid, place.cgroup, has_namespace=info_fd is not None)
            link = await Link.open(bridge_path, logbook.report)
        except BaseException as error:  # whatever went wrong, the processes go
            launch.abandon(popen)
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                raise SandboxFailed("the agent's process ended at once") from error
            raise
        sandbox = Sandbox(id, place, process, link, logbook, self._on_gone)
        self._alive[id] = sandbox
        _ = self._tasks.start(sandbox.live(), f"sandbox {id}")
        leftovers.write_handle(sandbox.handle)
        return sandbox

    def _spawn(self, isolation: Isolation, place: Place, bridge_path: str, logbook: Logbook) -> tuple[subprocess.Popen[bytes], int | None]:
        """The process, and the pipe on which bubblewrap says which one is the sandbox's first."""
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(_listen(bridge_path))
            fds, reader = Descriptors(listener.fileno()), None
            if isolation.kind == "bwrap":
                reader, info = os.pipe()
                stack.callback(os.close, info)
                options = stack.enter_context(_memory_file(isolation.options(place)))
                fds = fds._replace(info=info, options=options.fileno())
            passed = {fd for fd in fds if fd >= 0}
            if place.gateway_socket.startswith("/proc/self/fd/") and isolation.kind == "none":
                passed.add(self._folders.run_fd)
            try:
                argv = isolation.command(place, fds, self._orphan_timeout)
                return launch.spawn(argv, isolation.environment(place), passed, logbook.output), reader
            except BaseException:
                if reader is not None:
                    os.close(reader)
                raise

    # Ending one

    async def _on_gone(self, sandbox: Sandbox) -> None:
        """Take back what a sandbox had. An unclaimed slot goes with it; a session's folder stays."""
        self._alive.pop(sandbox.id, None)
        with contextlib.suppress(ValueError):
            self._warm.remove(sandbox)
        await self._close_place(sandbox.id, sandbox.place, None)
        if os.path.dirname(sandbox.place.folder) == self._folders.slots:
            await asyncio.to_thread(self._remove_folder, sandbox.place.folder, sandbox.place.uid)
        self._uids.let_go(sandbox.id)
        self._refill.set()

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

    # What others left

    async def copy_folder(self, source: str, target: str) -> None:
        """A second session's folder with a copy of the first one's files, for a fork. Follows no link."""
        id = models.new_id()
        uid = self._uids.take(id) if self._kind == "bwrap" and os.geteuid() == 0 else None
        try:
            await _in_thread(folders.copy_session, source, target, uid)
        finally:
            self._uids.let_go(id)

    async def reap(self, handles: Iterable[SandboxHandle]) -> int:
        """End the sandboxes that a dead server left, and remove their run folders, slots and cgroups. Returns how many were alive.

        A sandbox is ended only if pid and start time are still those of its handle, and never while the server that
        started it lives.
        """
        tree = self._isolation.cgroups if self._isolation is not None else None
        shared = self._isolation.shared_files() if self._isolation is not None else set()
        return await leftovers.reap(handles, self._folders, tree, shared, self._own_ids)

    def _own_ids(self) -> set[str]:
        """An id counts as ours before its first folder is made."""
        return set(self._alive) | set(self._starting)


async def _in_thread(function: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """Like asyncio.to_thread, but who is cancelled waits for the thread: what is then removed must not be made again behind it."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *arguments, **named))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait((work,))
        if not work.cancelled():
            work.exception()  # nobody else will ask for it
        raise


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


def _memory_file(content: bytes) -> IO[bytes]:
    file = os.fdopen(os.memfd_create("options"), "w+b", 0)
    file.write(content)
    file.seek(0)
    return file


def _start_error(error: TimeoutError | SandboxFailed, tail: str, timeout: float) -> SandboxFailed:
    """Why a sandbox did not start, with the last that it printed."""
    why = str(error) if isinstance(error, SandboxFailed) else f"the sandbox was not ready within {timeout:g} s"
    return SandboxFailed(why if not tail or tail.splitlines()[-1] in why else f"{why}: {tail}")
