"""The folders of a sandbox: slot, session, sockets; filling them from an agent's version; and which uid owns them.

Never follows a link: what lies in a workspace was made by somebody hostile. Everything here blocks; callers use a thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import zlib
from collections.abc import Iterator

from ash.errors import CapacityReached, InvalidRequest, SandboxFailed

PARTS = ("workspace", "home", "agent")
DIGEST_FILE = "agent.digest"
LOG_FILE = "bridge.log"
SLOTS = ".slots"
MAX_SOCKET_PATH = 100
"""The kernel takes 107 bytes; a little is left for names that are added."""

# Below the range that Linux distributions hand out for containers of users (from 100000), above all ordinary accounts.
UIDS = range(65_600, 99_900)
MAX_COPY_DEPTH = 200
MAX_COPY_BYTES = 16 * 1024**3
"""Most that one copy of a session's files may take; hard links would otherwise multiply what is on disk."""
_CHUNK = 1024 * 1024


class Folders:
    """Paths under one data folder. `run_fd` stands for run/ where a path would be too long for a socket."""

    def __init__(self, data_dir: str) -> None:
        self.data = data_dir
        self.sessions = os.path.join(data_dir, "sessions")
        self.slots = os.path.join(self.sessions, SLOTS)
        self.run = os.path.join(data_dir, "run")
        self.run_fd = -1

    def open(self) -> None:
        """Make the folders. Other users may pass through, each to what it owns, but list nothing."""
        os.makedirs(self.data, 0o700, exist_ok=True)
        for path in (self.sessions, self.slots, self.run):
            os.makedirs(path, exist_ok=True)
            os.chmod(path, 0o711)
        self.run_fd = os.open(self.run, os.O_RDONLY | os.O_DIRECTORY)

    def close(self) -> None:
        if self.run_fd >= 0:
            os.close(self.run_fd)
            self.run_fd = -1

    def run_dir(self, id: str) -> str:
        return os.path.join(self.run, id)

    def socket_path(self, *names: str) -> str:
        """A path below run/ that fits a socket address; through the open folder when the plain one is too long."""
        plain = os.path.join(self.run, *names)
        return plain if len(os.fsencode(plain)) <= MAX_SOCKET_PATH else os.path.join(f"/proc/self/fd/{self.run_fd}", *names)

    def make_run_dir(self, id: str, uid: int | None) -> None:
        """run/<id>/ with gw/ in it, open to the sandbox's own uid and to nobody else: who connects to the gateway uses our key."""
        path = self.run_dir(id)
        for folder, mode in ((path, 0o710), (os.path.join(path, "gw"), 0o750)):
            os.mkdir(folder, 0o700)
            _give_group(folder, uid, mode)

    def make_session_dir(self, path: str, uid: int | None) -> None:
        """A folder with empty workspace/, home/ and agent/ in it; existing parts stay as they are."""
        os.makedirs(path, 0o700, exist_ok=True)
        _give_group(path, uid, 0o710)
        for name in PARTS:
            part = os.path.join(path, name)
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o700)
                if name == "agent":
                    _give_group(part, uid, 0o750)
                elif uid is not None:
                    os.chown(part, uid, uid)

    def claim_slot(self, slot: str, session_dir: str) -> None:
        """Turn a warm sandbox's slot into the folder of a session; the mounts inside follow."""
        try:
            os.rename(slot, session_dir)
        except OSError as error:
            raise SandboxFailed(f"the session's folder could not be made: {error.strerror}") from error


def _give_group(path: str, uid: int | None, mode: int) -> None:
    if uid is None:
        os.chmod(path, 0o700)
        return
    os.chown(path, 0, uid)
    os.chmod(path, mode)


