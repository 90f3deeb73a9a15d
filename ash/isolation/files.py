"""A session's workspace as the server's callers see it: listed, read, packed into an archive, filled from one.

The agent made what is there: no link is followed, nothing but files and folders is touched, and all sizes have limits. An archive is
unpacked where no sandbox sees it and checked to its end before anything moves in. Everything here blocks.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from ash.beneath import open_beneath, open_file, open_folder, parent_of
from ash.errors import AshError, CapacityReached, Conflict, InvalidRequest, NotFound, PayloadTooLarge
from ash.isolation import folders
from ash.isolation.disk import measure
from ash.isolation.quota import copy_project
from ash.paths import Names, clean_path, find_way_out

MAX_LISTED = 20_000
MAX_LISTED_BYTES = 4 << 20
"""Of paths, all together: each may have 4 KiB."""
MAX_LOOKED = 200_000
"""Entries of folders that a listing looks at; what comes behind them is cut off."""
MAX_MEMBERS = 500_000
"""Files and folders of one archive, out and in: their names are in memory."""
MAX_NAMES_BYTES = 64 << 20
MAX_DEPTH = 200
MAX_RATIO = 200
"""Most times that an archive may be larger unpacked than packed; text of real projects stays far below."""
UPLOADS = ".uploads"
"""The folder beside those of the sessions in which archives are unpacked."""
_RATIO_FREE = 16 << 20
"""Bytes that any archive may unpack to: what repeats itself packs well."""
_MAX_HEADER = 256 << 10
_MAX_GZIP_MEMBERS = 10_000
_BLOCK = 4096
"""What a file takes on a disk at least, and what its size is rounded up to there."""
_LATEST = 253_402_300_799.0
"""The last second of the year 9999: agents set times as they like, and later ones have no name."""
_PIECE = 1 << 16
_WHERE = "archive"


class File(NamedTuple):
    path: str
    size: int
    modified_at: float


class Budget(NamedTuple):
    """What one archive may hold, and what the session's disk may: 0 is no limit."""

    max_bytes: int
    disk_bytes: int = 0
    disk_files: int = 0


def list_files(session_dir: str, skip: frozenset[str] = frozenset()) -> tuple[list[File], bool]:
    """The files below the workspace by path, without folders named in `skip`; and whether there are more than are shown."""
    found, looked, size = list[File](), 0, 0
    with _workspace(session_dir) as root:
        for path, state in _walk(root, skip):
            looked, size = looked + 1, size + len(path)
            if looked > MAX_LOOKED or len(found) >= MAX_LISTED or size > MAX_LISTED_BYTES:
                return sorted(found), True
            if stat.S_ISREG(state.st_mode):
                found.append(File(path, state.st_size, min(max(state.st_mtime, 0.0), _LATEST)))
    return sorted(found), False


def open_workspace_file(session_dir: str, path: str) -> tuple[BinaryIO, os.stat_result]:
    """A file of the workspace, open for reading, and its state. Raises InvalidRequest, NotFound."""
    if problem := find_way_out(path):
        raise InvalidRequest(f"Invalid file path: {path!r:.200} {problem}")
    with _workspace(session_dir) as root:
        try:
            fd = open_file(root, path)
        except OSError as error:
            raise _explain(path, error) from error
    return open(fd, "rb", buffering=0), os.fstat(fd)


def _explain(path: str, error: OSError) -> AshError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
        return NotFound(f"File not found: {path!r:.200}")
    if error.errno in (errno.ELOOP, errno.EXDEV):
        return InvalidRequest(f"{path!r:.200} is a link or lies behind one; links are not followed")
    if error.errno in (errno.EINVAL, errno.EISDIR, errno.ENXIO):
        return InvalidRequest(f"Path is not a file: {path!r:.200}")
    if error.errno == errno.EAGAIN:
        return Conflict(f"{path!r:.200} is being changed; try again in a moment")
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
    """Everything below an open folder, folders before what is in them. Left out: what cannot be entered and what has no name in Unicode.

    A folder is read as it is walked, never held: it may have millions of entries. Of folders that wait only the paths are kept, and
    `PayloadTooLarge` says when even they are too many.
    """
    pending, waiting = [""], 0
    while pending:
        prefix = pending.pop()
        waiting -= len(prefix)
        for name, state in _entries(root, prefix):
            path, is_folder = f"{prefix}{name}", stat.S_ISDIR(state.st_mode)
            if not _is_text(name) or (is_folder and (name in skip or path.count("/") >= MAX_DEPTH)):
                continue
            yield path, state
            if is_folder:
                pending.append(path + "/")
                waiting += len(path) + 1
                if waiting > MAX_NAMES_BYTES:
                    raise PayloadTooLarge("workspace: it has too many folders with long paths")


