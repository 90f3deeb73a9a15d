"""What sandboxes use right now, read from their cgroups, or where there is none added up over their processes.

Reads small files of the kernel and nothing else. Everything here blocks; callers use a thread.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ash.isolation.cgroup import read_counters
from ash.isolation.records import Limits

Json = dict[str, Any]
RESOURCES = ("cpu", "memory", "io")
_BY_CGROUP_ONLY = (
    "memoryPeakBytes", "memoryLimitBytes", "throttledSeconds", "oomKills", "refusedForks", "pressure", "ioReadBytes", "ioWriteBytes",
)  # fmt: skip
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Source(NamedTuple):
    """Where the figures of one sandbox come from. `pid` is the one whose descendants are the others."""

    id: str
    pid: int
    cgroup: str | None
    limits: Limits
    device: str = ""


class Task(NamedTuple):
    """A process, with the time of its children that have ended."""

    parent: int
    ticks: int
    threads: int
    pages: int


def read(source: Source) -> Json:
    """All that is known of one sandbox."""
    basic = read_all([source])[source.id]
    if source.cgroup is not None:
        return {**basic, **_read_details(source.cgroup, source.device)}
    return {**basic, "processesLimit": source.limits.max_processes or None, **dict.fromkeys(_BY_CGROUP_ONLY)}


def read_all(sources: Iterable[Source]) -> dict[str, Json]:
    """Memory, CPU time and processes by sandbox. /proc is gone through once for all that have no cgroup."""
    found, rest = {}, []
    for source in sources:
        if source.cgroup is not None:
            found[source.id] = _read_group(source.cgroup)
        else:
            rest.append(source)
    if rest:
        tasks = _list_tasks()
        children = _by_parent(tasks)
        found |= {source.id: _add_up(source.pid, tasks, children) for source in rest}
    return found


# From a cgroup


def _read_group(path: str) -> Json:
    return {
        "source": "cgroup",
        "memoryBytes": read_number(f"{path}/memory.current"),
        "cpuSeconds": _seconds(read_counters(path, "cpu.stat").get("usage_usec")),
        "processes": read_number(f"{path}/pids.current"),
    }


def _read_details(path: str, device: str) -> Json:
    events = read_counters(path, "memory.events")
    transferred = _read_io(path, device)
    return {
        "memoryPeakBytes": read_number(f"{path}/memory.peak"),
        "memoryLimitBytes": read_number(f"{path}/memory.max"),
        "throttledSeconds": _seconds(read_counters(path, "cpu.stat").get("throttled_usec")),
        "processesLimit": read_number(f"{path}/pids.max"),
        "oomKills": events.get("oom_kill"),
        "refusedForks": read_counters(path, "pids.events").get("max"),
        "pressure": {name: _read_pressure(f"{path}/{name}.pressure") for name in RESOURCES},
        "ioReadBytes": transferred.get("rbytes") if transferred is not None else None,
        "ioWriteBytes": transferred.get("wbytes") if transferred is not None else None,
    }


def read_number(path: str) -> int | None:
    """What a file of one number holds; None for `max`, and for a file that is not there."""
    with contextlib.suppress(OSError, ValueError), open(path, encoding="ascii") as file:
        return int(file.read())
    return None


def _seconds(microseconds: int | None) -> float | None:
    return round(microseconds / 1_000_000, 3) if microseconds is not None else None


def _read_io(path: str, device: str) -> Mapping[str, int] | None:
    """Bytes read and written on the disk of the sandbox's folder; on all when it is not known: stacked ones count a byte more than once."""
    try:
        with open(f"{path}/io.stat", encoding="ascii") as file:
            lines = [line.split() for line in file]
    except OSError:
        return None
    total = {"rbytes": 0, "wbytes": 0}
    for number, *words in (line for line in lines if line):
        if device in ("", number):
            pairs = (word.partition("=") for word in words)
            for name, _, value in pairs:
                if name in total and value.isdigit():
                    total[name] += int(value)
    return total


def _read_pressure(path: str) -> Json | None:
    """Percent of the last ten seconds in which some, or all, of the processes waited; None where the kernel does not measure it."""
    found: Json = {"some10": 0.0, "full10": 0.0}
    try:
        with open(path, encoding="ascii") as file:
            lines = [line.split() for line in file]
    except OSError:  # as well when it was switched off at boot: then it can be opened but not read
        return None
    for kind, average, *_ in (line for line in lines if len(line) > 1):
        found[f"{kind}10"] = float(average.removeprefix("avg10="))
    return found


def read_pressure(folder: str | None) -> dict[str, Json | None]:
    """Pressure on the cgroup `folder`, or without one on the host."""
    return {name: _read_pressure(f"{folder}/{name}.pressure" if folder else f"/proc/pressure/{name}") for name in RESOURCES}


# From the processes


def _add_up(pid: int, tasks: Mapping[int, Task], children: Mapping[int, list[int]]) -> Json:
    """Memory that processes share is counted for each of them."""
    pids = [pid] if pid in tasks else []
    for parent in pids:
        pids += children.get(parent, [])
    own = [tasks[pid] for pid in pids]
    return {
        "source": "proc",
        "memoryBytes": sum(task.pages for task in own) * _PAGE,
        "cpuSeconds": round(sum(task.ticks for task in own) / _TICKS, 3),
        "processes": sum(task.threads for task in own),
    }


def _list_tasks() -> dict[int, Task]:
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, IndexError), open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                fields = file.read().rpartition(")")[2].split()
                found[int(name)] = Task(int(fields[1]), sum(map(int, fields[11:15])), int(fields[17]), int(fields[21]))
    return found


def _by_parent(tasks: Mapping[int, Task]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for pid, task in tasks.items():
        found.setdefault(task.parent, []).append(pid)
    return found
