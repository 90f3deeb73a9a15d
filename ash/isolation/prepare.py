"""Finds out, once, how this host can isolate agents, and from then on says how a sandbox is started and what limits it.

What it reports was tried, not assumed: a probe runs the chosen interpreter inside bubblewrap, as a sandbox's uid, through the
same steps as every sandbox. Starts no sandbox itself.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from ash.config import child_environ
from ash.errors import ConfigError, IsolationUnavailable, SandboxFailed
from ash.isolation import bundle, bwrap, delegation, host, interpreter, machine, outside, seccomp
from ash.isolation import cgroup as cgroups
from ash.isolation.bwrap import Mounts, System
from ash.isolation.disk import find_quota
from ash.isolation.folders import UIDS, Folders
from ash.isolation.interpreter import Interpreter
from ash.isolation.launch import memory_file, run
from ash.isolation.quota import DiskUse, ProjectQuota
from ash.isolation.records import Limits, Mount
from ash.isolation.stage import NO_CGROUP_EXIT, Stage, launch_prefix, open_stage

NONE_WARNING = "Sandboxing is OFF (--sandbox none): agents run unprotected, with the rights and the files of the server's own user"
PROBE_TIMEOUT = 20.0
TRIAL_RATE = 1000
"""MiB per second with which io.max is tried when the server's own settings do not use it: a session's may."""


class Choices(NamedTuple):
    """What the operator has chosen for sandboxes; what is empty is found by itself."""

    python: str = ""
    cgroup_root: str = ""
    rootfs: str = ""
    mounts: tuple[Mount, ...] = ()
    ptrace: bool = False
    bridge: str | None = None
    """A file that stands in for `ash/bridge.py` (tests)."""


class Place(NamedTuple):
    """Where one sandbox lives on the host."""

    uid: int | None
    cgroup: str | None
    folder: str
    run_dir: str
    gateway_socket: str
    limits: Limits
    device: str = ""
    """The disk that its cgroup's io.max limits."""
    min_free_mb: int = 0
    """What its writing must leave free on the host's disk."""
    quota: ProjectQuota | None = None
    """The kernel's, when it holds this sandbox's limits."""

    def read_disk_use(self) -> DiskUse:
        """What the kernel has counted; for a place with a quota."""
        assert self.quota is not None
        assert self.uid is not None
        return self.quota.use(self.uid)


class Descriptors(NamedTuple):
    """File descriptors that a sandbox's processes inherit; -1 where there is none."""

    listen: int
    info: int = -1
    options: int = -1
    filter: int = -1


