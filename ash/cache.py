"""The folder that ash.pyz unpacks its third-party packages into: where it is, what is in it, and removing what is old.

It never unpacks (the bootstrap inside ash.pyz does) and never removes what a running process uses. One folder per group of
packages, interpreter and content: `<group>-<interpreter>-<digest>`, with a `manifest` of digests that is locked while in use.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from ash.config import client_environ

MANIFEST = "manifest"
UNFINISHED = ".unfinished-"
"""Folders with this prefix are being written, or were when their process was killed."""
_NAME = re.compile(re.escape(UNFINISHED) + r".+|[a-z]+-cp\d+t?-[\w-]+-[0-9a-f]{16}")


class Unpacked(NamedTuple):
    """One folder of the cache. `is_current`: this very ash.pyz would use it."""

    path: str
    size_bytes: int
    is_current: bool
    is_used: bool


def running_file() -> str | None:
    """Absolute path of the ash.pyz that this process runs from; None in a checkout or an ordinary installation."""
    module = sys.modules.get("_ash") or sys.modules["ash"]  # the first is only there when the file was started, not just imported
    archive = getattr(module.__spec__ and module.__spec__.loader, "archive", None)
    return os.path.abspath(archive) if archive else None


def candidates() -> list[str]:
    """Folders for unpacked files, best first: ASH_CACHE_DIR, XDG_CACHE_HOME/ash or ~/.cache/ash, then one below the temporary folder."""
    return [*_chosen(), _below_temp()]


def _chosen() -> Iterator[str]:
    explicit = client_environ("ASH_CACHE_DIR")
    if explicit:
        yield os.path.abspath(os.path.expanduser(explicit))
        return
    base = client_environ("XDG_CACHE_HOME") or ""
    base = base if os.path.isabs(base) else os.path.expanduser("~/.cache")
    if os.path.isabs(base):  # `~` stays as it is for a user without a home
        yield os.path.join(base, "ash")


def _below_temp() -> str:
    import tempfile

    return os.path.join(tempfile.gettempdir(), f"ash-{os.geteuid()}")


def check_owner(root: str) -> None:
    """Raise PermissionError unless only this user (or root) can change what is in `root`; code is loaded from there."""
    about = os.lstat(root) if root == _below_temp() else os.stat(root)
    if not stat.S_ISDIR(about.st_mode):
        raise PermissionError(f"{root} is not a folder")
    if about.st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"{root} belongs to another user (uid {about.st_uid})")
    if about.st_mode & 0o022:
        raise PermissionError(f"{root} can be written by other users (mode {stat.S_IMODE(about.st_mode):o})")


def create_root(root: str) -> None:
    """Create `root` for this user alone; raises OSError when it cannot be written or is not safe."""
    os.makedirs(os.path.dirname(root), exist_ok=True)
    with suppress(FileExistsError):
        os.mkdir(root, 0o700)
    check_owner(root)
    if not os.access(root, os.W_OK | os.X_OK):
        raise PermissionError(f"{root} is not writable")


def is_noexec(root: str) -> bool:
    """Whether compiled modules cannot be loaded from `root`, because its file system is mounted so."""
    return bool(os.statvfs(root).f_flag & os.ST_NOEXEC)


@contextmanager
def locked(root: str) -> Iterator[None]:
    """One process at a time changes `root`. Where locks do not work, unpacking is still safe: it ends in one rename."""
    fd = os.open(os.path.join(root, ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def hold(folder: str) -> int | None:
    """Mark `folder` as used until the process ends, by a shared lock on the descriptor returned; None: it is gone."""
    path = os.path.join(folder, MANIFEST)
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:  # somebody removes it right now
        os.close(fd)
        return None
    except OSError:
        return fd
    try:
        if os.path.samestat(os.fstat(fd), os.stat(path)):
            return fd
    except OSError:
        pass
    os.close(fd)
    return None


def remove(folder: str) -> None:
    """Take `folder` away in one step, then delete it."""
    doomed = os.path.join(os.path.dirname(folder), f"{UNFINISHED}old-{os.getpid()}-{os.path.basename(folder)}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def describe() -> list[Unpacked]:
    """Everything unpacked for this user, by path."""
    return [_describe(path) for root in _own_roots() for path in _folders(root)]


def prune() -> list[Unpacked]:
    """Remove what belongs to other builds and what killed processes left, unless it is in use; returns what was removed."""
    removed = []
    for root in _own_roots():
        with locked(root):
            for found in [_describe(path) for path in _folders(root)]:
                with _unused(found.path) as is_unused:
                    if is_unused and not found.is_current:
                        remove(found.path)
                        removed.append(found)
    return removed


def _own_roots() -> Iterator[str]:
    for root in candidates():
        try:
            check_owner(root)
        except OSError:
            continue
        if os.access(root, os.W_OK):
            yield root


def _folders(root: str) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(entry.path for entry in entries if _NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False))


def _describe(path: str) -> Unpacked:
    sizes = [os.lstat(os.path.join(folder, file)).st_size for folder, _, files in os.walk(path) for file in files]
    with _unused(path) as is_unused:
        return Unpacked(path, sum(sizes), path.rpartition("-")[2] in _current_digests(), not is_unused)


def _current_digests() -> set[str]:
    table = sys.modules.get("_ash.table")
    return {about["digest"] for about in table.GROUPS.values()} if table else set()


@contextmanager
def _unused(path: str) -> Iterator[bool]:
    """Whether no process uses `path`; if so, none can begin to until the block ends."""
    try:
        fd = os.open(os.path.join(path, MANIFEST), os.O_RDONLY)
    except OSError:
        yield True
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(fd)
