"""A session's workspace as the server's callers see it: listed, read, packed into an archive, filled from one.

The agent made what is there: no link is followed, nothing but files and folders is touched, and all sizes have limits. An archive is
unpacked beside the workspace and checked to its end before anything moves in. Everything here blocks.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import stat
import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from ash.beneath import open_beneath, open_file, open_folder, parent_of
from ash.errors import InvalidRequest, NotFound, PayloadTooLarge
from ash.isolation import folders
from ash.isolation.quota import copy_project
from ash.paths import Names, clean_path

MAX_LISTED = 50_000
MAX_DEPTH = 200
MAX_RATIO = 200
"""Most times that an archive may be larger unpacked than packed; text of real projects stays far below."""
_RATIO_FREE = 16 << 20
"""Bytes that any archive may unpack to: what repeats itself packs well."""
_MAX_HEADER = 1 << 20
_PIECE = 1 << 16
_STAGED = ".upload-"
_WHERE = "archive"


class File(NamedTuple):
    path: str
    size: int
    modified_at: float


class Budget(NamedTuple):
    """What one archive may hold."""

    max_bytes: int
    max_files: int


def list_files(session_dir: str, skip: frozenset[str] = frozenset()) -> tuple[list[File], bool]:
    """The files below the workspace by path, without folders named in `skip`; and whether there are more than `MAX_LISTED`."""
    found = []
    with _workspace(session_dir) as root:
        for path, state in _walk(root, skip):
            if stat.S_ISREG(state.st_mode):
                found.append(File(path, state.st_size, state.st_mtime))
                if len(found) > MAX_LISTED:
                    break
    return sorted(found[:MAX_LISTED]), len(found) > MAX_LISTED


def open_workspace_file(session_dir: str, path: str) -> tuple[BinaryIO, int]:
    """A file of the workspace, open for reading, and its size. Raises InvalidRequest, NotFound."""
    path = clean_path(path, "path")
    with _workspace(session_dir) as root:
        try:
            fd = open_file(root, path)
        except OSError as error:
            raise _explain(path, error) from error
    return open(fd, "rb", buffering=0), os.fstat(fd).st_size


def _explain(path: str, error: OSError) -> Exception:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NotFound(f"File not found: {path!r:.200}")
    if error.errno in (errno.ELOOP, errno.EXDEV):
        return InvalidRequest(f"{path!r:.200} is a link or lies behind one; links are not followed")
    if error.errno in (errno.EINVAL, errno.EISDIR, errno.ENXIO):
        return InvalidRequest(f"Path is not a file: {path!r:.200}")
    return InvalidRequest(f"{path!r:.200} cannot be read: {error.strerror}")


@contextlib.contextmanager
def _workspace(session_dir: str) -> Iterator[int]:
    try:
        root = open_folder(os.path.join(session_dir, "workspace"))
    except OSError as error:
        raise NotFound("No workspace available for this session") from error
    try:
        yield root
    finally:
        os.close(root)


def _walk(root: int, skip: frozenset[str] = frozenset()) -> Iterator[tuple[str, os.stat_result]]:
    """Everything below an open folder, folders before what is in them. What cannot be entered is left out."""
    pending = [""]
    while pending:
        prefix = pending.pop()
        with contextlib.suppress(OSError):
            folder = open_beneath(root, prefix or ".", os.O_RDONLY | os.O_DIRECTORY)
            try:
                for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                    with contextlib.suppress(OSError):
                        path, state = f"{prefix}{entry.name}", entry.stat(follow_symlinks=False)
                        is_folder = stat.S_ISDIR(state.st_mode)
                        if is_folder and (entry.name in skip or path.count("/") >= MAX_DEPTH):
                            continue
                        yield path, state
                        if is_folder:
                            pending.append(path + "/")
            finally:
                os.close(folder)


# Out


def pack(session_dir: str, target: BinaryIO, budget: Budget) -> int:
    """Write the workspace as a tar archive, gzipped, with its files and folders; returns their number. Raises PayloadTooLarge."""
    count = total = 0
    with _workspace(session_dir) as root, tarfile.open(fileobj=target, mode="w:gz", compresslevel=6, format=tarfile.PAX_FORMAT) as archive:
        for path, state in _walk(root):
            is_file = stat.S_ISREG(state.st_mode)
            if not (is_file or stat.S_ISDIR(state.st_mode)) or not _is_text(path):
                continue
            count, total = count + 1, total + (state.st_size if is_file else 0)
            _check_budget(count, total, budget, "workspace")
            if is_file:
                _pack_file(archive, root, path)
            else:
                archive.addfile(_member(path, state, tarfile.DIRTYPE))
    return count


def _is_text(path: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in path)


def _member(path: str, state: os.stat_result, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(path)
    member.type, member.mtime = kind, int(state.st_mtime)
    member.mode = 0o755 if kind == tarfile.DIRTYPE or state.st_mode & 0o100 else 0o644
    return member


def _pack_file(archive: tarfile.TarFile, root: int, path: str) -> None:
    """With the size it has when it is opened: what is cut off meanwhile is filled with zeros, as tar has said the size by then."""
    try:
        fd = open_file(root, path)
    except OSError:
        return  # removed, or replaced by a link, since it was listed
    with open(fd, "rb") as file:
        state = os.fstat(fd)
        member = _member(path, state, tarfile.REGTYPE)
        member.size = state.st_size
        archive.addfile(member, _Padded(file, state.st_size))


class _Padded(io.RawIOBase):
    """Exactly `size` bytes, whatever becomes of the file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, size

    def read(self, size: int = -1) -> bytes:
        wanted = self._left if size < 0 else min(size, self._left)
        data = self._file.read(wanted)
        self._left -= wanted
        return data + bytes(wanted - len(data))


