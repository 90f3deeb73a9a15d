"""The cgroup v2 writer: makes, limits, kills and removes one cgroup per sandbox, and reads what happened in it.

Reads and writes files only, below a root that `delegation` found. Never touches the cgroup of another data folder's sandbox.
Cgroup v1 is not used.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping

from ash.isolation.records import Limits
from ash.models import SandboxHandle

log = logging.getLogger(__name__)

CONTROLLERS = ("memory", "pids", "cpu", "io")
PREFIX = "ash-sandbox-"
MIB = 1024 * 1024
MAX_NESTED = 1000
"""Most cgroups inside a sandbox's one that are removed with it. There should be none: nothing inside can make any."""
_PERIOD_US = 100_000
_KILL_ROUNDS = 20
# The file without which a controller limits nothing. The others refine it, and older kernels lack some.
_MAIN = {"memory": "memory.max", "pids": "pids.max", "cpu": "cpu.max", "io": "io.max"}
_HIGH_FRACTION, _HIGH_GAP = 50, 64 * MIB
_ALIGNMENT = 64 * 1024


class CgroupTree:
    """One folder of cgroup v2 whose children are sandboxes. `tag` tells this data folder's from those of other servers.

    `controllers` are those that limit something here; `missing` says of each other one why not; `lacking` names single files
    that this kernel does not have or did not accept. `device` is what io.max limits, or `no_device` says why there is none.
    """

    def __init__(self, root: str, controllers: Iterable[str], *, tag: str = "", missing: Mapping[str, str] | None = None) -> None:
        self.root, self.controllers = root, tuple(controllers)
        self.missing = dict(missing or {})
        self.lacking: list[str] = []
        self.device, self.no_device = "", ""
        self.is_made = False
        self._prefix = _prefix(tag)

    def create(self, id: str, limits: Limits) -> str:
        """A new cgroup with its limits set, empty. Raises OSError when a limit is refused; then there is none."""
        path = os.path.join(self.root, self._prefix + id)
        os.mkdir(path)
        try:
            for name, value in limit_files(limits, self.controllers, self.device):
                self._set(path, name, value)
        except BaseException:  # a cgroup without its limits must not stay
            remove(path, timeout=0)
            raise
        return path

    def _set(self, path: str, name: str, value: str) -> None:
        try:
            _write(os.path.join(path, name), value)
        except OSError:
            if name in _MAIN.values() and name != "io.max":
                raise

    def check(self, path: str, limits: Limits) -> None:
        """Read back what a cgroup of `create` holds, and keep in mind what this kernel does not take."""
        for name, value in limit_files(limits, self.controllers, self.device):
            if problem := _compare(os.path.join(path, name), value):
                controller = name.partition(".")[0]
                self.lacking.append(f"{name}: {problem}")
                if _MAIN.get(controller) == name:
                    self.missing[controller] = problem
        self.controllers = tuple(name for name in self.controllers if name not in self.missing)

    def leftovers(self) -> Iterator[tuple[str, str]]:
        """Id and path of every cgroup here that was made for this data folder."""
        with contextlib.suppress(OSError), os.scandir(self.root) as entries:
            found = sorted(entry.path for entry in entries if entry.name.startswith(self._prefix) and entry.is_dir())
            yield from ((os.path.basename(path).removeprefix(self._prefix), path) for path in found)

    def close(self) -> None:
        """Remove the root if it was made for sandboxes and holds none any more."""
        if self.is_made:
            with contextlib.suppress(OSError):
                os.rmdir(self.root)


def tag_of(folder: str) -> str:
    """What the cgroups of a data folder have in their names. Not its path, which another container may have as well."""
    found = os.stat(folder)
    return f"{found.st_dev:x}.{found.st_ino:x}"


def _prefix(tag: str) -> str:
    return f"{PREFIX}{tag}-" if tag else PREFIX


def find_recorded(handle: SandboxHandle, tag: str) -> str | None:
    """The cgroup of a handle, in whichever tree it was made, if it is that of this data folder's sandbox and still there."""
    path = handle.cgroup or ""
    is_its_own = os.path.basename(path) == _prefix(tag) + handle.id
    return path if is_its_own and os.path.isfile(os.path.join(path, "cgroup.procs")) else None


def limit_files(limits: Limits, controllers: Iterable[str], device: str = "") -> list[tuple[str, str]]:
    """The files of a sandbox's cgroup and what goes into them."""
    memory, rate = limits.memory_mb * MIB, limits.io_mb_per_second * MIB
    files = {
        "memory": [
            ("memory.max", _or_max(memory)),
            ("memory.high", _or_max(high_mark(memory))),
            ("memory.swap.max", "0"),
            ("memory.oom.group", "1"),
        ],
        "pids": [("pids.max", _or_max(limits.max_processes))],
        "cpu": [("cpu.max", f"{_or_max(limits.cpu_percent * _PERIOD_US // 100)} {_PERIOD_US}"), ("cpu.weight", str(limits.cpu_weight))],
        "io": [("io.max", f"{device} rbps={rate} wbps={rate}")] if rate and device else [],
    }
    return [("cgroup.max.descendants", "0"), *(pair for name in controllers for pair in files[name])]


