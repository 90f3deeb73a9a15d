"""What a killed server left behind: finding its sandboxes again, ending them, removing their folders, cgroups and half-done uploads.

Never ends a process that is not, by pid and start time, the one that was written down, or that holds a sandbox's own socket, nor one
whose server still lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ash.isolation import bundle, files, folders, launch
from ash.isolation import cgroup as cgroups
from ash.isolation.cgroup import CgroupTree
from ash.isolation.folders import Folders
from ash.models import SandboxHandle

log = logging.getLogger(__name__)

HANDLE_FILE = "handle.json"
BRIDGE_SOCKET = "bridge.sock"
_HOLDER_ROUNDS = 10


OWNED = {
    "processes": "the monitor, the namespace's first process, the bridge, its tools",
    "cgroup": "one folder in cgroup v2, where there is one",
    "sockets": "bridge.sock, gateway.sock and egress.sock, in the run folder",
    "run folder": "run/<id>",
    "slot": "sessions/.slots/<id>, until a session has claimed it",
    "uid": "held by the id while it starts or runs; it stays the owner of a session's folder",
    "descriptors": "of the server: pidfd, link, log, the pipes of the start",
    "tasks": "of the server: the sandbox's life, its connection, its exit",
    "registrations": "what `on_open` has opened, at the gateway and the egress proxy",
}
"""All that one sandbox has on a host besides its session's folder. Its mounts are in no namespace but its own and end with it.
tests/integration/test_lifecycle.py looks for each of them."""


def write_handle(handle: SandboxHandle) -> None:
    """Beside the sockets, for the next server: warm sandboxes stand in no session's record. There is always a whole one."""
    content = {**handle._asdict(), "server": [os.getpid(), launch.find_start_time(os.getpid())]}
    path = os.path.join(handle.run_dir, HANDLE_FILE)
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(content, file)
    os.replace(path + ".new", path)


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
    groups = {handle.id: cgroups.find_recorded(handle, cgroups.tag_of(places.data)) for handle in left}
    ended = await asyncio.gather(*(launch.end_leftover(handle.pid, handle.start_time, groups[handle.id]) for handle in left))
    ids = {os.path.basename(path) for path in await asyncio.to_thread(folders.subfolders, places.run)}
    await end_holders(ids - own_ids() - spared)
    recorded = [(id, path) for id, path in groups.items() if path is not None]
    await asyncio.to_thread(_sweep, places, tree, recorded, shared, lambda: own_ids() | spared)
    return sum(ended)


async def end_holders(ids: set[str]) -> None:
    """End the processes that hold the bridge's socket of one of these sandboxes, for those of which nobody knows the processes.

    Only the server binds that socket and only that sandbox inherits it, so no other process can be among them.
    """
    for _ in range(_HOLDER_ROUNDS):
        sockets, holders = await asyncio.to_thread(_find_holders, ids)
        if not sockets:
            return
        await asyncio.gather(*(launch.end_leftover(pid, start_time, None) for pid, start_time in holders))
        await asyncio.sleep(0.02)
    log.error("what is left of sandbox %s does not end", ", ".join(sorted(ids)))


def _find_holders(ids: set[str]) -> tuple[set[str], list[tuple[int, int]]]:
    """The bound sockets, and who holds them: pids with start times. Blocks."""
    links = {f"socket:[{inode}]" for id, inode in _bound_sockets() if id in ids}
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit() and name != str(os.getpid())] if links else []
    return links, [(pid, launch.find_start_time(pid) or 0) for pid in pids if links & _open_files(pid)]


def _bound_sockets() -> Iterator[tuple[str, str]]:
    """(sandbox id, inode) of every bridge's socket that somebody holds."""
    with contextlib.suppress(OSError), open("/proc/net/unix", encoding="utf-8", errors="replace") as file:
        for line in file:
            fields = line.split(maxsplit=7)
            if len(fields) == 8 and fields[7].rstrip().endswith("/" + BRIDGE_SOCKET):
                yield os.path.basename(os.path.dirname(fields[7].rstrip())), fields[6]


def _open_files(pid: int) -> set[str]:
    """What a process has open, as far as it can be seen."""
    found = set()
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


def _sweep(
    places: Folders, tree: CgroupTree | None, recorded: Iterable[tuple[str, str]], shared: set[str], keep_ids: Callable[[], set[str]]
) -> None:
    """Looks first and asks afterwards whose it is, so that what begins meanwhile is safe. Blocks."""
    paths = [path for folder in (places.run, places.slots) for path in folders.subfolders(folder)]
    groups = [*recorded, *(tree.leftovers() if tree is not None else ())]
    keep = keep_ids()
    for path in paths:
        if os.path.basename(path) not in keep and not bundle.is_shared(path):
            folders.remove_tree(path)
    for id, path in groups:
        if id not in keep:
            cgroups.kill(path)
            cgroups.remove(path)
    files.remove_staged(places.sessions)
    if shared:
        bundle.prune(places.run, shared)
