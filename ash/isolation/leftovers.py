"""What a killed server left behind: finding its sandboxes again, ending them, removing their folders and cgroups.

Never ends a process that is not, by pid and start time, the one that was written down, nor one whose server still lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable, Iterable
from typing import Any

from ash.isolation import bundle, folders, launch
from ash.isolation import cgroup as cgroups
from ash.isolation.cgroup import CgroupTree
from ash.isolation.folders import Folders
from ash.models import SandboxHandle

HANDLE_FILE = "handle.json"


def write_handle(handle: SandboxHandle) -> None:
    """Beside the sockets, for the next server: warm sandboxes stand in no session's record."""
    content = {**handle._asdict(), "server": [os.getpid(), launch.find_start_time(os.getpid())]}
    with open(os.path.join(handle.run_dir, HANDLE_FILE), "w", encoding="utf-8") as file:
        json.dump(content, file)


def read_handles(run: str) -> dict[str, tuple[SandboxHandle, bool]]:
    """Every handle found under run/, and whether the server that wrote it is alive."""
    found = {}
    for id in os.listdir(run):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            content = _read_json(os.path.join(run, id, HANDLE_FILE))
            pid, start_time = content.pop("server")
            found[id] = (SandboxHandle(**content), launch.find_start_time(pid) == start_time)
    return found


def _read_json(path: str) -> Any:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


async def reap(
    handles: Iterable[SandboxHandle], places: Folders, tree: CgroupTree | None, shared: set[str], own_ids: Callable[[], set[str]]
) -> int:
    """End what is nobody's any more and sweep up behind it. Returns how many were alive."""
    found = {handle.id: handle for handle in handles}
    spared = set()
    for id, (handle, is_owned) in (await asyncio.to_thread(read_handles, places.run)).items():
        found[id] = handle
        if is_owned:
            spared.add(id)
    left = [handle for id, handle in found.items() if id not in own_ids() | spared]
    ended = await asyncio.gather(*(launch.end_leftover(handle.pid, handle.start_time, _group(handle, tree)) for handle in left))
    await asyncio.to_thread(_sweep, places, tree, shared, lambda: own_ids() | spared)
    return sum(ended)


def _group(handle: SandboxHandle, tree: CgroupTree | None) -> str | None:
    return handle.cgroup if tree is not None and handle.cgroup is not None and tree.owns(handle.cgroup) else None


def _sweep(places: Folders, tree: CgroupTree | None, shared: set[str], keep_ids: Callable[[], set[str]]) -> None:
    """Looks first and asks afterwards whose it is, so that what begins meanwhile is safe. Blocks."""
    paths = [path for folder in (places.run, places.slots) for path in folders.subfolders(folder)]
    groups = list(tree.leftovers()) if tree is not None else []
    keep = keep_ids()
    for path in paths:
        if os.path.basename(path) not in keep and not bundle.is_shared(path):
            folders.remove_tree(path)
    for path in groups:
        if os.path.basename(path).removeprefix(cgroups.PREFIX) not in keep:
            cgroups.kill(path)
            cgroups.remove(path)
    if shared:
        bundle.prune(places.run, shared)
