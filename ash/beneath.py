"""Opening what lies below a folder whose content somebody hostile made: no link is followed, no way leads out.

The kernel does it in one step where it can (`openat2`, Linux 5.6); else each step is taken by a descriptor of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import stat
import struct
from collections.abc import Iterator

_OPENAT2 = 437
"""The system call's number, the same for all architectures."""
_HOW = struct.Struct("=QQQ")
"""struct open_how: flags, mode, resolve."""
_RESOLVE = 0x01 | 0x02 | 0x04 | 0x08
"""RESOLVE_NO_XDEV, NO_MAGICLINKS, NO_SYMLINKS and BENEATH (openat2(2))."""
_AGAIN = 8
"""Tries while somebody renames folders on the way: the kernel then says EAGAIN."""
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_folder(path: str, *, at: int | None = None) -> int:
    """A folder that is not a link. Raises OSError."""
    return os.open(path, _FOLDER, dir_fd=at)


def open_file(folder: int, path: str) -> int:
    """A regular file below the open folder, for reading. Raises OSError: ELOOP or EXDEV for a way through a link, EINVAL for no file.

    Opening neither waits for the other end of a FIFO nor does anything to a device.
    """
    # A lease that its owner holds on the file would make the server wait, too; so it is an error: EAGAIN.
    fd = open_beneath(folder, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file")
    return fd


def open_beneath(folder: int, path: str, flags: int, mode: int = 0) -> int:
    """`path` relative to the open folder. Raises OSError."""
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC
    return _open_at_once(folder, path, flags, mode) if has_openat2() else _open_by_steps(folder, path, flags, mode)


@functools.cache
def has_openat2() -> bool:
    """Whether the kernel, and what filters our calls to it, has `openat2`; found out by using it."""
    root = os.open("/", _FOLDER)
    try:
        os.close(_open_at_once(root, ".", _FOLDER, 0))
    except OSError:
        return False
    finally:
        os.close(root)
    return True


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _open_at_once(folder: int, path: str, flags: int, mode: int) -> int:
    how = _HOW.pack(flags, mode if flags & os.O_CREAT else 0, _RESOLVE)
    name = os.fsencode(path)
    if b"\0" in name:
        raise ValueError("embedded null byte")
    code = 0
    for _ in range(_AGAIN):
        fd: int = _libc().syscall(ctypes.c_long(_OPENAT2), ctypes.c_int(folder), ctypes.c_char_p(name), how, ctypes.c_size_t(len(how)))
        code = ctypes.get_errno()
        if fd >= 0:
            return fd
        if code not in (errno.EAGAIN, errno.EINTR):
            break
    raise OSError(code, os.strerror(code), path)


def _open_by_steps(folder: int, path: str, flags: int, mode: int) -> int:
    steps = [step for step in path.split("/") if step not in ("", ".")]
    if path.startswith("/") or ".." in steps:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
    device, current = os.fstat(folder).st_dev, os.dup(folder)
    try:
        for step in steps[:-1]:
            inner = open_folder(step, at=current)
            os.close(current)
            current = inner
            if os.fstat(current).st_dev != device:
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
        found = os.open(steps[-1] if steps else ".", flags, mode, dir_fd=current)
    finally:
        os.close(current)
    if os.fstat(found).st_dev != device:
        os.close(found)
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
    return found


@contextlib.contextmanager
def parent_of(folder: int, path: str, *, make: tuple[int, int] | None = None) -> Iterator[tuple[int, str]]:
    """The open folder that holds `path`, and its last name. With `make` (uid and gid) missing folders are made. Raises OSError."""
    *steps, name = path.split("/")
    current = os.dup(folder)
    try:
        for step in steps:
            inner = _enter_or_make(current, step, make)
            os.close(current)
            current = inner
        yield current, name
    finally:
        os.close(current)


def _enter_or_make(folder: int, name: str, make: tuple[int, int] | None) -> int:
    try:
        return open_folder(name, at=folder)
    except FileNotFoundError:
        if make is None:
            raise
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o755, dir_fd=folder)
        os.chown(name, *make, dir_fd=folder, follow_symlinks=False)
    return open_folder(name, at=folder)
