"""What sandboxes have on this host, found by looking and not by asking them: for tests that want to see nothing of it left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ash.isolation import launch
from ash.isolation.leftovers import OWNED
from tests.sandboxes import Pool


def processes_of(data_dir: str) -> list[int]:
    """Whatever has this data folder open or mounted, and our own children that nobody has waited for."""
    name = os.path.basename(data_dir)
    found = []
    for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdigit() and int(entry) != os.getpid()):
        state = launch.read_stat(pid)[:2]
        is_zombie_of_ours = state == ["Z", str(os.getpid())]
        if is_zombie_of_ours or name in _text(f"/proc/{pid}/mountinfo") or any(name in link for link in _links(pid)):
            found.append(pid)
    return found


def _text(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(errors="replace")
    return ""


def _links(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for entry in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                yield os.readlink(f"/proc/{pid}/fd/{entry}")


def descriptors() -> Counter[str]:
    """What this process has open, by kind."""
    return Counter(link.partition(":")[0] if ":[" in link else link for link in _links(os.getpid()))


def _tasks() -> set[str]:
    own = asyncio.current_task()
    names = {task.get_name() for task in asyncio.all_tasks() if task is not own}
    return {name for name in names if "sandbox" in name or "start" in name} - {"replenish warm sandboxes"}


def everything_of(pool: Pool, before: Counter[str]) -> dict[str, Any]:
    """All that sandboxes of this pool have on the host, under the names of OWNED; empty when there is nothing."""
    run, slots = (Path(pool.data_dir, *names) for names in (("run",), ("sessions", ".slots")))
    tree = pool._isolation.cgroups if pool._isolation is not None else None
    found = {
        "processes": processes_of(pool.data_dir),
        "cgroup": list(tree.leftovers()) if tree is not None else [],
        "sockets": [line for line in _text("/proc/net/unix").splitlines() if os.path.basename(pool.data_dir) in line],
        "run folder": [entry.name for entry in os.scandir(run) if entry.is_dir() and not entry.name.startswith("etc-")],
        "slot": os.listdir(slots),
        "uid": dict(pool._uids._held),
        "descriptors": descriptors() - before,
        "tasks": _tasks(),
        "registrations": pool.opened.keys() - set(pool.closed),
    }
    assert found.keys() == OWNED.keys()
    return {name: what for name, what in found.items() if what}


async def gone(pool: Pool, before: Counter[str], when: str = "") -> None:
    deadline = time.monotonic() + 10
    while left := everything_of(pool, before):
        assert time.monotonic() < deadline, f"left behind {when}: {left}"
        await asyncio.sleep(0.02)
