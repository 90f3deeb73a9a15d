"""Finds out, once, how this host can isolate agents, and from then on says how a sandbox is started and what limits it.

What it reports was tried, not assumed: a probe runs the chosen interpreter inside bubblewrap, as a sandbox's uid, through the
same steps as every sandbox. Starts no sandbox itself.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Sequence
from typing import NamedTuple

from ash.config import child_environ
from ash.errors import ConfigError, IsolationUnavailable, SandboxFailed
from ash.isolation import bundle, bwrap, host, interpreter
from ash.isolation import cgroup as cgroups
from ash.isolation.bwrap import Mounts, System
from ash.isolation.folders import UIDS, Folders
from ash.isolation.interpreter import Interpreter
from ash.isolation.launch import run
from ash.isolation.records import Limits
from ash.isolation.stage import NO_CGROUP_EXIT, Stage, launch_prefix, open_stage

NONE_WARNING = "Sandboxing is OFF (--sandbox none): agents run unprotected, with the rights and the files of the server's own user"
PROBE_TIMEOUT = 20.0


class Place(NamedTuple):
    """Where one sandbox lives on the host."""

    uid: int | None
    cgroup: str | None
    folder: str
    run_dir: str
    gateway_socket: str


class Descriptors(NamedTuple):
    """File descriptors that a sandbox's processes inherit; -1 where there is none."""

    listen: int
    info: int = -1
    options: int = -1


