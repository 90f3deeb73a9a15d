"""The disk quota of a running sandbox: what its files take is measured while it writes, and held.

Where the kernel holds project quotas (`quota`), a write beyond the limit fails there. Elsewhere this watcher measures, again before the
limit could be reached, and at the limit takes the right to write from every process inside until files have been removed. It reads and
signals; it never deletes a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from ash.isolation import folders
from ash.isolation.quota import DiskUse, ProjectQuota, QuotaUnavailable, find_project_quota, set_project
from ash.isolation.records import Limits
from ash.isolation.tree import Tree, count_cpu_seconds, list_processes, set_file_limit, signal_tools

log = logging.getLogger(__name__)

PARTS = ("workspace", "home")
"""What a session may write, below its folder."""
FASTEST_BYTES, FASTEST_FILES = 1_000_000_000, 100_000
"""What a sandbox is thought to write per second at most: a measurement comes before it could have used up what is left."""
SHORTEST, LONGEST = 0.2, 10.0
"""Seconds between two measurements."""
HOST_SHORTEST = 1.0
"""As `SHORTEST`, where it is only the host's disk that is nearly full: then every sandbox looks that often."""
PATIENCE = 20
"""A measurement that takes long is repeated after this many times its own length: it must not cost more than a twentieth of a CPU."""
HELD_PATIENCE = 2
"""As `PATIENCE`, for a sandbox that is held: its tools stand still meanwhile, and need time to tidy up."""
BUSY = 0.02
"""Seconds of CPU time since the last measurement below which nothing worth measuring can have been written."""
RELEASE = 0.95
"""Writing is allowed again below this part of the limit."""
FULL = 0.995
"""Part of a limit at which the kernel refuses ordinary writes: the last blocks are rarely used up exactly."""
SLACK_BYTES = 16 << 20
"""What a write that was under way may still add after the right to write was taken."""
MAX_STRIKES = 4
"""Measurements that may find more written than that, before the sandbox is ended; the tools are ended at each."""
_ATTEMPTS = 5
_HOST_DISK = "the server's disk is nearly full (min_free_disk_mb): nothing can be written until space is free again"
_THREADS = ThreadPoolExecutor(4, thread_name_prefix="ash-disk")
"""Of their own: folders that take long to measure must not keep the server's other work from its threads."""


def measure(folder: str) -> DiskUse:
    """What a session's workspace and home take. Follows no link; a file with several names counts once. Blocks.

    Raises OSError when a folder is moved meanwhile.
    """
    size = count = 0
    shared: set[tuple[int, int]] = set()
    for part in PARTS:
        for state in folders.walk_states(os.path.join(folder, part)):
            count += 1
            if state.st_nlink > 1 and not stat.S_ISDIR(state.st_mode):
                if (state.st_dev, state.st_ino) in shared:
                    continue
                shared.add((state.st_dev, state.st_ino))
            size += state.st_blocks * 512
    return DiskUse(size, count)


def measure_moving(folder: str, tree: Tree, *, is_exact: bool = False) -> DiskUse:
    """`measure`, for folders that may be moved about just to spoil it: then, or to be exact, the tools stand still meanwhile. Blocks."""
    if not is_exact:
        with contextlib.suppress(OSError):
            return measure(folder)
    signal_tools(tree, signal.SIGSTOP)
    try:
        for _ in range(_ATTEMPTS):  # a stop takes effect when its process next runs
            with contextlib.suppress(OSError):
                return measure(folder)
            time.sleep(SHORTEST / 10)
        return measure(folder)
    finally:
        signal_tools(tree, signal.SIGCONT)


def measure_removed(pids: Iterable[int], folder: str) -> int:
    """Bytes of files that have no name any more and live because a process holds them open or mapped. Blocks."""
    try:
        device = os.stat(folder).st_dev
    except OSError:
        return 0
    found: dict[int, int] = {}
    for path in (path for pid in pids for path in _list_held(pid)):
        with contextlib.suppress(OSError):
            state = os.stat(path)
            if state.st_dev == device and state.st_nlink == 0 and stat.S_ISREG(state.st_mode):
                found[state.st_ino] = state.st_blocks * 512
    return sum(found.values())


