"""The events that the server has not acknowledged yet: numbered, in order, bounded, and sent again to a new connection.

Producers wait when it is full; the thread that reads commands never does, or acknowledgements could not make room.
"""

from __future__ import annotations

import json
import socket
import threading
from collections import deque
from contextlib import suppress
from itertools import islice
from typing import Any

from ash import protocol

LIMIT_BYTES = 8 * 1024 * 1024
_BATCH_BYTES = 256 * 1024


class Outbox:
    """All methods may be called from any thread."""

    def __init__(self, limit: int = LIMIT_BYTES) -> None:
        self._limit = limit
        self._changed = threading.Condition()
        self._lines: deque[bytes] = deque()
        self._size = 0
        self._acknowledged = 0
        self._sent = 0
        self._is_closed = False

    def emit(self, name: str, **fields: Any) -> None:
        """Number an event and queue it; waits while the queue is full."""
        self._put(name, fields, wait=True)

    def answer(self, name: str, **fields: Any) -> None:
        """Like `emit`, for the thread that reads commands: never waits."""
        self._put(name, fields, wait=False)

    def _put(self, name: str, fields: dict[str, Any], *, wait: bool) -> None:
        with self._changed:
            while wait and self._size >= self._limit and not self._is_closed:
                self._changed.wait()
            number = self._acknowledged + len(self._lines) + 1
            line = protocol.encode(protocol.event(name, number, **fields))
            if b"\\ud" in line:
                line = _without_half_characters(line)
            if len(line) > protocol.MAX_LINE_BYTES:
                raise ValueError(f"a {name} event of {len(line)} bytes does not fit into a line of {protocol.MAX_LINE_BYTES}")
            self._lines.append(line)
            self._size += len(line)
            self._changed.notify_all()

    def acknowledge(self, number: int) -> None:
        """The server has kept everything up to `number`."""
        with self._changed:
            while self._lines and self._acknowledged < number:
                self._size -= len(self._lines.popleft())
                self._acknowledged += 1
            self._changed.notify_all()

    def take(self, sent: int, connection: Connection) -> tuple[int, bytes] | None:
        """The lines after event `sent` and the number of the last of them; waits for one. None once the connection is closed."""
        with self._changed:
            sent = max(sent, self._acknowledged)
            while not connection.is_closed and sent >= self._acknowledged + len(self._lines):
                self._changed.wait()
                sent = max(sent, self._acknowledged)
            if connection.is_closed:
                return None
            batch: list[bytes] = []
            size = 0
            for line in islice(self._lines, sent - self._acknowledged, None):
                if batch and size + len(line) > _BATCH_BYTES:
                    break
                batch.append(line)
                size += len(line)
            return sent + len(batch), b"".join(batch)

    def mark_sent(self, number: int) -> None:
        with self._changed:
            self._sent = max(self._sent, number)

    def is_sent(self) -> bool:
        """Whether everything was given to a connection at least once."""
        with self._changed:
            return self._sent >= self._acknowledged + len(self._lines)

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """From now on nobody waits."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


def _without_half_characters(line: bytes) -> bytes:
    """Half of a surrogate pair, as in a file name that is no UTF-8, is no text: nobody could store or print it."""
    text = json.dumps(json.loads(line), ensure_ascii=False)
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return protocol.encode(json.loads(whole))


class Connection:
    """The sending half of one connection of the server; the receiving half is the bridge's main loop."""

    def __init__(self, connection: socket.socket, outbox: Outbox, greeting: bytes) -> None:
        self.socket = connection
        self.is_closed = False
        self._outbox = outbox
        self._greeting = greeting
        threading.Thread(target=self._send, name="send", daemon=True).start()

    def close(self) -> None:
        self.is_closed = True
        self._outbox.wake()
        with suppress(OSError):  # the server was faster
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def _send(self) -> None:
        sent = 0
        try:
            self.socket.sendall(self._greeting)
            while (batch := self._outbox.take(sent, self)) is not None:
                sent, data = batch
                self.socket.sendall(data)
                self._outbox.mark_sent(sent)
        except OSError:
            return  # the main loop notices the same by reading
