"""Starting the process tree of one sandbox and ending all of it. Knows processes, signals and pids; nothing of the bridge protocol.

Under bubblewrap two processes count: the monitor that we started, which ends with the bridge and has its exit status, and
the first process of the sandbox's pid namespace, whose death ends every process inside, however deep it hid.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
from collections.abc import Iterable, Sequence
from typing import IO, Any

from ash.errors import SandboxFailed
from ash.isolation import cgroup as cgroups

GONE_TIMEOUT = 10.0
"""Seconds that a killed process gets to be gone; one that hangs in the kernel takes longer."""


class Process:
    """A started sandbox's processes. `pid` and `start_time` name the one whose death ends the others."""

    def __init__(self, popen: subprocess.Popen[bytes], pid: int, cgroup: str | None, *, has_namespace: bool) -> None:
        self.pid, self.cgroup = pid, cgroup
        self._popen, self.has_namespace = popen, has_namespace
        self._pidfd = os.pidfd_open(pid)
        self.start_time = find_start_time(pid) or 0
        self._monitor = popen.pid

    async def exited(self) -> int:
        """The bridge's exit status: what it returned, or minus the signal that ended it."""
        await _wait_pid(self._monitor)
        code = self._popen.wait()
        return 128 - code if code > 128 else code

    def is_alive(self) -> bool:
        if self._pidfd < 0:
            return False
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        return not poller.poll(0)

    def terminate(self) -> None:
        """Ask the bridge to end. The namespace's first process would ignore it, so it goes to that one's children."""
        for pid in find_children(self.pid) if self.has_namespace else [self.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def kill(self) -> None:
        """End every process of the sandbox at once. Harmless after `close`."""
        if self._pidfd < 0:
            return
        if self.cgroup is not None:
            cgroups.kill(self.cgroup)
        if not self.has_namespace and find_start_time(self.pid) in (None, self.start_time):
            kill_group(self.pid)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def gone(self) -> None:
        """Until the process tree has ended. The kernel lets a pid namespace's first process go last."""
        await _readable(self._pidfd)
        await self.exited()

    def close(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def spawn(argv: Sequence[str], environment: dict[str, str], fds: Iterable[int], output: int) -> subprocess.Popen[bytes]:
    """Start a process in its own session, with nothing inherited but what is given. Takes about a millisecond, so it may block."""
    return subprocess.Popen(
        argv, env=environment, pass_fds=tuple(fds), cwd="/", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
    )  # fmt: skip


async def find_init(pipe: IO[bytes]) -> int:
    """The pid that bubblewrap reports on its info pipe; closes the pipe. Raises SandboxFailed when it ends without."""
    try:
        info = await _read_pipe(pipe)
        return int(json.loads(info)["child-pid"])
    except (ValueError, KeyError, TypeError) as error:
        raise SandboxFailed("the sandbox could not be set up") from error


def abandon(popen: subprocess.Popen[bytes], cgroup: str | None = None) -> None:
    """End a start that went wrong before it was known which process is which, and wait for the one we started. Blocks.

    A child that was made in this very moment is not seen: `leftovers.end_holders` finds it.
    """
    if cgroup is not None:
        cgroups.kill(cgroup)
    for pid in reversed([popen.pid, *find_descendants(popen.pid)]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        popen.wait(timeout=GONE_TIMEOUT)


async def _read_pipe(pipe: IO[bytes]) -> bytes:
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    try:
        return await reader.read()
    finally:
        transport.close()


async def _wait_pid(pid: int) -> None:
    """Until a child of ours has ended; it stays to be waited for."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        await _readable(fd)
    finally:
        os.close(fd)


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    # A descriptor can be watched once per loop, so each waiter watches one of its own.
    own = os.dup(fd)
    loop.add_reader(own, _settle, ready)
    try:
        await ready
    finally:
        loop.remove_reader(own)
        os.close(own)


def _settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def describe_exit(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
        return f"was killed by signal {-code}"
    return f"ended with exit code {code}"


def find_start_time(pid: int) -> int | None:
    """Field 22 of /proc/<pid>/stat, which tells a process from a later one with its pid."""
    fields = read_stat(pid)
    return int(fields[19]) if fields and fields[0] not in ("Z", "X") else None


def read_stat(pid: int) -> list[str]:
    """The fields behind the command's name, which itself may hold anything."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()
    return []


def find_children(pid: int) -> list[int]:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(word) for word in file.read().split()]
    return []


def find_descendants(pid: int) -> list[int]:
    """Every process below `pid`, parents first."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        fields = read_stat(int(name)) if name.isdigit() else []
        if fields:
            parents.setdefault(int(fields[1]), []).append(int(name))
    found = list(parents.get(pid, []))
    for child in found:
        found += parents.get(child, [])
    return found


def kill_group(pid: int) -> None:
    """End a process, its group and all that descend from it; for sandboxes without a pid namespace."""
    family = find_descendants(pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    for child in family:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(child, signal.SIGKILL)


async def end_leftover(pid: int, start_time: int, cgroup: str | None, timeout: float = 5.0) -> bool:
    """End what a dead server left, if that very process still lives. True when there was something to end."""
    try:
        fd = os.pidfd_open(pid)
    except (OSError, OverflowError):
        return False
    try:
        if find_start_time(pid) != start_time:
            return False
        if cgroup is not None:
            cgroups.kill(cgroup)
        if _is_group_leader(pid):
            kill_group(pid)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        async with asyncio.timeout(timeout):
            await _readable(fd)
    except TimeoutError:
        return False
    finally:
        os.close(fd)
    return True


def _is_group_leader(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        return os.getpgid(pid) == pid
    return False


def memory_file(content: bytes) -> IO[bytes]:
    """A file without a name, to hand to a program by its descriptor. Each start needs one of its own: readers share the position."""
    file = os.fdopen(os.memfd_create("ash"), "w+b", 0)
    file.write(content)
    file.seek(0)
    return file


async def run(argv: Sequence[str], environment: dict[str, str], timeout: float, fds: Iterable[int] = ()) -> tuple[int, str, str]:
    """Run a short probe to its end: status, output, errors. Raises SandboxFailed when it takes too long."""
    process: Any = await asyncio.create_subprocess_exec(
        *argv, env=environment, cwd="/", pass_fds=tuple(fds),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(timeout):
            output, errors = await process.communicate()
    except TimeoutError as error:
        raise SandboxFailed(f"{os.path.basename(argv[0])} did not end within {timeout:g} s") from error
    finally:
        if process.returncode is None:
            for pid in (process.pid, *find_descendants(process.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await process.wait()
    return process.returncode, output.decode(errors="replace"), errors.decode(errors="replace")