def _list_held(pid: int) -> Iterator[str]:
    """A thread may have descriptors of its own, and a mapping holds its file without any."""
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                yield from (f"/proc/{pid}/task/{thread}/fd/{name}" for name in os.listdir(f"/proc/{pid}/task/{thread}/fd"))
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.endswith(" (deleted)\n"):
                yield f"/proc/{pid}/map_files/{_without_zeros(line.split(maxsplit=1)[0])}"


def _without_zeros(addresses: str) -> str:
    """The kernel pads them in one place and not in the other."""
    return "-".join(f"{int(word, 16):x}" for word in addresses.split("-"))


def bind_folder(quota: ProjectQuota | None, folder: str, uid: int | None, limits: Limits) -> bool:
    """Have the kernel hold the limits of a session's folder, if it can; the sandbox's own uid is its project id. Blocks."""
    if quota is None or uid is None:
        return False
    try:
        quota.limit(uid, limits.disk_mb, limits.max_files)
        for part in PARTS:
            _give_tree(os.path.join(folder, part), uid)
    except OSError as error:
        log.warning("the disk quota of %s is watched instead, as the kernel refused it: %s", folder, error.strerror)
        return False
    return True


def _give_tree(path: str, id: int) -> None:
    """Folders hand the id down to what is made in them; a tree from another time or server is walked through."""
    for position, (fd, is_folder) in enumerate(folders.walk_open(path)):
        if not set_project(fd, id, is_folder=is_folder) and position == 0:
            return


class Verdict(NamedTuple):
    """What a measurement came to: the limit that was reached, in words, and whether that is news; `ends` when nothing else helps."""

    limit: str
    message: str
    is_news: bool
    ends: bool