class Isolation:
    """How sandboxes are started here. `kind` is `bwrap` or `none`."""

    def __init__(self, kind: str, folders: Folders, limits: Limits) -> None:
        self.kind, self.folders, self.limits = kind, folders, limits
        self.is_root = kind == "bwrap" and os.geteuid() == 0
        self.stage: Stage | None = None
        self.cgroups: cgroups.CgroupTree | None = None
        self.quota, self.how_disk_is_held = find_quota(folders.data)
        self.min_free_disk_mb = 0
        self.no_cgroup_reason = ""
        self.host_warnings: list[str] = []
        self.bwrap = ""
        self.python = Interpreter("", None, "", "")
        self.bundle = ""
        self.prlimit = shutil.which("prlimit", path=bwrap.OUTER_ENVIRONMENT["PATH"])
        self.system = System((), "", (), None)
        self.filter = b""
        self.rootfs = ""
        self.mounts: tuple[Mount, ...] = ()

    def locate(self, path: str) -> str:
        """A host path as a sandbox's uid can reach it."""
        return self.stage.locate(path) if self.stage is not None else path

    def command(self, place: Place, fds: Descriptors, orphan_timeout: float) -> list[str]:
        """The command line of one sandbox. It holds no secret."""
        boxed = self.kind == "bwrap"
        boot = bwrap.boot_arguments(self.python.path, bwrap.BUNDLE if boxed else self.bundle, fds.listen, orphan_timeout)
        if self.prlimit is not None:
            boot = [*bwrap.limit_arguments(self.prlimit, place.limits, processes=self.counts_processes), *boot]
        enter = launch_prefix(self.stage, place.uid, place.cgroup)
        if not boxed:
            return [*enter, *boot, "--root", place.folder, "--gateway-socket", place.gateway_socket]
        given = ["--args", str(fds.options), "--seccomp", str(fds.filter), "--info-fd", str(fds.info)]
        return [*enter, self.bwrap, *given, "--", *boot]

    def options(self, place: Place) -> bytes:
        """What bubblewrap reads from `Descriptors.options`: on its command line it would fill every process list inside."""
        folder = self.locate(place.folder)
        gateway = self.locate(os.path.join(place.run_dir, "gw"))
        mounts = Mounts(f"{folder}/workspace", f"{folder}/home", f"{folder}/agent", gateway)
        session = bwrap.session_arguments(mounts, self.locate(self.bundle))
        return b"".join(os.fsencode(part) + b"\0" for part in bwrap.options(self.system, session=session, tmp_mb=tmp_size_mb(place.limits)))

    def environment(self, place: Place) -> dict[str, str]:
        if self.kind == "bwrap":
            return bwrap.OUTER_ENVIRONMENT
        return child_environ(("PATH", "TZ"), {"HOME": os.path.join(place.folder, "home"), "LANG": "C.UTF-8"})

    @property
    def tmp_mb(self) -> int:
        return tmp_size_mb(self.limits)

    @property
    def counts_processes(self) -> bool:
        """nproc counts per user namespace since Linux 5.14; before, it would count all that the user runs."""
        return self.kind == "bwrap" and self.prlimit is not None and (self.is_root or kernel_version(os.uname().release) >= (5, 14))

    def describe_limits(self) -> dict[str, str]:
        """Which limits are in force, and by what."""
        by_rlimit = self.prlimit is not None
        data = f"{bwrap.data_limit_mb(self.limits)} MiB of data per process (rlimit)" if by_rlimit else self._unlimited("memory")
        processes = f"{self.limits.max_processes} (rlimit)" if self.counts_processes else self._unlimited("pids")
        found = {
            "memory": f"{self.limits.memory_mb} MiB (cgroup v2)" if self._has("memory") else data,
            "cpu": f"{self.limits.cpu_percent} % of one core (cgroup v2)" if self._has("cpu") else self._unlimited("cpu"),
            "processes": f"{self.limits.max_processes} (cgroup v2)" if self._has("pids") else processes,
            "io": self._describe_io(),
            "fileSize": f"{self.limits.max_file_mb} MiB per file (rlimit)" if by_rlimit else "not limited: the program prlimit is missing",
        }
        found["disk"] = self._describe_disk()
        return found | ({"tmp": f"{self.tmp_mb} MiB (tmpfs)"} if self.kind == "bwrap" else {})

    def _has(self, controller: str) -> bool:
        return self.cgroups is not None and controller in self.cgroups.controllers

    def _describe_disk(self) -> str:
        limits = self.limits
        size = f"{limits.disk_mb} MiB" if limits.disk_mb else "any size"
        files = f"{limits.max_files} files" if limits.max_files else "any number of files"
        if not limits.disk_mb and not limits.max_files:
            return "not limited: disk_mb and max_files are 0"
        return f"{size}, {files} ({self.how_disk_is_held})"

    def _unlimited(self, controller: str) -> str:
        tree = self.cgroups
        why = tree.missing.get(controller, "the controller is missing in cgroup v2") if tree is not None else self.no_cgroup_reason
        return f"not limited: {why or 'there is no cgroup'}"

    def _describe_io(self) -> str:
        if not self.limits.io_mb_per_second:
            return "not limited: io_mb_per_second is 0"
        tree = self.cgroups
        if tree is None or not self._has("io"):
            return self._unlimited("io")
        rate = f"{self.limits.io_mb_per_second} MiB/s read and as much written, on disk {tree.device} (cgroup v2)"
        return rate if tree.device else f"not limited: {tree.no_device}"

    def warnings(self) -> list[str]:
        found = [NONE_WARNING] if self.kind == "none" else []
        if self.prlimit is None:
            found.append("The program prlimit is missing, so rlimits are off; install the package util-linux")
        return found + self.host_warnings

    def shared_files(self) -> set[str]:
        """What lies in run/ and belongs to no single sandbox."""
        return {self.bundle, os.path.join(self.folders.run, os.path.basename(self.system.etc))}

    @contextmanager
    def boxed(self, command: Sequence[str]) -> Iterator[tuple[list[str], tuple[int, ...]]]:
        """The command line that runs `command` as in a sandbox, without a session's folders, and the descriptors it takes."""
        enter = launch_prefix(self.stage, UIDS[-1] if self.is_root else None, None)
        with memory_file(self.filter) as file:
            options = [*bwrap.options(self.system), "--seccomp", str(file.fileno())]
            yield [*enter, self.bwrap, *options, "--", *command], (file.fileno(),)

    def close(self) -> None:
        if self.cgroups is not None:
            self.cgroups.close()
        if self.stage is not None:
            self.stage.close()


