"""The machine around the sandboxes, measured: disk, memory, clock. Reads files and asks the kernel; makes and changes nothing.

`brief` is the part that a server says at its start.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from typing import NamedTuple

from ash.isolation.disk import find_quota
from ash.isolation.records import Limits

OK, WARN, FAIL, UNKNOWN = "ok", "warn", "fail", "unknown"
LITTLE_DISK_MB = 1024
LITTLE_INODES = 20_000
_NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "9p", "afs", "ceph", "glusterfs", "fuse", "lustre", "beegfs", "virtiofs")
_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")
_TIME_ERROR = 5
_TIMEX_BYTES = 512
"""More than struct timex has on any machine; all zero, it asks and sets nothing."""


class Finding(NamedTuple):
    """What one check found. `id` never changes; `fix` is what to do about a verdict other than ok."""

    id: str
    verdict: str
    found: str
    fix: str = ""


# Disk


def check_disk(folder: str, limits: Limits) -> Iterator[Finding]:
    """The file system of the data folder, or of the nearest folder above it that exists."""
    place = nearest(folder)
    kind = file_system(place)
    yield _check_file_system(place, kind)
    state = os.statvfs(place)
    free_mb = state.f_bavail * state.f_frsize >> 20
    fix = f"free space on the disk of {place}, or choose another with --data-dir"
    yield Finding("disk-space", WARN if free_mb < LITTLE_DISK_MB else OK, f"{free_mb:,} MiB free", fix if free_mb < LITTLE_DISK_MB else "")
    if state.f_files:  # some file systems make inodes as they need them
        is_short = state.f_favail < LITTLE_INODES
        yield Finding("disk-files", WARN if is_short else OK, f"{state.f_favail:,} more files possible", fix if is_short else "")
    if limits.disk_mb or limits.max_files:
        yield Finding("disk-quota", OK, f"{limits.disk_mb:,} MiB and {limits.max_files:,} files a session ({find_quota(place)[1]})")
    else:
        yield Finding("disk-quota", WARN, "sessions may fill the disk: disk_mb and max_files are 0", "give --disk-mb and --max-files")


def _check_file_system(place: str, kind: str) -> Finding:
    if kind.startswith(_NETWORK_FILE_SYSTEMS):
        return Finding(
            "file-system", FAIL, f"{place} is on {kind}, where the database's log does not work", "choose a local disk with --data-dir"
        )
    if kind in _MEMORY_FILE_SYSTEMS:
        return Finding("file-system", WARN, f"{place} is on {kind}: all is lost when the machine stops", "choose a disk with --data-dir")
    return Finding("file-system", OK, f"{place} is on {kind}")


def nearest(folder: str) -> str:
    """The folder itself, or the nearest one above it that exists."""
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def file_system(path: str) -> str:
    """The kind of file system a path is on, by the mount that is nearest above it; of several on one place the last."""
    real, best, kind = os.path.realpath(path), "", "an unknown file system"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            place = before.split()[4].replace("\\040", " ")
            if len(place) >= len(best) and (real == place or real.startswith(place.rstrip("/") + "/")):
                best, kind = place, after.split()[0]
    return kind


def check_memory(limits: Limits, warm: int) -> Iterator[Finding]:
    available = _meminfo("MemAvailable")
    fits = available // limits.memory_mb
    found = f"{available:,} MiB available: room for {fits} sandboxes that all use their {limits.memory_mb:,} MiB"
    fix = "" if fits > warm else "give sandboxes less with --memory-mb, keep fewer warm with --warm-sandboxes, or add memory"
    yield Finding("memory", WARN if fix else OK, found, fix)
    swap = _meminfo("SwapTotal")
    yield Finding("swap", OK, f"{swap:,} MiB of swap, which sandboxes in a cgroup may not use" if swap else "no swap")
    yield Finding("processors", OK, f"{os.cpu_count()} processors")


def _meminfo(name: str) -> int:
    """In MiB."""
    with open("/proc/meminfo", encoding="ascii") as file:
        return next((int(line.split()[1]) >> 10 for line in file if line.startswith(name + ":")), 0)


def check_clock(last_event: float | None = None) -> Finding:
    """The year, whether it runs on, and whether it is behind what a database has written (seconds since 1970)."""
    now, monotonic = time.time(), time.monotonic()
    fix = "set the clock: `timedatectl set-ntp true`, or `chronyc makestep`"
    if not 2025 <= time.gmtime(now).tm_year < 2100:
        return Finding("clock", FAIL, f"the clock says {_moment(now)}", fix)
    if last_event is not None and now < last_event - 60:
        return Finding("clock", WARN, f"the clock says {_moment(now)}, and the database has an event of {_moment(last_event)}", fix)
    time.sleep(0.001)
    if time.monotonic() <= monotonic:
        return Finding("clock", FAIL, "the monotonic clock stands still", "restart the machine")
    state = "" if is_synchronized() else ", not synchronized as far as the kernel knows"
    return Finding("clock", OK, f"{_moment(now)} UTC{state}")


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def is_synchronized() -> bool:
    """Whether something keeps the kernel's clock right: adjtimex says so when nothing does."""
    try:
        return bool(ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES)) != _TIME_ERROR)
    except (OSError, AttributeError):
        return False


# In brief


def brief(folder: str, missing: dict[str, str]) -> list[str]:
    """What a server should say at its start, from what can be had for nothing. `missing` are controllers that limit no sandbox."""
    findings = [_check_file_system(folder, file_system(folder)), check_clock()]
    state = os.statvfs(folder)
    if state.f_bavail * state.f_frsize >> 20 < LITTLE_DISK_MB:
        findings.append(
            Finding("disk-space", WARN, f"only {state.f_bavail * state.f_frsize >> 20} MiB are free on the disk of {folder}", "free some")
        )
    said = [f"{finding.found}; {finding.fix}" for finding in findings if finding.verdict in (WARN, FAIL)]
    names = [name for name in ("memory", "pids", "cpu") if name in missing]
    if names:
        said.append(f"No cgroup limits the {', '.join(names)} of sandboxes ({missing[names[0]]}); `ash doctor` says what to do")
    return said
