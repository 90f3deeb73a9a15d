"""Creates and ends many sessions on a built ash.pyz and looks at what is left of them: processes, zombies, descriptors, folders, memory.

    python -m benchmarks.churn [--pyz dist/ash.pyz] [--count 1000] [--callers 4]

Prints a table and ends with 1 when anything is left. Each session runs one command, so that its sandbox has had something to do. A first
part of the sessions is not counted: imports and caches come with it. Loopback only; the server and its folder are removed. Needs psutil.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks.bench import ROOT, Server, deploy

WARM = 2
MAX_GROWTH_MB = 24.0
"""What a server may grow in the counted part: the allocator's noise, and SQLite's cache as the log fills."""


class Census(NamedTuple):
    """What a server has, seen from outside. All but the memory has to be the same again once it is at rest."""

    children: int
    zombies: int
    strangers: int
    descriptors: int
    threads: int
    run_folders: int
    slots: int
    cgroups: int
    memory_mb: float


def take_census(server: Server) -> Census:
    assert server.process is not None
    process = psutil.Process(server.process.pid)
    children = process.children(recursive=True)
    states = [child.status() for child in _still_there(children)]
    run, slots = server.data_dir / "run", server.data_dir / "sessions" / ".slots"
    return Census(
        len(states), states.count(psutil.STATUS_ZOMBIE), len(list(_strangers(server, {process.pid, *(child.pid for child in children)}))),
        process.num_fds(), process.num_threads(), _count_folders(run), _count_folders(slots), len(list(_cgroups())),
        process.memory_info().rss / 2**20,
    )  # fmt: skip


def _still_there(processes: list[psutil.Process]) -> Iterator[psutil.Process]:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.status()
            yield process


def _strangers(server: Server, known: set[int]) -> Iterator[int]:
    """Processes that have the data folder mounted or open and are no descendants of the server."""
    name = server.data_dir.name
    for pid in psutil.pids():
        if pid in known or pid == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if name in Path(f"/proc/{pid}/mountinfo").read_text(errors="replace"):
                yield pid


def _count_folders(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(1 for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("etc-"))
    return 0


def _cgroups() -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from Path("/sys/fs/cgroup").rglob("ash-sandbox-*")


def at_rest(server: Server, seconds: float = 20.0) -> Census:
    """The census once the pool is full and nothing is under way; the last one taken when that does not come."""
    deadline = time.monotonic() + seconds
    last: Census | None = None
    while time.monotonic() < deadline:
        pool = server.call("GET", "/health")["pool"]
        found = take_census(server)
        is_quiet = (pool["warm"], pool["warming"], pool["running"], pool["waiting"]) == (WARM, 0, 0, 0)
        if is_quiet and last is not None and found[:-1] == last[:-1]:
            return found
        last = found if is_quiet else None
        time.sleep(0.3)
    return take_census(server)


def churn(server: Server, count: int, callers: int) -> float:
    """Create, use and end `count` sessions. How long it took."""
    left = iter(range(count))
    lock = threading.Lock()
    failures: list[str] = []

    def work() -> None:
        link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        try:
            while True:
                with lock:
                    if next(left, None) is None:
                        return
                session = server.create(link)
                server.call("POST", f"/api/sessions/{session}/exec", {"command": "echo used > file"}, link)
                server.call("DELETE", f"/api/sessions/{session}", None, link)
        except (SystemExit, OSError, http.client.HTTPException) as error:
            failures.append(str(error))
        finally:
            link.close()

    threads = [threading.Thread(target=work) for _ in range(callers)]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise SystemExit(f"a session failed: {failures[0]}")
    return time.monotonic() - begun


def judge(before: Census, after: Census) -> list[str]:
    """What is left, in words."""
    found = [f"{name}: {old} before, {new} after" for name, old, new in zip(Census._fields, before, after, strict=True)
             if name not in ("memory_mb", "threads") and new > old]  # fmt: skip
    if after.memory_mb - before.memory_mb > MAX_GROWTH_MB:
        found.append(f"memory: {before.memory_mb:.1f} MB before, {after.memory_mb:.1f} MB after")
    return found


def report(count: int, seconds: float, before: Census, after: Census) -> str:
    lines = [
        f"{count} sandboxes created, used and ended in {seconds:.1f} s ({count / seconds:.1f} per second)",
        "",
        "| what the server has | before | after |",
        "|---|---|---|",
    ]
    for name, old, new in zip(Census._fields, before, after, strict=True):
        lines.append(
            f"| {name.replace('_', ' ')} | {old:.1f} | {new:.1f} |"
            if name == "memory_mb"
            else f"| {name.replace('_', ' ')} | {old} | {new} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--pyz", type=Path, default=ROOT / "dist" / "ash.pyz")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--callers", type=int, default=4, help="sessions in the making at once")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ash-churn-"))
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "ASH_CACHE_DIR": str(folder / "cache")}
    try:
        with Server(options.pyz, folder, env, "--warm-sandboxes", str(WARM)) as server:
            deploy(server)
            churn(server, max(10, options.count // 10), options.callers)
            before = at_rest(server)
            seconds = churn(server, options.count, options.callers)
            after = at_rest(server)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(report(options.count, seconds, before, after))  # noqa: T201 - a program's output
    if left := judge(before, after):
        sys.exit("left behind: " + "; ".join(left))


if __name__ == "__main__":
    main()
