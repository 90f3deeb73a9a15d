"""The kernel's own disk quota, by project id: found where the data folder's file system is mounted with it, set, and read.

ext4 and XFS count and refuse by the id that a folder hands down to what is made in it (ioctl_xfs_fsgetxattr(2), quotactl(2)). A process
in a sandbox cannot change the id: the kernel allows that in the host's user namespace alone. Every call here blocks, shortly.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from typing import NamedTuple

_QUOTACTL_FD = 443
"""The system call's number since Linux 5.14, one for all architectures."""
_PROJECT = 2
_GET, _SET = 0x800007 << 8 | _PROJECT, 0x800008 << 8 | _PROJECT
_VALID_LIMITS = 1 | 4
_DQBLK = struct.Struct("=8QI4x")
"""struct if_dqblk: hard and soft block limit in KiB, bytes in use, hard and soft inode limit, inodes in use, two times, what is valid."""
_GET_ATTRIBUTES, _SET_ATTRIBUTES = 0x801C581F, 0x401C5820
_FSXATTR = struct.Struct("=5I8x")
_INHERIT = 0x200
"""FS_XFLAG_PROJINHERIT: what is made in the folder gets its project id."""
_FILE_SYSTEMS = ("ext4", "xfs", "f2fs")


class DiskUse(NamedTuple):
    """Bytes as the disk holds them, and the number of files, folders and links."""

    bytes: int
    files: int


class QuotaUnavailable(Exception):
    """The kernel does not hold quotas here; the text says why."""


class ProjectQuota:
    """Project quota on the file system of an open folder."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def limit(self, id: int, disk_mb: int, max_files: int) -> None:
        """The limits of project `id`; 0 sets none. Raises OSError."""
        self._control(_SET, id, _DQBLK.pack(disk_mb * 1024, 0, 0, max_files, 0, 0, 0, 0, _VALID_LIMITS))

    def use(self, id: int) -> DiskUse:
        """What the project holds. Raises OSError."""
        values = _DQBLK.unpack(self._control(_GET, id, bytes(_DQBLK.size)))
        return DiskUse(values[2], values[5])

    def _control(self, command: int, id: int, content: bytes) -> bytes:
        libc = ctypes.CDLL(None, use_errno=True)
        buffer = ctypes.create_string_buffer(content, _DQBLK.size)
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            arguments = (ctypes.c_long(_QUOTACTL_FD), ctypes.c_uint(fd), ctypes.c_uint(command), ctypes.c_uint(id), buffer)
            if libc.syscall(*arguments) < 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), self._folder)
        finally:
            os.close(fd)
        return buffer.raw


def set_project(fd: int, id: int, *, is_folder: bool = True) -> bool:
    """The project id of an open file or folder; False when it has it already. Raises OSError."""
    flags, extent, extents, old, cow = _FSXATTR.unpack(fcntl.ioctl(fd, _GET_ATTRIBUTES, bytes(_FSXATTR.size)))
    wanted = flags | _INHERIT if is_folder else flags
    if (old, flags) == (id, wanted):
        return False
    fcntl.ioctl(fd, _SET_ATTRIBUTES, _FSXATTR.pack(wanted, extent, extents, id, cow))
    return True


def copy_project(source: int, target: int) -> None:
    """Give one open folder the project id of another, so that files may move between them; nothing where there are none."""
    with contextlib.suppress(OSError):
        flags, _, _, id, _ = _FSXATTR.unpack(fcntl.ioctl(source, _GET_ATTRIBUTES, bytes(_FSXATTR.size)))
        if flags & _INHERIT:
            set_project(target, id)


def find_project_quota(folder: str, mountinfo: str | None = None) -> ProjectQuota:
    """The project quota that holds for `folder`, tried by reading one. Raises QuotaUnavailable with what to do."""
    kind, options, place = find_file_system(folder, mountinfo)
    if kind not in _FILE_SYSTEMS:
        raise QuotaUnavailable(f"{kind or 'this file system'} has no project quota; ext4 and XFS do, mounted with the option prjquota")
    if not options & {"prjquota", "pquota"}:
        how = f"`mount -o remount,prjquota {place}`" if kind != "ext4" else f"`tune2fs -O project,quota` while {place} is not mounted, then"
        raise QuotaUnavailable(f"{kind} at {place} is mounted without project quota; to have it: {how} the mount option prjquota")
    if os.geteuid() != 0:
        raise QuotaUnavailable("only root may set project quotas")
    quota = ProjectQuota(folder)
    try:
        quota.use(1)
    except OSError as error:
        # No entry is no use so far: XFS says so for an id that was never used.
        if error.errno not in (errno.ENOENT, errno.ESRCH):
            raise QuotaUnavailable(f"the kernel does not answer for project quotas at {place}: {error.strerror}") from error
    return quota


def find_file_system(folder: str, mountinfo: str | None = None) -> tuple[str, set[str], str]:
    """Kind, options and mount point of the file system that `folder` is on, from /proc/self/mountinfo."""
    if mountinfo is None:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
            mountinfo = file.read()
    path, best = os.path.realpath(folder), ("", set[str](), "")
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        place, kind = before.split()[4].replace("\\040", " "), after.split()
        if (path + "/").startswith(place.rstrip("/") + "/") and len(place) >= len(best[2]):
            best = (kind[0], set(kind[2].split(",")) | set(before.split()[5].split(",")), place)
    return best
