"""One blocking HTTP connection for one request. It never reuses a connection, so a request is never lost to a stale one."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from ash.errors import Overloaded, Unauthorized
from ash.remote.calls import Call
from ash.remote.folder import Upload
from ash.remote.http1 import BrokenResponse, CannotConnect, Head, NothingFollows, ResponseParser
from ash.remote.server import Server, answer, pause_before_retry, with_stored_key

T = TypeVar("T")
R = TypeVar("R")
_RECEIVE = 64 * 1024


class Connection:
    """Opened by its constructor. Raises OSError (CannotConnect, BrokenResponse, TimeoutError, …) and nothing else."""

    def __init__(self, server: Server, timeout: float) -> None:
        self._parser = ResponseParser()
        self._early = b""
        try:
            plain = socket.create_connection((server.host, server.port), timeout)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket = _secured(server, plain)
        except OSError as error:
            raise CannotConnect(str(error.strerror or error)) from error

    def send(self, head: bytes, body: bytes | Upload | None) -> None:
        try:
            if isinstance(body, Upload):
                self._socket.sendall(head)
                for piece in body.pieces():
                    self._socket.sendall(piece)
            else:
                self._socket.sendall(head + (body or b""))
        except (BrokenPipeError, ConnectionResetError):
            pass  # the server may have answered and closed before it read all of it; that answer says why

    def read_head(self) -> Head:
        while self._parser.head is None:
            self._early += self._receive()
        return self._parser.head

    def read(self) -> bytes:
        """Some bytes of the body, as soon as there are any; empty at its end."""
        body, self._early = self._early, b""
        while not body and not self._parser.is_complete:
            body = self._receive()
        return body

    def read_all(self) -> bytes:
        body = bytearray()
        while piece := self.read():
            body += piece
        return bytes(body)

    def _receive(self) -> bytes:
        data = self._socket.recv(_RECEIVE)
        if not data:
            self._parser.end()
            return b""
        return self._parser.feed(data)

    def set_timeout(self, seconds: float) -> None:
        self._socket.settimeout(seconds)

    def close(self) -> None:
        """Also wakes a thread that waits in `read`."""
        with suppress(OSError):  # the peer may have been faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _secured(server: Server, plain: socket.socket) -> socket.socket:
    context = server.tls()
    if context is None:
        return plain
    try:
        return context.wrap_socket(plain, server_hostname=server.host)
    except BaseException:
        plain.close()
        raise


def exchange(server: Server, call: Call[T]) -> T:
    """Send `call` and read its answer. Raises OSError for the connection, AshError for what the server answers."""
    return _politely(_exchange, server, call)


def _politely(send: Callable[[Server, Call[T]], R], server: Server, call: Call[T]) -> R:
    """Once more with a key if the server asks for one, and a few times when it says that it is overloaded, after the time it asks for."""
    for attempt in itertools.count():
        try:
            return send(server, call)
        except Unauthorized as refused:
            server = with_stored_key(server, refused)
        except Overloaded as refused:
            time.sleep(pause_before_retry(refused, attempt))
    raise AssertionError("a count without end has ended")


def _exchange(server: Server, call: Call[T]) -> T:
    timeout = server.timeout + call.timeout
    connection = Connection(server, timeout)
    try:
        connection.send(server.head(call), call.body)
        head = connection.read_head()
        result: Any = answer(call, head, connection.read_all())
    finally:
        connection.close()
    return result  # type: ignore[no-any-return]


def open_stream(server: Server, call: Call[None]) -> Connection:
    """The connection of an event stream, at the first byte of its body."""
    return _politely(_open_stream, server, call)


def _open_stream(server: Server, call: Call[None]) -> Connection:
    connection = Connection(server, server.timeout)
    try:
        connection.send(server.head(call), call.body)
        head = connection.read_head()
        if head.status == 204:
            raise NothingFollows()
        if head.status != 200 or not head.headers.get("content-type", "").startswith("text/event-stream"):
            answer(call, head, connection.read_all())
            raise BrokenResponse(f"{server.url} did not answer with a stream of events; is this address an Ash server?")
        connection.set_timeout(server.stream_timeout)
    except BaseException:
        connection.close()
        raise
    return connection