def tmp_size_mb(limits: Limits) -> int:
    """Size of each of a sandbox's memory file systems. What lies in them counts as its memory."""
    return max(16, limits.memory_mb // 4)


def kernel_version(release: str) -> tuple[int, int]:
    numbers = release.replace("-", ".").split(".")[:2]
    return (int(numbers[0]), int(numbers[1])) if all(part.isdigit() for part in numbers) and len(numbers) == 2 else (0, 0)


async def prepare(kind: str, folders: Folders, limits: Limits, choices: Choices) -> Isolation:
    """Everything a start needs. Raises IsolationUnavailable when this host cannot, ConfigError for a choice that does not work."""
    isolation = Isolation(kind, folders, limits)
    try:
        await (prepare_sandbox(isolation, choices) if kind == "bwrap" else _prepare_none(isolation, choices))
        await _prepare_cgroups(isolation, choices.cgroup_root)
        isolation.host_warnings = await asyncio.to_thread(machine.brief, folders.data, _unlimited_controllers(isolation))
        sources = await asyncio.to_thread(bundle.bridge_sources, choices.bridge)
        python, box = isolation.python, isolation.boxed if kind == "bwrap" else None
        isolation.bundle = await asyncio.to_thread(bundle.build_bridge, folders.run, python.path, python.magic, sources, box)
    except BaseException:
        isolation.close()
        raise
    return isolation


async def _prepare_none(isolation: Isolation, choices: Choices) -> None:
    if choices.rootfs or choices.mounts:
        raise ConfigError("rootfs and the policy's mounts need `--sandbox bwrap`: without isolation agents see all of this machine")
    isolation.python = await interpreter.describe(choices.python or sys.executable)


async def prepare_sandbox(isolation: Isolation, choices: Choices) -> None:
    """Everything but limits: what starts a process in a sandbox. Raises as `prepare` does."""
    program = shutil.which("bwrap") or shutil.which("bwrap", path=bwrap.OUTER_ENVIRONMENT["PATH"])
    if program is None:
        raise IsolationUnavailable(host.explain_missing())
    isolation.bwrap, python = program, choices.python
    isolation.filter = seccomp.compile_filter(os.uname().machine, ptrace=choices.ptrace)
    await asyncio.to_thread(_examine, isolation, choices)
    failures = []
    for path in [python] if python else interpreter.candidates(isolation.rootfs):
        try:
            isolation.python = await _try_interpreter(isolation, path)
        except (SandboxFailed, ConfigError) as error:
            failures.append(f"{path}: {error}")
        else:
            return
    await _check_bwrap(isolation)
    reasons = "; ".join(failures) or "none was found"
    if python:
        raise ConfigError(f"sandbox_python cannot be used inside a sandbox: {reasons}")
    if isolation.rootfs:
        raise ConfigError(f"rootfs {isolation.rootfs} has no Python 3.10 or newer ({reasons}); install python3 in it")
    raise IsolationUnavailable(f"No Python 3.10 or newer that a sandbox can reach ({reasons}). Install python3, or give --sandbox-python")


def _examine(isolation: Isolation, choices: Choices) -> None:
    """What the sandboxes will see. Raises ConfigError for what the operator has named and must not be shown."""
    data = isolation.folders.data
    isolation.mounts = outside.check_mounts(choices.mounts, data)
    if choices.rootfs:
        isolation.rootfs = outside.check_rootfs(choices.rootfs, data)
        isolation.prlimit = outside.find_program(isolation.rootfs, "prlimit", bwrap.ENVIRONMENT["PATH"])
        if isolation.prlimit is None:
            raise ConfigError(f"rootfs {choices.rootfs} has no program prlimit, which sets a sandbox's limits; install util-linux in it")
    isolation.system = isolation.system._replace(etc=bundle.build_etc(isolation.folders.run, isolation.rootfs or "/"))


async def _try_interpreter(isolation: Isolation, path: str) -> Interpreter:
    """Raises SandboxFailed, ConfigError for one that does not run in a sandbox. One of a root file system never runs outside."""
    found = None if isolation.rootfs or interpreter.is_in_usr(path) else await interpreter.describe(path)
    prefix = found.prefix if found is not None else None
    if prefix is not None:
        interpreter.check_prefix(prefix, isolation.folders.data)
    await _set_stage(isolation, prefix)
    code, output, errors = await _probe(isolation, interpreter.describe_arguments(found.path if found is not None else path))
    if code:
        raise SandboxFailed(errors.strip()[-300:] or f"exit code {code}")
    try:
        return interpreter.parse_description(output)._replace(prefix=prefix)
    except ValueError as error:
        raise SandboxFailed(f"does not answer like Python: {output[:100]!r}") from error


async def _set_stage(isolation: Isolation, prefix: str | None) -> None:
    """A root server's stage, made anew when an interpreter's prefix has to stand on it, and what sandboxes see through it."""
    folders = isolation.folders
    if isolation.is_root and (isolation.stage is None or prefix is not None):
        isolation.close()
        sources = {"sessions": folders.sessions, "run": folders.run} | ({"python": prefix} if prefix else {})
        sources |= {"rootfs": isolation.rootfs} if isolation.rootfs else {}
        isolation.stage = await _open_stage(sources | {f"mount{number}": mount.source for number, mount in enumerate(isolation.mounts)})
    isolation.system = await asyncio.to_thread(_look, isolation, prefix)


def _look(isolation: Isolation, prefix: str | None) -> System:
    locate, rootfs = isolation.locate, isolation.rootfs
    etc = os.path.join(isolation.folders.run, os.path.basename(isolation.system.etc))
    return System(
        usr=bwrap.rootfs_arguments(rootfs, locate(rootfs)) if rootfs else bwrap.usr_arguments(),
        etc=locate(etc),
        etc_folders=tuple((locate(source), name) for source, name in bwrap.etc_folders(rootfs or "/")),
        prefix=(locate(prefix), prefix) if prefix is not None else None,
        mounts=tuple((locate(mount.source), mount.target) for mount in isolation.mounts),
    )


async def _open_stage(sources: dict[str, str]) -> Stage:
    try:
        return await open_stage(sources)
    except SandboxFailed as error:
        raise IsolationUnavailable(host.explain_failure(str(error))) from error


async def _probe(isolation: Isolation, command: Sequence[str]) -> tuple[int, str, str]:
    with isolation.boxed(command) as (argv, fds):
        return await run(argv, bwrap.OUTER_ENVIRONMENT, PROBE_TIMEOUT, fds)


async def _check_bwrap(isolation: Isolation) -> None:
    """Tell a host that cannot isolate, and a folder that a sandbox cannot reach, from a host that only lacks an interpreter."""
    await _set_stage(isolation, None)
    code, _, errors = await _probe(isolation, ["/bin/sh", "-c", ":"])
    for source in (*([isolation.rootfs] if isolation.rootfs else []), *(mount.source for mount in isolation.mounts)):
        if code and isolation.locate(source) in errors:
            said = errors.strip()[-200:]
            raise ConfigError(f"{source} cannot be shown to sandboxes ({said}); its files and folders must be open to every user")
    if code:
        raise IsolationUnavailable(host.explain_failure(errors))


async def _prepare_cgroups(isolation: Isolation, root: str) -> None:
    """Use cgroup v2 if a process really can be put into it; a `root` that was asked for by name has to work."""
    try:
        tree = await asyncio.to_thread(delegation.open_tree, root, cgroups.tag_of(isolation.folders.data))
        tree.device, tree.no_device = await asyncio.to_thread(cgroups.find_device, isolation.folders.sessions)
        await _try_cgroup(tree, isolation.limits)
        isolation.cgroups = tree
    except delegation.CgroupsUnavailable as error:
        if root:
            raise ConfigError(f"cgroup_root cannot be used: {error}") from error
        isolation.no_cgroup_reason = str(error)


def _unlimited_controllers(isolation: Isolation) -> dict[str, str]:
    if isolation.cgroups is not None:
        return isolation.cgroups.missing
    return dict.fromkeys(cgroups.CONTROLLERS, isolation.no_cgroup_reason)


async def _try_cgroup(tree: cgroups.CgroupTree, limits: Limits) -> None:
    """Put a process into a cgroup with every limit set, and see what became of both. Raises CgroupsUnavailable."""
    limits = limits._replace(io_mb_per_second=limits.io_mb_per_second or TRIAL_RATE)
    try:
        path = tree.create(f"probe-{os.getpid()}", limits)
    except OSError as error:
        raise delegation.CgroupsUnavailable(f"no cgroup can be made in {tree.root}: {error.strerror}") from error
    try:
        code, _, errors = await run([*launch_prefix(None, None, path), "/bin/sh", "-c", ":"], bwrap.OUTER_ENVIRONMENT, PROBE_TIMEOUT)
        if code == NO_CGROUP_EXIT:
            raise delegation.CgroupsUnavailable(f"no process can be put into {tree.root}: {errors.strip()}")
        await asyncio.to_thread(tree.check, path, limits)
    except SandboxFailed as error:
        raise delegation.CgroupsUnavailable(str(error)) from error
    finally:
        await asyncio.to_thread(cgroups.remove, path)
    if not tree.controllers:
        raise delegation.CgroupsUnavailable(f"no limit is taken at {tree.root}: {'; '.join(tree.lacking)}")