class Isolation:
    """How sandboxes are started here. `kind` is `bwrap` or `none`."""

    def __init__(self, kind: str, folders: Folders, limits: Limits) -> None:
        self.kind, self.folders, self.limits = kind, folders, limits
        self.is_root = kind == "bwrap" and os.geteuid() == 0
        self.stage: Stage | None = None
        self.cgroups: cgroups.CgroupTree | None = None
        self.no_cgroup_reason = ""
        self.bwrap = ""
        self.python = Interpreter("", None, "", "")
        self.bundle = ""
        self.prlimit = shutil.which("prlimit", path=bwrap.OUTER_ENVIRONMENT["PATH"])
        self.system = System((), "", (), None)

    def locate(self, path: str) -> str:
        """A host path as a sandbox's uid can reach it."""
        return self.stage.locate(path) if self.stage is not None else path

    def command(self, place: Place, fds: Descriptors, orphan_timeout: float) -> list[str]:
        """The command line of one sandbox. It holds no secret."""
        boxed = self.kind == "bwrap"
        boot = bwrap.boot_arguments(self.python.path, bwrap.BUNDLE if boxed else self.bundle, fds.listen, orphan_timeout)
        if self.prlimit is not None:
            boot = [*bwrap.limit_arguments(self.prlimit, self.limits, processes=self.counts_processes), *boot]
        enter = launch_prefix(self.stage, place.uid, place.cgroup)
        if not boxed:
            return [*enter, *boot, "--root", place.folder, "--gateway-socket", place.gateway_socket]
        return [*enter, self.bwrap, "--args", str(fds.options), "--info-fd", str(fds.info), "--", *boot]

    def options(self, place: Place) -> bytes:
        """What bubblewrap reads from `Descriptors.options`: on its command line it would fill every process list inside."""
        folder = self.locate(place.folder)
        gateway = self.locate(os.path.join(place.run_dir, "gw"))
        mounts = Mounts(f"{folder}/workspace", f"{folder}/home", f"{folder}/agent", gateway)
        session = bwrap.session_arguments(mounts, self.locate(self.bundle))
        return b"".join(os.fsencode(part) + b"\0" for part in bwrap.options(self.system, session=session, tmp_mb=self.tmp_mb))

    def environment(self, place: Place) -> dict[str, str]:
        if self.kind == "bwrap":
            return bwrap.OUTER_ENVIRONMENT
        return child_environ(("PATH", "TZ"), {"HOME": os.path.join(place.folder, "home"), "LANG": "C.UTF-8"})

    @property
    def tmp_mb(self) -> int:
        return max(16, self.limits.memory_mb // 4)

    @property
    def counts_processes(self) -> bool:
        """nproc counts per user namespace since Linux 5.14; before, it would count all that the user runs."""
        return self.kind == "bwrap" and self.prlimit is not None and (self.is_root or kernel_version(os.uname().release) >= (5, 14))

    def describe_limits(self) -> dict[str, str]:
        """Which limits are in force, and by what."""
        here = self.cgroups.controllers if self.cgroups is not None else ()
        reason = f"not limited: {self.no_cgroup_reason}" if self.no_cgroup_reason else "not limited: the controller is missing in cgroup v2"
        by_rlimit = self.prlimit is not None
        data = f"{bwrap.data_limit_mb(self.limits)} MiB of data per process (rlimit)" if by_rlimit else reason
        processes = f"{self.limits.max_processes} (rlimit)" if self.counts_processes else reason
        found = {
            "memory": f"{self.limits.memory_mb} MiB (cgroup v2)" if "memory" in here else data,
            "cpu": f"{self.limits.cpu_percent} % of one core (cgroup v2)" if "cpu" in here else reason,
            "processes": f"{self.limits.max_processes} (cgroup v2)" if "pids" in here else processes,
            "fileSize": f"{self.limits.max_file_mb} MiB per file (rlimit)" if by_rlimit else "not limited: the program prlimit is missing",
        }
        return found | ({"tmp": f"{self.tmp_mb} MiB (tmpfs)"} if self.kind == "bwrap" else {})

    def warnings(self) -> list[str]:
        found = [NONE_WARNING] if self.kind == "none" else []
        if self.prlimit is None:
            found.append("The program prlimit is missing, so rlimits are off; install the package util-linux")
        return found

    def shared_files(self) -> set[str]:
        """What lies in run/ and belongs to no single sandbox."""
        return {self.bundle, os.path.join(self.folders.run, os.path.basename(self.system.etc))}

    def close(self) -> None:
        if self.stage is not None:
            self.stage.close()


def kernel_version(release: str) -> tuple[int, int]:
    numbers = release.replace("-", ".").split(".")[:2]
    return (int(numbers[0]), int(numbers[1])) if all(part.isdigit() for part in numbers) and len(numbers) == 2 else (0, 0)


async def prepare(kind: str, folders: Folders, limits: Limits, python: str, cgroup_root: str, bridge: str | None) -> Isolation:
    """Everything a start needs. Raises IsolationUnavailable when this host cannot, ConfigError for a `python` that does not work."""
    isolation = Isolation(kind, folders, limits)
    try:
        await (_prepare_bwrap(isolation, python) if kind == "bwrap" else _prepare_none(isolation, python))
        await _prepare_cgroups(isolation, cgroup_root)
        sources = await asyncio.to_thread(bundle.bridge_sources, bridge)
        isolation.bundle = await asyncio.to_thread(bundle.build_bridge, folders.run, isolation.python.path, isolation.python.magic, sources)
    except BaseException:
        isolation.close()
        raise
    return isolation


async def _prepare_none(isolation: Isolation, python: str) -> None:
    isolation.python = await interpreter.describe(python or sys.executable)


async def _prepare_bwrap(isolation: Isolation, python: str) -> None:
    program = shutil.which("bwrap") or shutil.which("bwrap", path=bwrap.OUTER_ENVIRONMENT["PATH"])
    if program is None:
        raise IsolationUnavailable(host.explain_missing())
    isolation.bwrap = program
    etc = isolation.locate(await asyncio.to_thread(bundle.build_etc, isolation.folders.run))
    isolation.system = System(bwrap.usr_arguments(), etc, bwrap.etc_folders(), None)
    failures = []
    for path in [python] if python else interpreter.candidates():
        try:
            isolation.python = await _try_interpreter(isolation, path)
        except (SandboxFailed, ConfigError) as error:
            failures.append(f"{path}: {error}")
        else:
            return
    reasons = "; ".join(failures)
    if python:
        raise ConfigError(f"sandbox_python cannot be used inside a sandbox: {reasons}")
    await _check_bwrap(isolation)
    raise IsolationUnavailable(f"No Python 3.10 or newer that a sandbox can reach ({reasons}). Install python3, or give --sandbox-python")


async def _try_interpreter(isolation: Isolation, path: str) -> Interpreter:
    found = None if interpreter.is_in_usr(path) else await interpreter.describe(path)
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
    """A root server's stage, made anew when an interpreter's prefix has to stand on it."""
    folders = isolation.folders
    if isolation.is_root and (isolation.stage is None or prefix is not None):
        isolation.close()
        sources = {"sessions": folders.sessions, "run": folders.run} | ({"python": prefix} if prefix else {})
        isolation.stage = await _open_stage(sources)
    etc = os.path.join(folders.run, os.path.basename(isolation.system.etc))
    bound = (isolation.locate(prefix), prefix) if prefix is not None else None
    isolation.system = isolation.system._replace(etc=isolation.locate(etc), prefix=bound)


async def _open_stage(sources: dict[str, str]) -> Stage:
    try:
        return await open_stage(sources)
    except SandboxFailed as error:
        raise IsolationUnavailable(host.explain_failure(str(error))) from error


async def _probe(isolation: Isolation, command: Sequence[str]) -> tuple[int, str, str]:
    uid = UIDS[-1] if isolation.is_root else None
    argv = [*launch_prefix(isolation.stage, uid, None), isolation.bwrap, *bwrap.options(isolation.system), "--", *command]
    return await run(argv, bwrap.OUTER_ENVIRONMENT, PROBE_TIMEOUT)


async def _check_bwrap(isolation: Isolation) -> None:
    """Tell a host that cannot isolate from one that only lacks an interpreter."""
    code, _, errors = await _probe(isolation, ["/bin/sh", "-c", ":"])
    if code:
        raise IsolationUnavailable(host.explain_failure(errors))


async def _prepare_cgroups(isolation: Isolation, root: str) -> None:
    """Use cgroup v2 if a process really can be put into it; a `root` that was asked for by name has to work."""
    try:
        tree = await asyncio.to_thread(cgroups.open_tree, root)
        await _try_cgroup(tree, isolation.limits)
        isolation.cgroups = tree
    except cgroups.CgroupsUnavailable as error:
        if root:
            raise ConfigError(f"cgroup_root cannot be used: {error}") from error
        isolation.no_cgroup_reason = str(error)


async def _try_cgroup(tree: cgroups.CgroupTree, limits: Limits) -> None:
    try:
        path = tree.create(f"probe-{os.getpid()}", limits)
    except OSError as error:
        raise cgroups.CgroupsUnavailable(f"no cgroup can be made in {tree.root}: {error.strerror}") from error
    try:
        code, _, errors = await run([*launch_prefix(None, None, path), "/bin/sh", "-c", ":"], bwrap.OUTER_ENVIRONMENT, PROBE_TIMEOUT)
        if code == NO_CGROUP_EXIT:
            raise cgroups.CgroupsUnavailable(f"no process can be put into {tree.root}: {errors.strip()}")
    except SandboxFailed as error:
        raise cgroups.CgroupsUnavailable(str(error)) from error
    finally:
        await asyncio.to_thread(cgroups.remove, path)