class Uids:
    """Hands each sandbox of a root server a host uid that no other sandbox and no other session's folder has.

    A uid is *held* by a sandbox that starts or runs, by its id, and *used* while a folder belongs to it. Safe to call from threads.
    """

    def __init__(self, data_dir: str) -> None:
        # Two servers of one host begin at different places.
        self._next = zlib.crc32(os.fsencode(data_dir)) % len(UIDS)
        self._used: set[int] = set()
        self._held: dict[str, int] = {}
        self._lock = threading.Lock()

    def scan(self, sessions: str) -> None:
        """Learn the owners of the sessions' folders on disk."""
        with os.scandir(sessions) as entries:
            for entry in entries:
                uid = find_owner(entry.path)
                if uid is not None:
                    self.reserve(uid)

    def take(self, id: str, owner: int | None = None) -> int:
        """A uid for a sandbox: that of its folder's `owner`, unless another sandbox has it just now, else one that nothing has."""
        with self._lock:
            uid = owner
            if uid is None or uid in self._held.values():
                uid = self._find_free()
            if uid is None:
                # Every one has belonged to some session by now. Two sessions may share one as long as they do not run together.
                self._used = set(self._held.values())
                uid = self._find_free()
            if uid is None:
                raise CapacityReached(f"capacity reached: all {len(UIDS)} user ids for sandboxes are in use")
            self._used.add(uid)
            self._held[id] = uid
            return uid

    def _find_free(self) -> int | None:
        for _ in UIDS:
            uid = UIDS[self._next]
            self._next = (self._next + 1) % len(UIDS)
            if uid not in self._used:
                return uid
        return None

    def reserve(self, uid: int) -> None:
        with self._lock:
            self._used.add(uid)

    def share(self, id: str, uid: int) -> None:
        """A second sandbox for the same folder, of which only one will stay."""
        with self._lock:
            self._held[id] = uid

    def let_go(self, id: str) -> None:
        """The sandbox is gone; its uid stays that of its folder."""
        with self._lock:
            self._held.pop(id, None)

    def release(self, uid: int) -> None:
        """For a uid that owns nothing any more."""
        with self._lock:
            self._used.discard(uid)


def find_owner(session_dir: str) -> int | None:
    """The sandbox uid that a session's folder belongs to; None when it has none."""
    with contextlib.suppress(OSError):
        uid = os.lstat(os.path.join(session_dir, "workspace")).st_uid
        return uid if uid in UIDS else None
    return None


def adopt(session_dir: str, uid: int) -> None:
    """Make an existing workspace and home belong to `uid`, for a folder that another kind of server has left."""
    for name in ("workspace", "home"):
        for folder, entries, left in _walk(_open_folder(os.path.join(session_dir, name), None)):
            if left is None:
                os.fchown(folder, uid, uid)
                for entry in entries:
                    os.chown(entry.name, uid, uid, dir_fd=folder, follow_symlinks=False)
    # What is in agent/ is readable for the former group: without the marker it is filled anew.
    _give_group(os.path.join(session_dir, "agent"), uid, 0o750)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(session_dir, DIGEST_FILE))


def fill(session_dir: str, agent_dir: str, uid: int | None, *, fresh: bool, link: bool) -> None:
    """agent/ gets the version's files, unless it has them; a fresh workspace gets a writable copy. Raises SandboxFailed."""
    try:
        _fill_agent(session_dir, agent_dir, uid, link)
        if fresh:
            copy_tree(agent_dir, os.path.join(session_dir, "workspace"), uid, writable=True)
    except OSError as error:
        raise SandboxFailed(f"the agent's files could not be put into the session's folder: {error.strerror}") from error


def _fill_agent(session_dir: str, agent_dir: str, uid: int | None, link: bool) -> None:
    digest, marker = os.path.basename(agent_dir), os.path.join(session_dir, DIGEST_FILE)
    with contextlib.suppress(OSError), open(marker, encoding="utf-8") as file:
        if file.read() == digest:
            return
    target = os.path.join(session_dir, "agent")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(marker)
    _empty(target)
    copy_tree(agent_dir, target, uid, writable=False, link=link)
    with open(marker, "w", encoding="utf-8") as file:
        file.write(digest)


def _empty(folder: str) -> None:
    """Remove what is in a folder but not the folder: it may be mounted. Raises OSError when something stays."""
    for current, entries, left in _walk(_open_folder(folder, None)):
        if left is not None:
            os.rmdir(left, dir_fd=current)
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.name, dir_fd=current)


def copy_tree(source: str, target: str, uid: int | None, *, writable: bool, link: bool = False) -> None:
    """Copy what is in `source` into the existing folder `target`: folders, files, links as links; nothing else.

    `writable` copies belong to `uid`; others to the server, with `uid`'s group able to read. `link` shares a file's blocks
    where its mode allows, for a target that is only ever mounted read-only. Walks by descriptors: a name in `source` that
    is swapped for a link meanwhile is refused, not followed. Holes of sparse files stay holes. Raises InvalidRequest for
    more than `MAX_COPY_DEPTH` levels or `MAX_COPY_BYTES`.
    """
    _Copy(uid, writable, link).tree(source, target)


