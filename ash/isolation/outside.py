"""What the operator shows to sandboxes besides the host's own programs: another root file system, and folders and files.

Checks them before any sandbox starts, and finds things in a root file system as a program inside would: a link in it never leads out.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence

from ash.errors import ConfigError
from ash.isolation.records import Mount

_MAX_LINKS = 40
_SYSTEM = ("/proc", "/sys", "/dev", "/run", "/var/run")
"""Folders of the host that lead to its processes, devices and sockets; a read-only mount of a socket can be connected to."""
TAKEN = ("/agent", "/workspace", "/home/agent", "/opt/ash", "/run", "/proc", "/sys", "/dev", "/etc", "/tmp")
"""Places inside that are the sandbox's own."""
_PROGRAMS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")


def is_inside(path: str, folder: str) -> bool:
    """Whether a path is a folder or lies in it."""
    return folder == "/" or path == folder or path.startswith(folder + "/")


def resolve(root: str, path: str) -> str:
    """Where a path of a root file system lies on the host; nowhere ("") for links in a circle."""
    waiting, found, links = path.split("/")[::-1], list[str](), 0
    while waiting:
        part = waiting.pop()
        if part == "..":
            del found[-1:]
        elif part not in ("", "."):
            here = os.path.join(root, *found, part)
            if not os.path.islink(here):
                found.append(part)
                continue
            links += 1
            if links > _MAX_LINKS:
                return ""
            target = os.readlink(here)
            found = [] if target.startswith("/") else found
            waiting += target.split("/")[::-1]
    return os.path.join(root, *found)


def find_program(root: str, name: str, folders: str) -> str | None:
    """The path, as seen inside, of a program of a root file system. `folders` is a search path."""
    for folder in folders.split(":"):
        path = os.path.join(folder, name)
        if is_program(resolve(root, path)):
            return path
    return None


def is_program(path: str) -> bool:
    return os.path.isfile(path) and os.stat(path).st_mode & 0o111 != 0


# The root file system


def check_rootfs(path: str, data_dir: str) -> str:
    """Its real path. Raises ConfigError for a folder that is none, or that shows or trusts more than it should."""
    if not os.path.isabs(path):
        raise ConfigError(f"rootfs {path!r}: give the absolute path of a folder with a root file system")
    real = os.path.realpath(path)
    problem = _find_problem(real, os.path.realpath(data_dir))
    if problem:
        raise ConfigError(f"rootfs {path}: {problem}")
    return real


def _find_problem(root: str, data_dir: str) -> str:
    if not os.path.isdir(root):
        return "there is no such folder"
    if root == "/":
        return "that is this machine's own; leave the setting out to show agents its /usr"
    if is_inside(root, data_dir) or is_inside(data_dir, root):
        return f"it shares files with the data folder {data_dir}, which holds keys and sessions; move it elsewhere"
    if any(is_inside(root, folder) for folder in _SYSTEM):
        return "it lies in a folder of the kernel's or of running programs; move it elsewhere"
    usr = os.path.join(root, "usr")
    if not os.path.isdir(usr) or os.path.islink(usr):
        return "it has no folder usr/; give the top folder of an unpacked system, such as debootstrap makes"
    for folder in (root, usr):
        if found := _find_stranger(folder):
            return found
    if not is_program(resolve(root, "/bin/sh")):
        return "it has no /bin/sh, which agents run their commands with"
    return ""


def _find_stranger(folder: str) -> str:
    """Whoever may write there decides what every agent runs."""
    status = os.stat(folder)
    if status.st_mode & 0o022:
        return f"others may write to {folder}; run `chmod go-w {folder}`"
    if status.st_uid not in (0, os.geteuid()):
        return f"{folder} belongs to another user (uid {status.st_uid}); run `chown root {folder}`"
    return ""


# Mounts


def check_mounts(mounts: Iterable[Mount], data_dir: str) -> tuple[Mount, ...]:
    """The mounts with their real sources. Raises ConfigError that names the one that cannot be, and why."""
    found: list[Mount] = []
    for mount in mounts:
        source = os.path.realpath(mount.source)
        problem = _find_bad_source(mount.source, source, os.path.realpath(data_dir)) or _find_bad_target(mount.target, found)
        if problem:
            raise ConfigError(f"the mount of {mount.source} at {mount.target}: {problem}")
        found.append(Mount(source, mount.target))
    return tuple(found)


def _find_bad_source(given: str, source: str, data_dir: str) -> str:
    if not os.path.isabs(given):
        return "give the absolute path of its source"
    if not os.path.lexists(source):
        return "its source does not exist"
    mode = os.stat(source).st_mode
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        return "its source is neither a folder nor a file"
    if is_inside(source, data_dir) or is_inside(data_dir, source):
        return f"its source shares files with the data folder {data_dir}, which holds keys and sessions"
    if source == "/" or any(is_inside(source, folder) for folder in _SYSTEM):
        return "its source would show this machine's processes, devices and sockets"
    return ""


def _find_bad_target(target: str, earlier: Sequence[Mount]) -> str:
    if not target.startswith("/") or os.path.normpath(target) != target or target == "/" or target.startswith("//"):
        return "its target must be a plain absolute path below /, without `..` and without a / at its end"
    for place in (*TAKEN, *_PROGRAMS):
        if is_inside(target, place) or is_inside(place, target):
            return f"its target meets {place}, which is the sandbox's own; choose a place such as /data or /opt/NAME"
    for other in earlier:
        if is_inside(target, other.target) or is_inside(other.target, target):
            return f"its target meets that of {other.source}"
    return ""
