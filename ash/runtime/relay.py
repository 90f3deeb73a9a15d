"""The sandbox's way to the egress proxy: a port on its own loopback whose connections are passed on to the proxy's socket.

The bridge holds the listening socket and starts the relay, a process of its own, when somebody connects; it ends itself when it
has had nothing to do for a while. It decides nothing: who speaks to the proxy's socket directly gets the same answers.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time

from ash import protocol

IDLE_SECONDS = 20.0
"""Without a connection; then the relay ends and costs nothing."""
MAX_PAIRS = 256
_CHUNK = 256 * 1024
_MOVES = 8
"""Chunks of one connection before the others get their turn."""
_CONNECT_SECONDS = 5.0
_RESTART_SECONDS = 1.0
"""After a relay that died at once."""
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from ash.runtime.relay import main; main()"
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
"""Where this package was imported from: a folder, or the zip."""
_REFUSED = b"HTTP/1.1 502 Ash's egress proxy does not answer\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Port:
    """The bridge's part: the listening socket, and the relay while there is one. Waits for nothing."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._pid = 0
        self._pidfd = -1
        self._started_at = 0.0
        self._not_before = 0.0

    @staticmethod
    def open() -> Port | None:
        """None where the port cannot be had: then nothing is passed on, and everything else works."""
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", protocol.PROXY_PORT))
            listener.listen(128)
        except OSError:
            listener.close()
            return None
        listener.setblocking(False)
        return Port(listener)

    def watched(self) -> int:
        """The descriptor that becomes readable when there is something to do for `act`; -1 where only time tells."""
        return self._pidfd if self._pid else self._listener.fileno() if self._may_start() else -1

    def _may_start(self) -> bool:
        return time.monotonic() >= self._not_before

    def wait_seconds(self) -> float | None:
        """How soon `act` has to be called although nothing became readable."""
        return _RESTART_SECONDS if self.watched() < 0 else None

    def act(self) -> None:
        """Start the relay when somebody waits for it; take note of its end."""
        if self._pid:
            self._reap()
        elif self._may_start() and select.select([self._listener], [], [], 0)[0]:
            self._start()

    def _start(self) -> None:
        self._started_at = time.monotonic()
        try:
            self._pid = _spawn(self._listener.fileno())
        except OSError:  # no process to be had: who connected is told so, the next one may be luckier
            self._turn_away()
            return
        try:
            self._pidfd = os.pidfd_open(self._pid)
        except (AttributeError, OSError):  # an old kernel, or a filter: then the end is asked for
            self._pidfd = -1

    def _turn_away(self) -> None:
        self._not_before = time.monotonic() + _RESTART_SECONDS
        try:
            waiting, _ = self._listener.accept()
        except OSError:
            return
        waiting.close()

    def _reap(self) -> None:
        pid, _ = os.waitpid(self._pid, os.WNOHANG)
        if not pid:
            return
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self._pid, self._pidfd = 0, -1
        now = time.monotonic()
        if now - self._started_at < _RESTART_SECONDS:
            self._not_before = now + _RESTART_SECONDS


def _spawn(listener: int) -> int:
    """The relay's process: the listening socket is its standard input, its environment is empty."""
    argv = [sys.executable, "-I", "-S", "-B", "-c", _BOOT, _ROOT]
    return os.posix_spawn(sys.executable, argv, {}, file_actions=[(os.POSIX_SPAWN_DUP2, listener, 0)], setpgroup=0)


# The relay's own process


def main() -> None:
    Relay(socket.socket(fileno=0), protocol.EGRESS_SOCKET).run()


class _Way:
    """One direction of a connection: what was read and not yet written, and which end has closed."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source, self.target = source, target
        self.held = memoryview(b"")
        self.is_over = False

    def move(self) -> bool:
        """Pass on what can be passed on without waiting. True when there may be more. Raises OSError when an end is broken."""
        for _ in range(_MOVES):
            if self.is_over:
                return False
            try:
                self._move_once()
            except BlockingIOError:
                return False
        return True

    def _move_once(self) -> None:
        if not self.held:
            self.held = memoryview(self.source.recv(_CHUNK))
            if not self.held:
                self.target.shutdown(socket.SHUT_WR)
                self.is_over = True
                return
        self.held = self.held[self.target.send(self.held) :]


class Relay:
    """Passes bytes both ways between each connection and one to the proxy's socket."""

    def __init__(self, listener: socket.socket, target: str, idle_seconds: float = IDLE_SECONDS) -> None:
        self._listener, self._target, self._idle_seconds = listener, target, idle_seconds
        self._ways: dict[int, tuple[_Way, _Way]] = {}
        """By the descriptor of either end."""
        self._poll = select.epoll()
        self._poll.register(listener, select.EPOLLIN)
        self._unfinished: list[tuple[int, int]] = []
        self._is_full = False

    def run(self) -> None:
        """Until nothing was to be done for the idle time."""
        while ready := self._next():
            for descriptor, flags in ready:
                if descriptor == self._listener.fileno():
                    self._accept()
                elif descriptor in self._ways:
                    self._move(descriptor, flags)

    def _next(self) -> list[tuple[int, int]]:
        """What the kernel reports, and the connections that were not done with what it had reported before."""
        unfinished, self._unfinished = self._unfinished, []
        wait = 0 if unfinished else None if self._ways else self._idle_seconds
        return unfinished + self._poll.poll(wait)

    def _accept(self) -> None:
        try:
            inside, _ = self._listener.accept()
        except OSError:
            return
        outside = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            outside.settimeout(_CONNECT_SECONDS)
            outside.connect(self._target)
        except OSError:
            _say(inside, _REFUSED)
            outside.close()
            return
        self._add(inside, outside)

    def _add(self, inside: socket.socket, outside: socket.socket) -> None:
        inside.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ways = _Way(inside, outside), _Way(outside, inside)
        for end in (inside, outside):
            end.setblocking(False)
            self._ways[end.fileno()] = ways
            # Edge-triggered: told once of each change, and then everything is moved that can be.
            self._poll.register(end, select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET)
        self._mind_room()

    def _move(self, descriptor: int, flags: int) -> None:
        ways = self._ways[descriptor]
        try:
            are_busy = [way.move() for way in ways]  # both, whatever the first one says
            if any(are_busy):
                self._unfinished.append((descriptor, flags))
                return
        except OSError:
            self._drop(ways)
            return
        if all(way.is_over for way in ways) or self._is_deserted(descriptor, flags, ways[1]):
            self._drop(ways)

    @staticmethod
    def _is_deserted(descriptor: int, flags: int, back: _Way) -> bool:
        """Whether nobody is left inside to take an answer. A hang-up is no sign of it once we have closed that direction ourselves."""
        return descriptor == back.target.fileno() and bool(flags & (select.EPOLLHUP | select.EPOLLERR)) and not back.is_over

    def _drop(self, ways: tuple[_Way, _Way]) -> None:
        for end in (ways[0].source, ways[0].target):
            del self._ways[end.fileno()]
            end.close()
        self._mind_room()

    def _mind_room(self) -> None:
        """Leave further connections in the kernel while there are too many."""
        is_full = len(self._ways) >= 2 * MAX_PAIRS
        if is_full != self._is_full:
            self._is_full = is_full
            self._poll.modify(self._listener, 0 if is_full else select.EPOLLIN)


def _say(inside: socket.socket, answer: bytes) -> None:
    try:
        inside.settimeout(1.0)
        inside.sendall(answer)
    except OSError:
        return
    finally:
        inside.close()