class Watcher:
    """Holds one sandbox's limits for as long as `run` runs. `on_limit(limit, message)` is told each time that one is reached anew,
    `end(reason)` when the sandbox goes on writing in spite of all. With `read_quota` the kernel holds the limits, and says what is used.
    """

    def __init__(
        self, folder: Callable[[], str], tree: Tree, limits: Limits, *, min_free_mb: int,
        on_limit: Callable[[str, str], None], end: Callable[[str], None], read_quota: Callable[[], DiskUse] | None = None,
    ) -> None:  # fmt: skip
        self._folder, self._tree, self._limits, self._min_free_mb = folder, tree, limits, min_free_mb
        self._on_limit, self._end, self._read_quota = on_limit, end, read_quota
        self.use = DiskUse(0, 0)
        self.is_held = False
        self._is_full = False
        self._strikes = 0
        self._held_at = DiskUse(0, 0)
        self._host_left = 0
        self._cpu = -1.0

    async def run(self) -> None:
        while True:
            started = time.monotonic()
            try:
                verdict = await asyncio.get_running_loop().run_in_executor(_THREADS, self.check)
            except OSError as error:
                log.warning("the files of %s could not be measured: %s", self._folder(), error)
            except Exception:  # the edge of the loop: whatever it is, a sandbox must not go on without its watcher
                log.exception("the files of %s could not be measured", self._folder())
            else:
                self._report(verdict)
            cost = time.monotonic() - started
            await asyncio.sleep(max(self.interval(), (HELD_PATIENCE if self.is_held else PATIENCE) * cost))

    def _report(self, verdict: Verdict | None) -> None:
        if verdict is not None and verdict.is_news:
            self._on_limit(verdict.limit, verdict.message)
        if verdict is not None and verdict.ends:
            self._end(f"{verdict.message}; it went on writing and was ended")

    def interval(self) -> float:
        """Seconds in which the limits cannot be reached from here."""
        limits = self._limits
        left = [LONGEST]
        if limits.disk_mb:
            left.append(((limits.disk_mb << 20) - self.use.bytes) / FASTEST_BYTES)
        if limits.max_files:
            left.append((limits.max_files - self.use.files) / FASTEST_FILES)
        host = max(HOST_SHORTEST, self._host_left / FASTEST_BYTES) if self._min_free_mb else LONGEST
        return max(SHORTEST, min(*left, host))

    def latest(self) -> DiskUse:
        """What was last measured, or what the kernel says now. Blocks."""
        if self._read_quota is not None:
            with contextlib.suppress(OSError):  # then what it said last
                return self._read_quota()
        return self.use

    def check(self) -> Verdict | None:
        """Measure, unless nothing can have changed, and do what follows from it. Blocks."""
        if self._read_quota is not None:
            return self._check_quota(self._read_quota())
        pids = list(list_processes(self._tree.pid))
        cpu = count_cpu_seconds(pids)
        if not self.is_held and abs(cpu - self._cpu) < BUSY and not self._is_disk_short():
            return None
        self._cpu = cpu
        folder = self._folder()
        before, use = self.use, measure_moving(folder, self._tree, is_exact=self.is_held)
        self.use = use._replace(bytes=use.bytes + measure_removed(pids, folder))
        reached = self._find_reached()
        if reached is not None:
            return self._hold(*reached, before)
        if self.is_held and self._part() < RELEASE:
            self._release()
        return None

    def _check_quota(self, use: DiskUse) -> Verdict | None:
        """The kernel refuses what goes beyond the quota; it knows nothing of the space that is kept free for the host."""
        self.use = use
        if self._is_disk_short():
            return self._hold("host_disk", _HOST_DISK, use)
        if self.is_held:
            self._release()
        was_full, self._is_full = self._is_full, self._part() >= FULL
        reached = self._describe_nearest() if self._is_full and not was_full else None
        return Verdict(*reached, is_news=True, ends=False) if reached is not None else None

    def _hold(self, limit: str, message: str, before: DiskUse) -> Verdict:
        is_news, self.is_held = not self.is_held, True
        self._set_file_limit(0)
        if is_news:
            self._held_at = self.use
        else:  # since it was held, not since the last look: who grows slowly grows too
            before = self._held_at
        has_grown = (limit == "files" and self.use.files > before.files) or self.use.bytes > before.bytes + SLACK_BYTES
        if has_grown:
            self._held_at = self.use
        if not is_news and limit != "host_disk":
            self._strikes += has_grown
        if has_grown and (limit == "files" or not is_news):  # empty files are made in spite of it, and some may lift a soft limit
            signal_tools(self._tree, signal.SIGKILL)
        return Verdict(limit, message, is_news, self._strikes >= MAX_STRIKES)

    def _part(self) -> float:
        """How much of the limit that is nearest is used, as a fraction."""
        limits = self._limits
        disk = self.use.bytes / (limits.disk_mb << 20) if limits.disk_mb else 0.0
        return max(disk, self.use.files / limits.max_files if limits.max_files else 0.0)

    def _find_reached(self) -> tuple[str, str] | None:
        if self._part() >= 1:
            return self._describe_nearest()
        return ("host_disk", _HOST_DISK) if self._is_disk_short() else None

    def _describe_nearest(self) -> tuple[str, str]:
        limits, use = self._limits, self.use
        if limits.max_files and use.files >= limits.max_files * FULL:
            return "files", f"the session has {use.files} files and its limit is {limits.max_files} (max_files): remove some"
        return "disk", f"the session's files take {use.bytes >> 20} MiB and its limit is {limits.disk_mb} MiB (disk_mb): remove some"

    def _is_disk_short(self) -> bool:
        if not self._min_free_mb:
            return False
        state = os.statvfs(self._folder())
        self._host_left = state.f_bavail * state.f_frsize - (self._min_free_mb << 20)
        return self._host_left < 0

    def _release(self) -> None:
        self.is_held, self._strikes = False, 0
        self._set_file_limit(self._limits.max_file_mb << 20)

    def _set_file_limit(self, size: int) -> None:
        """A measurement may have outlasted the sandbox, and its pid be another's by now."""
        if self._tree.is_there():
            set_file_limit(self._tree.pid, size)


def find_quota(folder: str) -> tuple[ProjectQuota | None, str]:
    """The kernel's quota where it has one, and which way it is in words."""
    try:
        return find_project_quota(folder), "project quota"
    except QuotaUnavailable as error:
        return None, f"watched: {error}"