# In


def unpack(session_dir: str, source: BinaryIO, budget: Budget) -> int:
    """Put the files of a tar archive, gzipped or not, into the workspace; returns their number. Files of the same name are replaced.

    Raises InvalidRequest for what is no such archive or holds anything but files and folders with usable names, and PayloadTooLarge. Then
    the workspace is as it was.
    """
    with _workspace(session_dir) as root, _staging(session_dir, root) as stage:
        with _inflated(session_dir, source, budget) as file:
            names = _unpack_all(file, stage, budget)
        state = os.fstat(root)
        owner = (state.st_uid, state.st_gid)
        for path in names:
            _check_way(root, path)
        for path, is_file in names.items():
            _move(stage, root, path, owner, is_file=is_file)
    return sum(names.values())


@contextlib.contextmanager
def _staging(session_dir: str, workspace: int) -> Iterator[int]:
    """A fresh folder beside the workspace, which no sandbox sees, on the same quota; removed with what is left in it."""
    path = os.path.join(session_dir, _STAGED + secrets.token_hex(8))
    os.mkdir(path, 0o700)
    try:
        stage = open_folder(path)
        try:
            copy_project(workspace, stage)
            yield stage
        finally:
            os.close(stage)
    finally:
        folders.remove_tree(path)


def remove_staged(session_dir: str) -> None:
    """What an upload left behind when the server was killed."""
    with contextlib.suppress(OSError):
        for name in os.listdir(session_dir):
            if name.startswith(_STAGED):
                folders.remove_tree(os.path.join(session_dir, name))


@contextlib.contextmanager
def _inflated(session_dir: str, source: BinaryIO, budget: Budget) -> Iterator[BinaryIO]:
    """The archive without its compression, in a file without a name."""
    head = source.read(2)
    source.seek(0)
    if head != b"\x1f\x8b":
        yield source
        return
    with open(os.open(session_dir, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600), "w+b") as file:
        _inflate(source, file, budget)
        file.seek(0)
        yield file


def _inflate(source: BinaryIO, target: BinaryIO, budget: Budget) -> None:
    read = written = 0
    most = budget.max_bytes + budget.max_files * 1024 + _RATIO_FREE
    inflater = None
    while piece := source.read(_PIECE):
        read += len(piece)
        while piece:
            inflater = inflater or zlib.decompressobj(wbits=31)  # another gzip member may follow the first
            try:
                data = inflater.decompress(piece, _PIECE)
            except zlib.error as error:
                raise InvalidRequest(f"{_WHERE}: its compression is damaged: {error}") from error
            target.write(data)
            written += len(data)
            _check_inflated(read, written, most)
            piece = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
            inflater = None if inflater.eof else inflater
    while inflater is not None and (data := inflater.decompress(inflater.unconsumed_tail, _PIECE)):
        target.write(data)
        written += len(data)
        _check_inflated(read, written, most)
        inflater = None if inflater.eof else inflater
    if inflater is not None:
        raise InvalidRequest(f"{_WHERE}: it is cut off")


def _check_inflated(read: int, written: int, most: int) -> None:
    if written > most:
        raise PayloadTooLarge(f"{_WHERE}: it unpacks to more than {most >> 20} MiB")
    if written > max(read * MAX_RATIO, _RATIO_FREE):
        raise PayloadTooLarge(f"{_WHERE}: it unpacks to more than {MAX_RATIO} times its size")


