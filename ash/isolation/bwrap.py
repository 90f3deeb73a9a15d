"""The command that puts the bridge into bubblewrap, as pure functions: what is mounted, what is unshared, what it may use.

Deny by default: the new root is an empty tmpfs and shows only what stands here. Never holds a secret; arguments are public.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from typing import NamedTuple

from ash import protocol
from ash.isolation.records import Limits

MIB = 1024 * 1024
BUNDLE = "/opt/ash/bridge.zip"
INNER_ID = 1000
"""User and group inside; the host sees the sandbox's own uid."""

ENVIRONMENT = {
    "HOME": protocol.HOME_DIR,
    "LANG": "C.UTF-8",
    "LOGNAME": "agent",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "SHELL": "/bin/bash",
    "TERM": "dumb",
    "TMPDIR": "/tmp",
    "USER": "agent",
}
OUTER_ENVIRONMENT = {"PATH": ENVIRONMENT["PATH"], "LANG": "C.UTF-8"}
"""All that bwrap itself starts with: /proc/1/environ inside shows it, whatever --clearenv does for the child."""

_USR_NAMES = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_ETC_FOLDERS = ("alternatives", "ssl/certs", "pki/tls/certs", "pki/ca-trust", "ca-certificates")
MEMORY_FLOOR_MB = 256
"""Least data limit of a single process: below it a few threads' stacks alone would not fit."""


class Mounts(NamedTuple):
    """The folders of one sandbox, as its uid can reach them on the host."""

    workspace: str
    home: str
    agent: str
    gateway: str


class System(NamedTuple):
    """What all sandboxes of a host share; found once, at start."""

    usr: tuple[str, ...]
    etc: str
    etc_folders: tuple[str, ...]
    prefix: tuple[str, str] | None
    """Source and place inside of an interpreter that is not under /usr."""


def usr_arguments(root: str = "/") -> tuple[str, ...]:
    """/usr, and the folders that a merged-/usr system links into it, or holds itself when it is not merged."""
    arguments = ["--ro-bind", "/usr", "/usr"]
    for name in _USR_NAMES:
        path = os.path.join(root, name)
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), f"/{name}"]
        elif os.path.isdir(path):
            arguments += ["--ro-bind", f"/{name}", f"/{name}"]
    return tuple(arguments)


def etc_folders(root: str = "/etc") -> tuple[str, ...]:
    """Folders of the host's /etc that hold nothing private and that programs need."""
    return tuple(name for name in _ETC_FOLDERS if os.path.isdir(os.path.join(root, name)))


def namespace_arguments() -> list[str]:
    return [
        "--unshare-all", "--unshare-user", "--disable-userns", "--uid", str(INNER_ID), "--gid", str(INNER_ID),
        "--cap-drop", "ALL", "--new-session", "--hostname", "sandbox", "--clearenv",
    ]  # fmt: skip


def root_arguments(system: System, tmp_bytes: int) -> list[str]:
    """The part of the tree that is the same for all. /tmp comes before any bind, so that it hides none."""
    arguments = [*system.usr, "--proc", "/proc", "--ro-bind", "/proc/sys", "/proc/sys", "--dev", "/dev"]
    arguments += ["--perms", "1777", "--size", str(tmp_bytes), "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]
    arguments += ["--perms", "1777", "--size", str(tmp_bytes), "--tmpfs", "/tmp", "--ro-bind", system.etc, "/etc"]
    for name in system.etc_folders:
        arguments += ["--ro-bind", f"/etc/{name}", f"/etc/{name}"]
    return arguments + (["--ro-bind", *system.prefix] if system.prefix else [])


def session_arguments(mounts: Mounts, bundle: str) -> list[str]:
    gateway = os.path.dirname(protocol.GATEWAY_SOCKET)
    return [
        "--ro-bind", bundle, BUNDLE, "--ro-bind", mounts.gateway, gateway, "--ro-bind", mounts.agent, protocol.AGENT_DIR,
        "--bind", mounts.home, protocol.HOME_DIR, "--bind", mounts.workspace, protocol.WORKSPACE_DIR, "--chdir", protocol.WORKSPACE_DIR,
    ]  # fmt: skip


def options(system: System, *, session: Sequence[str] = (), tmp_mb: int = 64) -> list[str]:
    """All of bubblewrap's options, in the order in which they have to be carried out."""
    arguments = [*namespace_arguments(), *root_arguments(system, tmp_mb * MIB), *session, "--remount-ro", "/"]
    for name, value in ENVIRONMENT.items():
        arguments += ["--setenv", name, value]
    return arguments


def boot_arguments(python: str, bundle: str, listen_fd: int, orphan_timeout: float) -> list[str]:
    """How the bridge is started, inside or outside bubblewrap."""
    code = f"import sys; sys.path.insert(0, {bundle!r}); from ash.bridge import main; main()"
    return [python, "-I", "-S", "-B", "-c", code, "--listen-fd", str(listen_fd), "--orphan-timeout", f"{orphan_timeout:g}"]


def limit_arguments(prlimit: str, limits: Limits, *, processes: bool) -> list[str]:
    """A `prlimit` in front of the bridge. Set inside the user namespace, where `nproc` counts this sandbox alone."""
    wanted = {
        "core": 0,
        "data": data_limit_mb(limits) * MIB,
        "fsize": limits.max_file_mb * MIB,
        "memlock": 8 * MIB,
        "nofile": 4096,
    }
    if processes:
        wanted["nproc"] = limits.max_processes
    flags = [f"--{name}={_at_most_hard(name, value)}" for name, value in wanted.items()]
    return [prlimit, *flags, "--"]


def data_limit_mb(limits: Limits) -> int:
    return max(limits.memory_mb, MEMORY_FLOOR_MB)


def _at_most_hard(name: str, value: int) -> int:
    hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[1]
    return value if hard == resource.RLIM_INFINITY else min(value, hard)
