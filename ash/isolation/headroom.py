"""What this host has left for one more sandbox: memory, disk, descriptors, processes, and how long programs wait for a CPU.

Reads a few small files of the kernel, at most some times a second; changes nothing and decides nothing about sandboxes.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from typing import NamedTuple

from ash.isolation.delegation import find_mounts, own_path

MAX_AGE = 0.25
"""Seconds that a reading serves: a burst of requests shares one."""
OVERLOADED, CALM = 80.0, 50.0
"""Percent of the last ten seconds in which something waited for a CPU: overload begins above the first and ends below the second."""
RELIEF = 1.25
"""Shortage of memory ends when this many times the floor is free, so that one sandbox more or less does not flip it."""
MIN_DESCRIPTORS = 64
"""A start takes about a dozen; requests and the database want some too."""
MIN_PROCESSES = 128
_PLENTY = 1 << 40


class Reading(NamedTuple):
    """`cpu_pressure` is in percent; the others are what is left."""

    memory_mb: int
    disk_mb: int
    descriptors: int
    processes: int
    cpu_pressure: float


class Headroom:
    """The host's readings, held against floors (0 means none). `is_short` and `is_overloaded` have a margin between begin and end."""

    def __init__(self, data_dir: str, *, min_memory_mb: int = 0, min_disk_mb: int = 0) -> None:
        self._data_dir, self.min_memory_mb, self.min_disk_mb = data_dir, min_memory_mb, min_disk_mb
        self._groups = _bounded_groups()
        self._reading: Reading | None = None
        self._read_at = 0.0
        self._is_short = self._is_overloaded = False

    def read(self) -> Reading:
        moment = time.monotonic()
        if self._reading is None or moment - self._read_at > MAX_AGE:
            self._reading, self._read_at = self.measure(), moment
            self._judge(self._reading)
        return self._reading

    def look_again(self) -> None:
        """Something was given up: the last reading serves no longer."""
        self._reading = None

    def measure(self) -> Reading:
        memory = min(_available_memory(), *(group.memory_left() for group in self._groups), _PLENTY)
        processes = min(_free_processes(), *(group.processes_left() for group in self._groups), _PLENTY)
        return Reading(memory >> 20, _free_disk(self._data_dir) >> 20, _free_descriptors(), processes, _cpu_pressure())

    def _judge(self, reading: Reading) -> None:
        self._is_short = reading.memory_mb < self.min_memory_mb * (RELIEF if self._is_short else 1.0)
        self._is_overloaded = reading.cpu_pressure > (CALM if self._is_overloaded else OVERLOADED)

    @property
    def is_short(self) -> bool:
        """Short of memory."""
        self.read()
        return self._is_short

    @property
    def is_overloaded(self) -> bool:
        self.read()
        return self._is_overloaded

    def find_shortage(self, *, is_new: bool) -> str | None:
        """What forbids one more sandbox: `memory`, `disk`, `descriptors` or `processes`.

        A session that exists already needs its sandbox more than a new one does: it may use half of the memory that is kept free,
        and the disk was its own before.
        """
        reading = self.read()
        if reading.memory_mb < self.min_memory_mb / (1 if is_new else 2):
            return "memory"
        if is_new and reading.disk_mb < self.min_disk_mb:
            return "disk"
        if reading.descriptors < MIN_DESCRIPTORS:
            return "descriptors"
        return "processes" if reading.processes < MIN_PROCESSES else None

    def warnings(self) -> list[str]:
        """For the operator, with figures."""
        reading, found = self.read(), []
        if self._is_short:
            found.append(f"Memory is short: {reading.memory_mb} MiB are available and min_free_memory_mb is {self.min_memory_mb}")
        if reading.disk_mb < self.min_disk_mb:
            found.append(f"The disk is nearly full: {reading.disk_mb} MiB are free and min_free_disk_mb is {self.min_disk_mb}")
        if reading.descriptors < MIN_DESCRIPTORS:
            found.append("The server has nearly used up its file descriptors; raise `ulimit -n` (LimitNOFILE= under systemd)")
        if reading.processes < MIN_PROCESSES:
            found.append("The host has nearly used up its processes; raise kernel.pid_max, or TasksMax= under systemd")
        return found


class _Group(NamedTuple):
    """A cgroup v2 above this server that bounds it, as in a container or a service."""

    path: str

    def memory_left(self) -> int:
        limit = _number(f"{self.path}/memory.max")
        if limit is None:
            return _PLENTY
        cache = _field(f"{self.path}/memory.stat", "inactive_file")
        return limit - (_number(f"{self.path}/memory.current") or 0) + cache

    def processes_left(self) -> int:
        limit = _number(f"{self.path}/pids.max")
        return _PLENTY if limit is None else limit - (_number(f"{self.path}/pids.current") or 0)


def _bounded_groups() -> list[_Group]:
    """This process's cgroup and those above it that set a limit; found once, for where a server runs does not change."""
    mounts = find_mounts(_text("/proc/self/mountinfo"))
    if not mounts:
        return []
    names = own_path(_text("/proc/self/cgroup")).strip("/").split("/")
    paths = [os.path.join(mounts[0][0], *names[:count]) for count in range(len(names), -1, -1)]
    limits = ("memory.max", "pids.max")
    return [_Group(path) for path in dict.fromkeys(paths) if any(_number(f"{path}/{name}") is not None for name in limits)]


def _available_memory() -> int:
    kilobytes = _field("/proc/meminfo", "MemAvailable:")
    return kilobytes * 1024 if kilobytes else _PLENTY


def _free_disk(path: str) -> int:
    with contextlib.suppress(OSError):
        state = os.statvfs(path)
        return state.f_bavail * state.f_frsize
    return _PLENTY


def _free_descriptors() -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError):
        # Since Linux 6.2 the folder's size is their number; before, it is 0 and they have to be counted.
        used = os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))
        return limit - used if limit != resource.RLIM_INFINITY else _PLENTY
    return _PLENTY


def _free_processes() -> int:
    most = min(_number(f"/proc/sys/kernel/{name}") or _PLENTY for name in ("pid_max", "threads-max"))
    running = _text("/proc/loadavg").split()[3:4]
    return most - int(running[0].partition("/")[2]) if running and "/" in running[0] else _PLENTY


def _cpu_pressure() -> float:
    """From the kernel's own measure; where it keeps none, from the processes that wait beyond the CPUs there are."""
    for line in _text("/proc/pressure/cpu").splitlines():
        words = line.split()
        if words[:1] == ["some"] and words[1].startswith("avg10="):
            return float(words[1].removeprefix("avg10="))
    waiting = os.getloadavg()[0] / (os.cpu_count() or 1) - 1
    return max(0.0, min(100.0, waiting * 100))


def _text(path: str) -> str:
    with contextlib.suppress(OSError), open(path, encoding="ascii", errors="replace") as file:
        return file.read()
    return ""


def _number(path: str) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _field(path: str, name: str) -> int:
    for line in _text(path).splitlines():
        words = line.split()
        if words[:1] == [name] and words[1].isdigit():
            return int(words[1])
    return 0
