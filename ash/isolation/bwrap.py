"""The command that puts the bridge into bubblewrap, as pure functions: what is mounted, what is unshared, what it may use.

Deny by default: the new root is an empty tmpfs and shows only what stands here. Never holds a secret; arguments are public.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from typing import NamedTuple

from ash import protocol
from ash.isolation.outside import resolve
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
_OWN_NAMES = {"agent", "boot", "dev", "etc", "home", "lost+found", "media", "mnt", "opt", "proc", "root", "run", "sys", "tmp", "workspace"}
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
    etc_folders: tuple[tuple[str, str], ...]
    """Sources, and their names below /etc."""
    prefix: tuple[str, str] | None
    """Source and place inside of an interpreter that is not under /usr."""
    mounts: tuple[tuple[str, str], ...] = ()
    """Sources and places inside of what the operator shows."""


def usr_arguments(root: str = "/") -> tuple[str, ...]:
    """/usr, and the folders that a merged-/usr system links into it, or holds itself when it is not merged."""
    return (*_show(root, "usr", root), *(word for name in _USR_NAMES for word in _show(root, name, root)))


def rootfs_arguments(root: str, source: str) -> tuple[str, ...]:
    """All of a root file system but the places that a sandbox has of its own. `source` is where a sandbox's uid reaches `root`."""
    names = sorted(set(os.listdir(root)) - _OWN_NAMES)
    opt = os.path.join(root, "opt")
    inner = sorted(set(os.listdir(opt)) - {"ash"}) if os.path.isdir(opt) and not os.path.islink(opt) else []
    return tuple(word for name in (*names, *(f"opt/{name}" for name in inner)) for word in _show(root, name, source))


def _show(root: str, name: str, source: str) -> list[str]:
    path = os.path.join(root, name)
    if os.path.islink(path):
        return ["--symlink", os.readlink(path), f"/{name}"]
    return ["--ro-bind", os.path.join(source, name), f"/{name}"] if os.path.isdir(path) else []


def etc_folders(root: str = "/") -> tuple[tuple[str, str], ...]:
    """Folders of an /etc that hold nothing private and that programs need: where they lie, and their names below /etc."""
    found = ((resolve(root, f"/etc/{name}"), name) for name in _ETC_FOLDERS)
    return tuple((path, name) for path, name in found if os.path.isdir(path))


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
    for source, name in system.etc_folders:
        arguments += ["--ro-bind", source, f"/etc/{name}"]
    for shown in (*([system.prefix] if system.prefix else []), *system.mounts):
        arguments += ["--ro-bind", *shown]
    return arguments


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
