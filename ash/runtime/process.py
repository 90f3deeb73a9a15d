"""Starts commands as process groups of their own, collects what they print within a bound, and ends whole groups.

Uses posix_spawn instead of the subprocess module: importing that costs 15 ms and a megabyte in every session, and
forking a program with threads is what posix_spawn avoids. Never waits for a pipe that a background child holds open.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

from ash.runtime.interrupt import Interrupt

TERM_GRACE = 0.5
"""Seconds between SIGTERM and SIGKILL."""
LINGER = 0.1
"""Seconds to wait for the last output of children that outlive their shell."""
_CHUNK = 65536
_HIGH_FD = 256
_groups: set[int] = set()
_left: set[int] = set()
"""Those of the groups whose leader has ended."""
_groups_lock = threading.Lock()


class Room:
    """How many bytes may still be kept; several outputs can share one."""

    def __init__(self, size: int) -> None:
        self._left = size

    def take(self, wanted: int) -> int:
        granted = min(wanted, self._left)
        self._left -= granted
        return granted


class Output:
    """What a command printed: its beginning as far as `room` goes, then its last `tail` bytes; `dropped` counts the rest."""

    def __init__(self, room: Room, tail: int = 0) -> None:
        self._room, self._tail_size = room, tail
        self.head = bytearray()
        self.tail = bytearray()
        self.dropped = 0

    def add(self, data: bytes) -> None:
        kept = 0 if self.tail or self.dropped else self._room.take(len(data))
        self.head += data[:kept]
        self.tail += data[kept:]
        surplus = max(0, len(self.tail) - self._tail_size)
        del self.tail[:surplus]
        self.dropped += surplus


class Ended(NamedTuple):
    """How a command ended. `code` is 128 plus the signal's number when a signal ended it."""

    code: int
    timed_out: bool
    state: bytes
    """What the command wrote to the file descriptor `state_fd`, where there is one."""