def _open_folder(name: str, parent: int | None) -> int:
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)


def _open_below(root: int, names: tuple[str, ...]) -> int:
    """A folder some levels down, each step refused if it is a link."""
    current = os.dup(root)
    for name in names:
        try:
            inner = _open_folder(name, current)
        finally:
            os.close(current)
        current = inner
    return current


def _list(folder: int) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def _walk(top: int) -> Iterator[tuple[int, list[os.DirEntry[str]], str | None]]:
    """Every folder at and below `top`, which it takes over: (folder, entries, None) on entering one, (parent, [], name) on leaving `name`.

    For trees that somebody hostile made: no recursion, and never more than two descriptors, however deep. What cannot be entered
    is left out. The way up is checked: a folder that was moved meanwhile ends the walk with OSError.
    """
    current, above = top, list[tuple[str, tuple[int, int], list[str]]]()
    try:
        entries = _list(current)
        pending = _subfolders(entries)
        yield current, entries, None
        while pending or above:
            if not pending:
                name, identity, pending = above.pop()
                current = _replace(current, _open_folder("..", current))
                if _identify(current) != identity:
                    raise OSError(errno.ESTALE, "a folder was moved while it was worked on")
                yield current, [], name
            elif (inner := _find_folder(name := pending.pop(), current)) is not None:
                above.append((name, _identify(current), pending))
                current = _replace(current, inner)
                entries = _list(current)
                pending = _subfolders(entries)
                yield current, entries, None
    finally:
        os.close(current)


def walk_states(path: str) -> Iterator[os.stat_result]:
    """The state of everything at and below a folder, each folder once; of links, their own. What cannot be read is left out."""
    for folder, entries, left in _walk(_enter(path, None)):
        if left is None:
            yield os.fstat(folder)
            for entry in entries:
                with contextlib.suppress(OSError):
                    if not entry.is_dir(follow_symlinks=False):
                        yield entry.stat(follow_symlinks=False)


def walk_open(path: str) -> Iterator[tuple[int, bool]]:
    """Each folder and each regular file at and below a folder, opened for reading while it is looked at, and whether it is a folder."""
    for folder, entries, left in _walk(_enter(path, None)):
        if left is None:
            yield folder, True
            for entry in entries:
                if entry.is_file(follow_symlinks=False) and (fd := _open_file(entry.name, folder)) is not None:
                    try:
                        yield fd, False
                    finally:
                        os.close(fd)


def _open_file(name: str, folder: int) -> int | None:
    with contextlib.suppress(OSError):
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    return None


def _subfolders(entries: list[os.DirEntry[str]]) -> list[str]:
    return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def _replace(old: int, new: int) -> int:
    os.close(old)
    return new


def _find_folder(name: str, parent: int) -> int | None:
    with contextlib.suppress(OSError):
        return _enter(name, parent)
    return None


def _identify(folder: int) -> tuple[int, int]:
    state = os.fstat(folder)
    return state.st_dev, state.st_ino


def _enter(name: str, parent: int | None) -> int:
    """Open a folder. One that its owner may not list or change, and that is ours, is opened up first; root needs nothing of this."""
    with contextlib.suppress(PermissionError):
        folder = _open_folder(name, parent)
        if os.geteuid() and os.fstat(folder).st_mode & stat.S_IRWXU != stat.S_IRWXU:
            with contextlib.suppress(PermissionError):
                os.fchmod(folder, stat.S_IRWXU)
        return folder
    handle = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        os.chmod(f"/proc/self/fd/{handle}", stat.S_IRWXU)
    finally:
        os.close(handle)
    return _open_folder(name, parent)