def high_mark(limit_bytes: int) -> int:
    """From where on the kernel takes back what it can and slows down who still allocates: 2 % below the limit, 64 MiB at most.

    Close to it on purpose: without swap what a bomb holds cannot be taken back, and the further it gets beyond this mark, the longer
    each allocation sleeps. With this distance a bomb meets the limit after at most about two seconds; with 10 % it would hang for minutes.
    """
    gap = min(limit_bytes // _HIGH_FRACTION, _HIGH_GAP)
    return (limit_bytes - gap) // _ALIGNMENT * _ALIGNMENT


def _or_max(value: int) -> str:
    return str(value) if value else "max"


def _compare(path: str, wanted: str) -> str:
    """What is wrong with a file that should hold `wanted`; empty when nothing is."""
    try:
        found = _read(path).split()
    except FileNotFoundError:
        return "this kernel does not have it"
    except OSError as error:
        return error.strerror or "it cannot be read"
    return "" if set(wanted.split()) <= set(found) else f"the kernel keeps {' '.join(found) or 'nothing'!r} instead of {wanted!r}"


def find_device(folder: str, numbers: str = "/sys/dev/block") -> tuple[str, str]:
    """Major and minor number of the disk that `folder` is on, for io.max; or an empty text and why there is none."""
    device = os.stat(folder).st_dev
    major, minor = os.major(device), os.minor(device)
    if not major:
        return "", "its file system has no disk of its own (btrfs, overlay, tmpfs and network file systems have none)"
    entry = os.path.realpath(os.path.join(numbers, f"{major}:{minor}"))
    try:
        if os.path.exists(os.path.join(entry, "partition")):  # only whole disks can be limited
            return _read(os.path.join(os.path.dirname(entry), "dev")).strip(), ""
        return _read(os.path.join(entry, "dev")).strip(), ""
    except OSError:
        return "", f"the kernel shows no disk {major}:{minor}"


def kill(path: str) -> None:
    """End every process of the cgroup at once. A cgroup that is gone is none to kill."""
    try:
        _write(os.path.join(path, "cgroup.kill"), "1")
    except OSError:
        _kill_each(path)  # before Linux 5.14


def _kill_each(path: str) -> None:
    """Without cgroup.kill: hold them still first, so that none forks away while its turn comes. A frozen process can be killed."""
    set_frozen(path, True)
    for _ in range(_KILL_ROUNDS):
        pids = list(find_processes(path))
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not pids:
            break
        time.sleep(0.005)
    set_frozen(path, False)


def set_frozen(path: str, frozen: bool) -> None:
    with contextlib.suppress(OSError):
        _write(os.path.join(path, "cgroup.freeze"), "1" if frozen else "0")


def find_processes(path: str) -> Iterator[int]:
    """The processes in a cgroup and those inside it. The kernel shows one of another pid namespace as 0, which no signal may go to."""
    for folder, _, _ in itertools.islice(os.walk(path), MAX_NESTED):
        with contextlib.suppress(OSError):
            yield from (int(word) for word in _read(os.path.join(folder, "cgroup.procs")).split() if word.isdigit() and int(word) > 0)


def read_counters(path: str, name: str) -> dict[str, int]:
    """A file of lines of a word and a number, such as memory.events; empty when there is none."""
    with contextlib.suppress(OSError):
        pairs = (line.split() for line in _read(os.path.join(path, name)).splitlines())
        return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
    return {}


def find_oom(path: str) -> str | None:
    """Whose memory ran out when the kernel ended processes of this cgroup: `sandbox` or `host`; None when it ended none.

    `oom` counts at the cgroup whose limit was met, `oom_kill` where a process was ended, for whichever reason.
    """
    events = read_counters(path, "memory.events")
    if not events.get("oom_kill") and not events.get("oom_group_kill"):
        return None
    return "sandbox" if events.get("oom") else "host"


def count_met_limits(path: str) -> tuple[int, int]:
    """How many processes were ended for want of memory, and how many forks and threads were refused."""
    return read_counters(path, "memory.events").get("oom_kill", 0), read_counters(path, "pids.events").get("max", 0)


def remove(path: str, timeout: float = 1.0) -> bool:
    """Remove an ended sandbox's cgroup and all inside. A busy one is tried again: its last process may be on the way out. Blocks."""
    deadline = time.monotonic() + timeout
    while not _try_remove(path):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


def _try_remove(path: str) -> bool:
    try:
        for folder, _, _ in itertools.islice(os.walk(path, topdown=False), MAX_NESTED):
            os.rmdir(folder)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ENOTEMPTY, errno.ENOENT):
            log.warning("the cgroup %s cannot be removed: %s", path, error.strerror)
    return not os.path.lexists(path)


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def _write(path: str, text: str) -> None:
    """One write(2): the kernel refuses or obeys as a whole."""
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