class _Bounded(io.RawIOBase):
    """An archive whose headers cannot make anyone read a great part of it at once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise InvalidRequest(f"{_WHERE}: one of its headers is larger than {_MAX_HEADER >> 20} MiB")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _unpack_all(file: BinaryIO, stage: int, budget: Budget) -> dict[str, bool]:
    """Paths in the order of the archive, each with whether it is a file."""
    names, found, total = Names(_WHERE), dict[str, bool](), 0
    try:
        with tarfile.open(fileobj=_Bounded(file), mode="r:", errorlevel=2) as archive:
            while (member := archive.next()) is not None:
                vars(archive)["members"] = []  # it would keep every header
                path = _member_path(member)
                if path is None:
                    continue
                total += member.size
                _check_budget(len(found) + 1, total, budget, _WHERE)
                if member.isdir():
                    names.add_folder(path)
                else:
                    names.add(path)
                found[path] = not member.isdir()
                _unpack_one(archive, member, stage, path)
            _check_end(file, archive.offset)
    except (tarfile.TarError, EOFError, ValueError, OverflowError, UnicodeError) as error:
        raise InvalidRequest(f"{_WHERE}: it is no tar archive that can be read: {error}") from error
    return found


def _member_path(member: tarfile.TarInfo) -> str | None:
    """Where a member belongs; None for the top folder itself. Raises InvalidRequest for what is no file and no folder."""
    if not (member.isdir() or member.isreg()) or member.issparse():
        kind = "a link" if member.issym() or member.islnk() else "neither a file nor a folder"
        raise InvalidRequest(f"{_WHERE}: {member.name!r:.200} is {kind}; leave it out")
    if member.isdir() and member.name.strip("/") in ("", ".") and not member.name.startswith("/"):
        return None
    return clean_path(member.name.rstrip("/") if member.isdir() else member.name, _WHERE)


def _unpack_one(archive: tarfile.TarFile, member: tarfile.TarInfo, stage: int, path: str) -> None:
    owner = (os.geteuid(), os.getegid())
    with parent_of(stage, path, make=owner) as (folder, name):
        if member.isdir():
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=folder)
            return
        mode = 0o755 if member.mode & 0o100 else 0o644
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=folder)
        with open(fd, "wb") as target:
            _copy(archive, member, target)
            os.fchmod(fd, mode)
            os.utime(fd, (member.mtime, member.mtime) if 0 <= member.mtime < 1 << 40 else None)


def _copy(archive: tarfile.TarFile, member: tarfile.TarInfo, target: BinaryIO) -> None:
    source = archive.extractfile(member)
    assert source is not None  # of a regular file
    left = member.size
    while left and (piece := source.read(min(_PIECE, left))):
        target.write(piece)
        left -= len(piece)
    target.flush()
    if left:
        raise InvalidRequest(f"{_WHERE}: it is cut off in {member.name!r:.200}")


def _check_end(file: BinaryIO, offset: int) -> None:
    """tarfile takes a damaged header for the end; the real one is a block of zeros."""
    file.seek(offset)
    block = file.read(512)
    if block.strip(b"\0") or len(block) < 512:
        raise InvalidRequest(f"{_WHERE}: it is cut off or damaged")


def _check_budget(count: int, total: int, budget: Budget, where: str) -> None:
    if budget.max_files and count > budget.max_files:
        raise PayloadTooLarge(f"{where}: more than {budget.max_files} files and folders")
    if total > budget.max_bytes:
        raise PayloadTooLarge(f"{where}: its files take more than {budget.max_bytes >> 20} MiB")


def _check_way(root: int, path: str) -> None:
    """Refuse a path whose way leads through something that is no folder in the workspace."""
    try:
        with parent_of(root, path):
            pass
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InvalidRequest(f"{_WHERE}: {path!r:.200} leads through a link or a file of the workspace") from error


def _move(stage: int, root: int, path: str, owner: tuple[int, int], *, is_file: bool) -> None:
    try:
        with parent_of(root, path, make=owner) as (target, name), parent_of(stage, path) as (source, _):
            if is_file:
                os.chown(name, *owner, dir_fd=source, follow_symlinks=False)
                os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)
                return
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=target)
                os.chown(name, *owner, dir_fd=target, follow_symlinks=False)
    except OSError as error:
        raise InvalidRequest(f"{_WHERE}: {path!r:.200} cannot take its place in the workspace: {error.strerror}") from error