class _Copy:
    def __init__(self, uid: int | None, writable: bool, link: bool) -> None:
        self._uid, self._writable, self._link = uid, writable, link
        self._pending: list[tuple[str, ...]] = [()]
        self._bytes = 0

    def tree(self, source: str, target: str) -> None:
        """Opens each folder anew from the top: a hostile tree must not hold a descriptor for each of its levels."""
        origin = _open_folder(source, None)
        try:
            copy = _open_folder(target, None)
            try:
                while self._pending:
                    self._folder(origin, copy, self._pending.pop())
            finally:
                os.close(copy)
        finally:
            os.close(origin)

    def _folder(self, origin: int, copy: int, names: tuple[str, ...]) -> None:
        if len(names) > MAX_COPY_DEPTH:
            raise InvalidRequest(f"the files cannot be copied: folders are nested deeper than {MAX_COPY_DEPTH} levels")
        source = _open_below(origin, names)
        try:
            target = _open_below(copy, names)
            try:
                for entry in _list(source):
                    self._entry(entry, source, target, names)
            finally:
                os.close(target)
        finally:
            os.close(source)

    def _entry(self, entry: os.DirEntry[str], source: int, target: int, names: tuple[str, ...]) -> None:
        if entry.is_symlink():
            os.symlink(os.readlink(entry.name, dir_fd=source), entry.name, dir_fd=target)
            if self._uid is not None and self._writable:
                os.chown(entry.name, self._uid, self._uid, dir_fd=target, follow_symlinks=False)
        elif entry.is_dir(follow_symlinks=False):
            os.mkdir(entry.name, 0o700, dir_fd=target)
            inner = _open_folder(entry.name, target)
            try:
                self._own(inner, 0o755 if self._writable else 0o750)
            finally:
                os.close(inner)
            self._pending.append((*names, entry.name))
        elif entry.is_file(follow_symlinks=False) and not self._share(entry, source, target):
            self._file(entry.name, source, target)

    def _own(self, fd: int, mode: int) -> None:
        """The owner last: chown would clear what chmod has set."""
        if self._uid is not None:
            os.fchown(fd, self._uid if self._writable else 0, self._uid)
        os.fchmod(fd, mode)

    def _share(self, entry: os.DirEntry[str], source: int, target: int) -> bool:
        if not self._link or not entry.stat(follow_symlinks=False).st_mode & stat.S_IROTH:
            return False
        try:
            os.link(entry.name, entry.name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
        except OSError:
            # Another file system, or too many links: copying always works.
            return False
        return True

    def _file(self, name: str, source: int, target: int) -> None:
        reader = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=source)
        with open(reader, "rb", buffering=0):
            state = os.fstat(reader)
            if not stat.S_ISREG(state.st_mode):
                return
            writer = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=target)
            try:
                self._content(reader, writer, state.st_size)
                os.utime(writer, ns=(state.st_atime_ns, state.st_mtime_ns))
                mode = state.st_mode & 0o777
                self._own(writer, mode | 0o600 if self._writable else (mode | 0o440) & 0o555)
            finally:
                os.close(writer)

    def _content(self, reader: int, writer: int, size: int) -> None:
        """The data up to `size`, which the file had at first; what lies between stays a hole."""
        os.ftruncate(writer, size)
        end = 0
        while end < size:
            try:
                start = os.lseek(reader, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole follows
                    return
                raise
            end = min(os.lseek(reader, start, os.SEEK_HOLE), size)
            self._bytes += max(0, end - start)
            if self._bytes > MAX_COPY_BYTES:
                raise InvalidRequest(f"the files cannot be copied: they take more than {MAX_COPY_BYTES >> 30} GiB")
            self._extent(reader, writer, start, end)

    @staticmethod
    def _extent(reader: int, writer: int, start: int, end: int) -> None:
        while start < end:
            data = os.pread(reader, min(_CHUNK, end - start), start)
            if not data:
                return
            start += os.pwrite(writer, data, start)


def copy_session(source: str, target: str, uid: int | None) -> None:
    """A second session's folder with copies of workspace/ and home/; agent/ is filled when its sandbox starts."""
    if os.path.lexists(target):
        raise SandboxFailed("the new session's folder exists already")
    folders = Folders(os.path.dirname(os.path.dirname(target)))
    try:
        folders.make_session_dir(target, uid)
        for name in ("workspace", "home"):
            copy_tree(os.path.join(source, name), os.path.join(target, name), uid, writable=True)
    except BaseException as error:  # whatever went wrong, half a copy must not stay
        remove_tree(target)
        if isinstance(error, OSError):
            raise SandboxFailed(f"the session's files could not be copied: {error.strerror}") from error
        raise


def remove_tree(path: str) -> None:
    """Remove a folder that may hold anything, however deep; what cannot be removed stays. A link is not followed."""
    with contextlib.suppress(OSError):
        for folder, entries, left in _walk(_enter(path, None)):
            if left is not None:
                with contextlib.suppress(OSError):
                    os.rmdir(left, dir_fd=folder)
            for entry in entries:
                with contextlib.suppress(OSError):
                    if not entry.is_dir(follow_symlinks=False):
                        os.unlink(entry.name, dir_fd=folder)
    with contextlib.suppress(OSError):
        os.rmdir(path)


def subfolders(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
