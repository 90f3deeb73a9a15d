"""The processes of one running sandbox, seen and touched from outside: listed, timed, stopped, ended, and kept from writing files.

Starts none of them and ends none but tools: what ends a whole sandbox is `launch`.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ash.isolation import launch
from ash.isolation.bwrap import OUTER_ENVIRONMENT

_ROUNDS = 5
_CAN_RAISE = 1 << 24  # CAP_SYS_RESOURCE
_TICKS = os.sysconf("SC_CLK_TCK")


class Tree(NamedTuple):
    """The processes of one sandbox: their first, on the host, and whether it is a pid namespace's, with the bridge below it."""

    pid: int
    has_namespace: bool
    start_time: int | None = None
    """When given, the pid is taken for this process only as long as it is the one that began then."""

    def is_there(self) -> bool:
        return self.start_time is None or launch.find_start_time(self.pid) == self.start_time


def list_processes(pid: int) -> Iterator[int]:
    """A process and all below it, parents first. Reads only their own entries in /proc, which is cheap enough to do often.

    A child that comes or goes meanwhile may be missed: what must end everything uses `launch.find_descendants`.
    """
    pending = [pid]
    while pending:
        yield (current := pending.pop())
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{current}/task"):
                with contextlib.suppress(OSError), open(f"/proc/{current}/task/{thread}/children", encoding="ascii") as file:
                    pending += [int(word) for word in file.read().split()]


def count_cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time, with that of children that were waited for."""
    total = 0
    for pid in pids:
        fields = launch.read_stat(pid)
        total += sum(int(word) for word in fields[11:15])
    return total / _TICKS


def set_file_limit(pid: int, size: int) -> None:
    """RLIMIT_FSIZE of a process and of all below it, those included that are made meanwhile. A write beyond it fails with EFBIG.

    With CAP_SYS_RESOURCE the hard limit goes with it, so that nothing inside can lift it. Another server can lower the soft one only.
    """
    can_raise = _can_raise()
    done: set[int] = set()
    for _ in range(_ROUNDS):
        fresh = [found for found in list_processes(pid) if found not in done]
        refused = [found for found in fresh if not _set_one(found, size, can_raise)]
        if refused:
            _set_as_owner(refused, size)
        if not fresh:
            return
        done.update(fresh)


def _set_one(pid: int, size: int, can_raise: bool) -> bool:
    """False when it takes the process's own uid to do this."""
    try:
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        allowed = size if can_raise or hard == resource.RLIM_INFINITY else min(size, hard)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (allowed, allowed if can_raise else hard))
    except PermissionError:
        return False
    except OSError:
        pass  # it has ended
    return True


def _set_as_owner(pids: list[int], size: int) -> None:
    """Root without CAP_SYS_RESOURCE, as in a container, may not; whom the processes belong to may."""
    by_owner: dict[int, list[str]] = {}
    for pid in pids:
        if (uid := _find_uid(pid)) is not None:
            by_owner.setdefault(uid, []).append(str(pid))
    for uid, owned in by_owner.items():
        if uid:
            command = ["/bin/sh", "-c", f'for pid; do prlimit --pid "$pid" --fsize={size}: 2>/dev/null; done', "sh", *owned]
            subprocess.run(command, user=uid, group=uid, extra_groups=[], env=OUTER_ENVIRONMENT, cwd="/", timeout=10, check=False)


def _find_uid(pid: int) -> int | None:
    """From its status: the folder in /proc of a process that is not dumpable belongs to root."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("Uid:")), None)
    return None


def _can_raise() -> bool:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        line = next((line for line in file if line.startswith("CapEff:")), "CapEff: 0")
    return bool(int(line.split()[1], 16) & _CAN_RAISE)


def signal_tools(tree: Tree, number: signal.Signals) -> None:
    """To everything inside but the bridge and the namespace's first process: a running tool is stopped or fails, the session lives."""
    kept = {tree.pid}
    if tree.has_namespace and (children := launch.find_children(tree.pid)):
        # One that has ended has no start time, and must not be taken for the bridge.
        kept.add(min(children, key=lambda pid: (launch.find_start_time(pid) or sys.maxsize, pid)))
    handles = {pid: handle for pid in list_processes(tree.pid) if pid not in kept and (handle := _open_process(pid)) is not None}
    try:
        # Listed again now that none of the handles can come to mean another process.
        for pid in list(list_processes(tree.pid)) if tree.is_there() else ():
            if pid in handles:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handles[pid], number)
    finally:
        for handle in handles.values():
            os.close(handle)


def _open_process(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return os.pidfd_open(pid)
    return None