class Process:
    """A running command. `wait` collects its output in the calling thread; `stop` may be called from any thread."""

    def __init__(
        self, argv: list[str], env: Mapping[str, str], output: Output, errors: Output | None = None,
        *, stdin: bytes = b"", state_fd: int = -1,
    ) -> None:  # fmt: skip
        self._lock = threading.Lock()
        self._kill_at: float | None = None
        self._is_reaped = False
        self._wake_read, self._wake_write = os.pipe()
        self._state = _scratch() if state_fd >= 0 else -1
        self._sinks: dict[int, Output] = {}
        self.pid = self._spawn(argv, env, output, errors, stdin, state_fd)
        self._pidfd = _pidfd(self.pid)

    def _spawn(self, argv: list[str], env: Mapping[str, str], output: Output, errors: Output | None, stdin: bytes, state_fd: int) -> int:
        given = _input(stdin)
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe() if errors is not None else (out_read, out_write)
        moves = [(given, 0), (out_write, 1), (err_write, 2)] + ([(self._state, state_fd)] if self._state >= 0 else [])
        try:
            pid = _posix_spawn(argv, env, [(os.POSIX_SPAWN_DUP2, source, target) for source, target in moves])
        except BaseException:
            for descriptor in {out_read, err_read, self._state, self._wake_read, self._wake_write} - {-1}:
                os.close(descriptor)
            raise
        finally:
            for descriptor in {given, out_write, err_write}:
                os.close(descriptor)
        self._sinks = {out_read: output} if errors is None else {out_read: output, err_read: errors}
        return pid

    def stop(self) -> None:
        """Ask the whole group to end, and end it half a second later. Safe to repeat; does nothing once it is over."""
        with self._lock:
            if self._is_reaped or self._kill_at is not None:
                return
            self._kill_at = time.monotonic() + TERM_GRACE
            _signal_group(self.pid, signal.SIGTERM)
            os.write(self._wake_write, b"x")

    def wait(self, timeout: float) -> Ended:
        """Collect output until the command has exited; stops it after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        timed_out = False
        while not self._has_exited():
            now = time.monotonic()
            if self._kill_at is None and now >= deadline:
                timed_out = True
                self.stop()
            elif self._kill_at is not None and now >= self._kill_at:
                _signal_group(self.pid, signal.SIGKILL)
            self._pump(min(deadline if self._kill_at is None else self._kill_at, now + 60) - now, watch_exit=True)
        return self._finish(timed_out)

    def _has_exited(self) -> bool:
        # Seen without reaping: as long as the leader is not reaped, its group's number cannot belong to anybody else.
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _pump(self, timeout: float, *, watch_exit: bool) -> bool:
        """Read what is there, waiting `timeout` seconds at most for it. False when nothing came."""
        poller = select.poll()
        for descriptor in self._sinks:
            poller.register(descriptor, select.POLLIN)
        if watch_exit:
            poller.register(self._wake_read, select.POLLIN)
            if self._pidfd >= 0:
                poller.register(self._pidfd, select.POLLIN)
            else:
                timeout = min(timeout, 0.02)
        ready = [descriptor for descriptor, _ in poller.poll(max(0.0, timeout) * 1000)]
        for descriptor in ready:
            if descriptor in self._sinks:
                self._read(descriptor)
            elif descriptor == self._wake_read:
                os.read(descriptor, 64)
        return bool(ready)

    def _read(self, descriptor: int) -> None:
        data = os.read(descriptor, _CHUNK)
        if data:
            self._sinks[descriptor].add(data)
        else:
            del self._sinks[descriptor]
            os.close(descriptor)

    def _finish(self, timed_out: bool) -> Ended:
        with self._lock:
            was_stopped = self._kill_at is not None
            if was_stopped:
                _signal_group(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self._is_reaped = True
        last = time.monotonic() + LINGER
        while self._sinks and self._pump(last - time.monotonic(), watch_exit=False) and time.monotonic() < last:
            pass
        state = self._close(keep_group=not was_stopped)
        code = os.waitstatus_to_exitcode(status)
        return Ended(128 - code if code < 0 else code, timed_out, state)

    def _close(self, keep_group: bool) -> bytes:
        state = b""
        if self._state >= 0:
            state = os.pread(self._state, 1 << 20, 0)
            os.close(self._state)
        for descriptor in (self._wake_read, self._wake_write, self._pidfd):
            if descriptor >= 0:
                os.close(descriptor)
        remaining, self._sinks = list(self._sinks), {}
        if remaining and keep_group:
            # A background child still prints. It would die of SIGPIPE if nobody read; so somebody reads, and forgets.
            threading.Thread(target=_discard, args=(remaining, self.pid), name="discard", daemon=True).start()
        else:
            _forget(remaining, self.pid)
        return state


def run(process: Process, timeout: float, interrupt: Interrupt) -> Ended:
    """Wait for `process`; an interrupt stops it."""
    with interrupt.calling(process.stop):
        return process.wait(timeout)


def end_all() -> None:
    """SIGKILL for every group that was started here and still lives, or what is left of it."""
    with _groups_lock:
        _prune()
        for group in _groups:
            _signal_group(group, signal.SIGKILL)


def _posix_spawn(argv: list[str], env: Mapping[str, str], actions: list[tuple[int, int, int]]) -> int:
    defaults = [signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT]  # ignored here, which would be inherited
    with _groups_lock:
        try:
            pid = os.posix_spawn(argv[0], argv, env, file_actions=actions, setsid=True, setsigdef=defaults)
        except NotImplementedError:  # an interpreter built for an old C library
            pid = os.posix_spawn(argv[0], argv, env, file_actions=actions, setpgroup=0, setsigdef=defaults)
        _left.discard(pid)
        _prune()
        _groups.add(pid)
    return pid


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # already gone, or a program that changed its user
        os.killpg(group, number)


def _prune() -> None:
    # A group keeps its number as long as a member lives. Seen often, so that a number that is free again is not held for ours.
    gone = {group for group in _left if not _is_alive(group)}
    _left.difference_update(gone)
    _groups.difference_update(gone)


def _is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # a program that changed its user
        return True
    return True


def _discard(descriptors: list[int], group: int) -> None:
    for descriptor in descriptors:
        while os.read(descriptor, _CHUNK):
            pass
    _forget(descriptors, group)


def _forget(descriptors: list[int], group: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
    with _groups_lock:
        _left.add(group)
        _prune()


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return -1  # an old kernel or interpreter, or a filter: then exits are polled for


def _scratch() -> int:
    """A file without a name, at a number too high to be overwritten while descriptors are moved into place."""
    import fcntl

    try:
        descriptor = os.memfd_create("ash")
    except (AttributeError, OSError):
        descriptor = os.open("/tmp", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    high = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _HIGH_FD)
    os.close(descriptor)
    return high


def _input(stdin: bytes) -> int:
    if not stdin:
        return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    descriptor = _scratch()
    view = memoryview(stdin)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
