"""The cgroup v2 writer: finds a tree this server may use, and makes, limits, kills and removes one cgroup per sandbox.

Reads and writes files only, below a root that is a parameter; never touches a cgroup it did not make. Cgroup v1 is not used.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Iterator

from ash.isolation.records import Limits

CONTROLLERS = ("memory", "pids", "cpu")
PREFIX = "ash-sandbox-"
SERVER_LEAF = "ash-server"
_PERIOD_US = 100_000


class CgroupsUnavailable(Exception):
    """No usable cgroup v2 tree; the text says why."""


def find_mount(mountinfo: str) -> str | None:
    """Where cgroup v2 is mounted, from the text of /proc/self/mountinfo; the first writable mount wins."""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) >= 6 and kind[:1] == ["cgroup2"] and "rw" in fields[5].split(","):
            return _unescape(fields[4])
    return None


def own_path(cgroup: str) -> str:
    """This process's cgroup v2 path, from the text of /proc/self/cgroup."""
    return next((line[3:] for line in cgroup.splitlines() if line.startswith("0::")), "/")


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def open_tree(root: str = "") -> CgroupTree:
    """The tree to use: `root` when given, else this process's own cgroup. Raises CgroupsUnavailable."""
    if root:
        return _enable(root, is_own=False)
    mount = find_mount(_read("/proc/self/mountinfo"))
    if mount is None:
        raise CgroupsUnavailable("no writable cgroup v2 tree is mounted")
    return _enable(os.path.join(mount, own_path(_read("/proc/self/cgroup")).lstrip("/")), is_own=True)


def _enable(root: str, *, is_own: bool) -> CgroupTree:
    """Hand the controllers down to the children of `root`; a cgroup with children may hold no process, so the server moves to a leaf."""
    try:
        offered = set(_read(os.path.join(root, "cgroup.controllers")).split())
    except OSError as error:
        raise CgroupsUnavailable(f"{root} is not a cgroup v2 folder: {error.strerror}") from error
    usable = [name for name in CONTROLLERS if name in offered]
    if not usable:
        raise CgroupsUnavailable(f"cgroup v2 has none of the controllers {', '.join(CONTROLLERS)} here")
    try:
        if is_own:
            _move_server(root)
        _write(os.path.join(root, "cgroup.subtree_control"), " ".join(f"+{name}" for name in usable))
    except OSError as error:
        raise CgroupsUnavailable(f"cgroup v2 at {root} cannot be used: {error.strerror}") from error
    return CgroupTree(root, tuple(usable))


def _move_server(root: str) -> None:
    leaf = os.path.join(root, SERVER_LEAF)
    os.makedirs(leaf, exist_ok=True)
    _write(os.path.join(leaf, "cgroup.procs"), str(os.getpid()))


class CgroupTree:
    """One folder of cgroup v2 whose children are sandboxes."""

    def __init__(self, root: str, controllers: tuple[str, ...]) -> None:
        self.root, self.controllers = root, controllers

    def create(self, id: str, limits: Limits) -> str:
        """A new cgroup with its limits set, empty."""
        path = os.path.join(self.root, PREFIX + id)
        os.mkdir(path)
        for name, value in limit_files(limits, self.controllers):
            self._set(os.path.join(path, name), value)
        return path

    def _set(self, path: str, value: str) -> None:
        try:
            _write(path, value)
        except OSError:
            # Swap accounting and oom.group do not exist on every kernel; the limits proper always do.
            if os.path.basename(path) not in ("memory.swap.max", "memory.oom.group"):
                raise

    def owns(self, path: str) -> bool:
        return os.path.dirname(path) == self.root and os.path.basename(path).startswith(PREFIX)

    def leftovers(self) -> Iterator[str]:
        """Paths of every sandbox cgroup in the tree, whoever made it."""
        with contextlib.suppress(OSError), os.scandir(self.root) as entries:
            yield from sorted(entry.path for entry in entries if entry.name.startswith(PREFIX) and entry.is_dir())


def limit_files(limits: Limits, controllers: tuple[str, ...]) -> list[tuple[str, str]]:
    """The files of a sandbox's cgroup and what goes into them."""
    files = {
        "memory": [("memory.max", str(limits.memory_mb * 1024 * 1024)), ("memory.swap.max", "0"), ("memory.oom.group", "1")],
        "pids": [("pids.max", str(limits.max_processes))],
        "cpu": [("cpu.max", f"{limits.cpu_percent * _PERIOD_US // 100} {_PERIOD_US}")],
    }
    return [pair for name in controllers for pair in files[name]]


def kill(path: str) -> None:
    """End every process of the cgroup at once. Kernels before 5.14 have no cgroup.kill; the caller's own kill must do there."""
    with contextlib.suppress(OSError):
        _write(os.path.join(path, "cgroup.kill"), "1")


def count_oom_kills(path: str) -> int:
    with contextlib.suppress(OSError):
        for line in _read(os.path.join(path, "memory.events")).splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill" and value.isdigit():
                return int(value)
    return 0


def remove(path: str, timeout: float = 1.0) -> bool:
    """Remove an ended sandbox's cgroup. Its last process may still be on the way out, so a busy folder is tried again. Blocks."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            os.rmdir(path)
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOTEMPTY) or time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        else:
            return True


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def _write(path: str, text: str) -> None:
    """One write(2): the kernel refuses or obeys as a whole."""
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