def _entries(root: int, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
    try:
        folder = open_beneath(root, prefix or ".", os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    yield entry.name, entry.stat(follow_symlinks=False)
    except OSError:
        return
    finally:
        os.close(folder)


def _is_text(name: str) -> bool:
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


# Out


def pack(session_dir: str, target: BinaryIO, budget: Budget) -> int:
    """Write the workspace as a tar archive, gzipped, with its files and folders; returns their number. Raises PayloadTooLarge."""
    count = total = 0
    with _workspace(session_dir) as root, _writing(target) as archive:
        for path, state in _walk(root):
            if stat.S_ISREG(state.st_mode):
                total += _pack_file(archive, root, path, budget.max_bytes - total)
            elif stat.S_ISDIR(state.st_mode):
                archive.addfile(_member(path, state, tarfile.DIRTYPE))
            else:
                continue
            count += 1
            if count > MAX_MEMBERS:
                raise PayloadTooLarge(f"workspace: it has more than {MAX_MEMBERS} files and folders")
            vars(archive)["members"] = []  # it would keep every header
    return count


def _writing(target: BinaryIO) -> tarfile.TarFile:
    return tarfile.open(fileobj=target, mode="w:gz", compresslevel=6, format=tarfile.PAX_FORMAT, encoding="utf-8")


def _member(path: str, state: os.stat_result, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(path)
    member.type, member.mtime = kind, int(state.st_mtime)
    member.mode = 0o755 if kind == tarfile.DIRTYPE or state.st_mode & 0o100 else 0o644
    return member


def _pack_file(archive: tarfile.TarFile, root: int, path: str, most: int) -> int:
    """Its size. That is what it has when it is opened: what is cut off meanwhile is filled with zeros, as tar has said the size by then."""
    try:
        fd = open_file(root, path)
    except OSError:
        return 0  # removed, replaced by a link, or shut against us since it was listed
    with open(fd, "rb") as file:
        state = os.fstat(fd)
        if state.st_size > most:
            raise PayloadTooLarge("workspace: its files take more than one archive may hold (max_workspace_mb)")
        member = _member(path, state, tarfile.REGTYPE)
        member.size = state.st_size
        archive.addfile(member, _Padded(file, state.st_size))
        return state.st_size


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

    Raises InvalidRequest for what is no such archive or holds anything but files and folders with usable names, PayloadTooLarge,
    CapacityReached when the server's disk is full, and Conflict when the agent makes it impossible just then. But for that last case,
    the workspace is as it was after an error.
    """
    with _workspace(session_dir) as root, _storing(), _staging(session_dir, root) as (stage, path):
        room = _find_room(session_dir, budget)
        with _inflated(path, source, room) as file:
            names = _unpack_all(file, stage, room)
        for name, is_file in names.items():
            _check_way(root, name, is_file=is_file)
        for name, is_file in names.items():
            _move(stage, root, name, is_file=is_file)
    return sum(names.values())


class _Room(NamedTuple):
    bytes: int
    files: int
    whose: str
    """What to say when the bytes do not do."""


def _find_room(session_dir: str, budget: Budget) -> _Room:
    """What may come in. Measured here, since the server itself is above the kernel's quotas and nobody watches a session that sleeps."""
    room = _Room(budget.max_bytes, MAX_MEMBERS, "one archive may hold (max_workspace_mb)")
    if not (budget.disk_bytes or budget.disk_files):
        return room
    try:
        used = measure(session_dir)
    except OSError as error:
        raise Conflict("The workspace's folders are being moved about; try again in a moment") from error
    if budget.disk_bytes and budget.disk_bytes - used.bytes < room.bytes:
        room = room._replace(bytes=max(0, budget.disk_bytes - used.bytes), whose="the session's disk has left (diskMb)")
    return room._replace(files=min(room.files, max(0, budget.disk_files - used.files))) if budget.disk_files else room


@contextlib.contextmanager
def _storing() -> Iterator[None]:
    """Translates what the disk says."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EDQUOT:
            raise PayloadTooLarge(f"{_WHERE}: its files are more than the session's disk has left (diskMb, maxFiles)") from error
        if error.errno == errno.ENOSPC:
            raise CapacityReached(f"{_WHERE}: the server's disk is full; try again when there is room") from error
        raise


@contextlib.contextmanager
def _staging(session_dir: str, workspace: int) -> Iterator[tuple[int, str]]:
    """A fresh folder on the workspace's own quota, open, and its path; removed with what is left in it."""
    path = os.path.join(os.path.dirname(session_dir), UPLOADS, secrets.token_hex(8))
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    os.mkdir(path, 0o700)
    try:
        stage = open_folder(path)
        try:
            copy_project(workspace, stage)
            yield stage, path
        finally:
            os.close(stage)
    finally:
        folders.remove_tree(path)


def remove_staged(sessions: str) -> None:
    """What uploads left behind when the server was killed."""
    folders.remove_tree(os.path.join(sessions, UPLOADS))


@contextlib.contextmanager
def _inflated(folder: str, source: BinaryIO, room: _Room) -> Iterator[BinaryIO]:
    """The archive without its compression, in a file without a name."""
    head = source.read(2)
    source.seek(0)
    if head != b"\x1f\x8b":
        yield source
        return
    with tempfile.TemporaryFile(dir=folder) as file:
        _inflate(source, file, room.bytes + room.files * 1024 + _RATIO_FREE)
        file.seek(0)
        yield file


class _Gunzip:
    """Takes a gzip file piece by piece, be it of one member or of several, and gives what was packed, never much at once."""

    def __init__(self) -> None:
        self._member: zlib._Decompress | None = None
        self._count = 0

    def feed(self, piece: bytes) -> Iterator[bytes]:
        while piece:
            if self._member is None:
                self._begin()
            assert self._member is not None
            yield self._decompress(piece)
            piece = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            self._member = None if self._member.eof else self._member

    def rest(self) -> Iterator[bytes]:
        """What is still to come at the end. Raises InvalidRequest when that is not the end of a member."""
        while self._member is not None and (data := self._decompress(b"")):
            yield data
            self._member = None if self._member.eof else self._member
        if self._member is not None:
            raise InvalidRequest(f"{_WHERE}: it is cut off")

    def _begin(self) -> None:
        self._member, self._count = zlib.decompressobj(wbits=31), self._count + 1
        if self._count > _MAX_GZIP_MEMBERS:
            raise InvalidRequest(f"{_WHERE}: it is made of more than {_MAX_GZIP_MEMBERS} gzip files in a row; pack it in one")

    def _decompress(self, piece: bytes) -> bytes:
        assert self._member is not None
        try:
            return self._member.decompress(piece, _PIECE)
        except zlib.error as error:
            raise InvalidRequest(f"{_WHERE}: its compression is damaged: {error}") from error


def _inflate(source: BinaryIO, target: BinaryIO, most: int) -> None:
    gunzip, read, written = _Gunzip(), 0, 0
    while piece := source.read(_PIECE):
        read += len(piece)
        for data in gunzip.feed(piece):
            written += target.write(data)
            _check_inflated(read, written, most)
    for data in gunzip.rest():
        written += target.write(data)
        _check_inflated(read, written, most)


def _check_inflated(read: int, written: int, most: int) -> None:
    if written > most:
        raise PayloadTooLarge(f"{_WHERE}: it unpacks to more than {most >> 20} MiB")
    if written > max(read * MAX_RATIO, _RATIO_FREE):
        raise PayloadTooLarge(f"{_WHERE}: it unpacks to more than {MAX_RATIO} times its size")


class _Headers(io.RawIOBase):
    """An archive as tarfile may read it: its headers, of which one member has a limited number of bytes, whatever they say."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, _MAX_HEADER

    def begin_member(self) -> None:
        self._left = _MAX_HEADER

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self._left:
            raise InvalidRequest(f"{_WHERE}: the headers of one of its files are larger than {_MAX_HEADER >> 10} KiB, or damaged")
        self._left -= size
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _unpack_all(file: BinaryIO, stage: int, room: _Room) -> dict[str, bool]:
    """Paths in the order of the archive, each with whether it is a file."""
    names, found, total, size = Names(_WHERE), dict[str, bool](), 0, 0
    for member in _members(file):
        path = _member_path(member)
        if path is None:
            continue
        if member.isdir():
            names.add_folder(path)
        else:
            names.add(path)
        found[path] = not member.isdir()
        total, size = total + -(-member.size // _BLOCK) * _BLOCK, size + len(path)
        _check_room(names.count, size, total + (names.count - len(found)) * _BLOCK, room)
        _unpack_one(file, member, stage, path)
    return found


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The archive's members up to its end. Raises InvalidRequest for one that has none."""
    headers, end = _Headers(file), 0
    try:
        with tarfile.open(fileobj=headers, mode="r:", errorlevel=2, encoding="utf-8") as archive:
            while (member := archive.next()) is not None:
                if member.size < 0 or archive.offset <= end:
                    raise InvalidRequest(f"{_WHERE}: {member.name!r:.200} has an impossible size")
                end = archive.offset
                yield member
                headers.begin_member()
                vars(archive)["members"] = []  # it would keep every header
                vars(archive)["pax_headers"] = {}  # those for all that follow
            _check_end(file, archive.offset)
    except (tarfile.TarError, EOFError, ValueError, OverflowError, UnicodeError, RecursionError) as error:
        raise InvalidRequest(f"{_WHERE}: it is no tar archive that can be read: {error}") from error


def _member_path(member: tarfile.TarInfo) -> str | None:
    """Where a member belongs; None for the top folder itself. Raises InvalidRequest for what is no file and no folder."""
    if not (member.isdir() or member.isreg()) or member.issparse():
        kind = "a link" if member.issym() or member.islnk() else "neither a file nor a folder"
        raise InvalidRequest(f"{_WHERE}: {member.name!r:.200} is {kind}; leave it out")
    if member.isdir() and member.name.strip("/") in ("", ".") and not member.name.startswith("/"):
        return None
    return clean_path(member.name.rstrip("/") if member.isdir() else member.name, _WHERE)


def _unpack_one(file: BinaryIO, member: tarfile.TarInfo, stage: int, path: str) -> None:
    owner = (os.geteuid(), os.getegid())
    with parent_of(stage, path, make=owner) as (folder, name):
        if member.isdir():
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=folder)
            return
        mode = 0o755 if member.mode & 0o100 else 0o644
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=folder)
        with open(fd, "wb") as target:
            _copy(file, member, target)
            os.fchmod(fd, mode)
            os.utime(fd, (member.mtime, member.mtime) if 0 <= member.mtime <= _LATEST else None)


def _copy(file: BinaryIO, member: tarfile.TarInfo, target: BinaryIO) -> None:
    file.seek(member.offset_data)
    left = member.size
    while left and (piece := file.read(min(_PIECE, left))):
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


def _check_room(count: int, names_bytes: int, total: int, room: _Room) -> None:
    if count > room.files or names_bytes > MAX_NAMES_BYTES:
        raise PayloadTooLarge(f"{_WHERE}: more than {room.files} files and folders, or too long names; send it in parts")
    if total > room.bytes:
        raise PayloadTooLarge(f"{_WHERE}: its files take more than {room.bytes >> 20} MiB, which is what {room.whose}")


def _check_way(root: int, path: str, *, is_file: bool) -> None:
    """Refuse a path whose way leads through something that is no folder in the workspace, or that is taken by another kind of thing."""
    try:
        with parent_of(root, path) as (folder, name):
            is_taken = stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode) == is_file
    except FileNotFoundError:
        return
    except OSError as error:
        raise InvalidRequest(f"{_WHERE}: {path!r:.200} leads through a link or a file of the workspace") from error
    if is_taken:
        raise InvalidRequest(
            f"{_WHERE}: {path!r:.200} is {'a folder' if is_file else 'a file or a link'} in the workspace; remove it first"
        )


def _move(stage: int, root: int, path: str, *, is_file: bool) -> None:
    state = os.fstat(root)  # each time: a session that wakes up meanwhile may get another uid
    owner = (state.st_uid, state.st_gid)
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
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Conflict(f"{_WHERE}: {path!r:.200} cannot take its place in the workspace: {error.strerror}; try again") from error
