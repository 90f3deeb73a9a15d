"""The streams that the two clients hand out: iterate over events, reconnect, go on. Which events are new says `cursor`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ash.errors import AshError
from ash.remote.calls import Call
from ash.remote.cursor import Step, StreamOver, StreamState
from ash.remote.records import Event
from ash.remote.server import Server, failure

if TYPE_CHECKING:
    from ash.remote.aio import AsyncConnection
    from ash.remote.connection import Connection

_MAX_POSITIONS = 4096

Reconnected = Callable[[str, int], None]
"""Called after a stream is connected again, with the session's id and how many times that was."""


class Positions(dict[str, int]):
    """The last event that a client saw of each session: what tells a message that arrived from one that was lost. Bounded."""

    def note(self, session_id: str, position: int | None) -> None:
        if position is not None:
            self.pop(session_id, None)
            self[session_id] = position
            if len(self) > _MAX_POSITIONS:
                del self[next(iter(self))]


class EventStream(Iterator[Event]):
    """The events of a turn or a session, one by one. Reconnects by itself and goes on where it was.

    `last_event_id` is the cursor to continue after, `reconnects` counts the breaks that were bridged. Close it, or use it
    in a `with`, to leave early; the turn goes on in the server.
    """

    def __init__(
        self, server: Server, state: StreamState, call: Call[None], positions: Positions, on_reconnect: Reconnected | None
    ) -> None:
        self._server, self._state, self._positions, self._on_reconnect = server, state, positions, on_reconnect
        self._ready: deque[Event] = deque()
        self._connection: Connection | None = None
        self._is_closed = False
        with explained(server):
            try:
                self._open(call)
            except OSError as error:
                self._reopen(error)

    @property
    def session_id(self) -> str:
        return self._state.session_id

    @property
    def last_event_id(self) -> int | None:
        return self._state.last_id

    @property
    def reconnects(self) -> int:
        return self._state.reconnects

    def __next__(self) -> Event:
        with explained(self._server):
            while not self._ready:
                if self._is_closed or self._state.is_finished:
                    self.close()
                    raise StopIteration
                self._fill()
        return self._ready.popleft()

    def _fill(self) -> None:
        try:
            assert self._connection is not None
            chunk = self._connection.read()
            if not chunk:
                raise StreamOver
            self._ready.extend(self._state.decode(chunk))
        except OSError as error:
            if not self._is_closed:
                self._reopen(error)
        self._positions.note(self._state.session_id, self._state.last_id)

    def _open(self, call: Call[None]) -> None:
        from ash.remote.connection import open_stream

        self._connection = open_stream(self._server, call)
        self._state.connected()

    def _reopen(self, error: Exception) -> None:
        """Follow the state's plan until a connection stands again. Raises what cannot be bridged."""
        while not self._is_closed:
            self._disconnect()
            try:
                call = self._carry_out(self._state.plan(error))
                if self._state.is_finished:
                    return
                self._open(call)
            except (OSError, AshError) as problem:
                if not self._state.is_passing(problem):
                    raise
                error = problem
                continue
            self._state.reconnects += 1
            if self._on_reconnect is not None:
                self._on_reconnect(self._state.session_id, self._state.reconnects)
            return

    def _carry_out(self, plan: Generator[Step, Any, Call[None]]) -> Call[None]:
        from ash.remote.connection import exchange

        reply: Any = None
        while True:
            try:
                step = plan.send(reply)
            except StopIteration as end:
                call: Call[None] = end.value
                return call
            if isinstance(step, float):
                time.sleep(step)
            reply = None if isinstance(step, float) else exchange(self._server, step)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def close(self) -> None:
        """Leave the stream. Safe from another thread, whose `for` then ends."""
        self._is_closed = True
        connection = self._connection
        if connection is not None:
            connection.close()

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_connection"):
            self._disconnect()


class AsyncEventStream(AsyncIterator[Event]):
    """EventStream for asyncio. The request is sent when the first event is asked for; cancelling closes the socket."""

    def __init__(
        self, server: Server, state: StreamState, call: Call[None], positions: Positions, on_reconnect: Reconnected | None
    ) -> None:
        self._server, self._state, self._positions, self._on_reconnect = server, state, positions, on_reconnect
        self._first: Call[None] | None = call
        self._ready: deque[Event] = deque()
        self._connection: AsyncConnection | None = None
        self._is_closed = False

    @property
    def session_id(self) -> str:
        return self._state.session_id

    @property
    def last_event_id(self) -> int | None:
        return self._state.last_id

    @property
    def reconnects(self) -> int:
        return self._state.reconnects

    async def __anext__(self) -> Event:
        with explained(self._server):
            while not self._ready:
                if self._is_closed or self._state.is_finished:
                    self.close()
                    raise StopAsyncIteration
                try:
                    await self._fill()
                except BaseException:  # cancelled too: a socket must not outlive the one who reads it
                    self.close()
                    raise
        return self._ready.popleft()

    async def _fill(self) -> None:
        try:
            if self._first is not None:
                call, self._first = self._first, None
                await self._open(call)
            assert self._connection is not None
            chunk = await self._connection.read()
            if not chunk:
                raise StreamOver
            self._ready.extend(self._state.decode(chunk))
        except OSError as error:
            if not self._is_closed:
                await self._reopen(error)
        self._positions.note(self._state.session_id, self._state.last_id)

    async def _open(self, call: Call[None]) -> None:
        from ash.remote.aio import open_stream

        self._connection = await open_stream(self._server, call)
        self._state.connected()

    async def _reopen(self, error: Exception) -> None:
        """Follow the state's plan until a connection stands again. Raises what cannot be bridged."""
        while not self._is_closed:
            self._disconnect()
            try:
                call = await self._carry_out(self._state.plan(error))
                if self._state.is_finished:
                    return
                await self._open(call)
            except (OSError, AshError) as problem:
                if not self._state.is_passing(problem):
                    raise
                error = problem
                continue
            self._state.reconnects += 1
            if self._on_reconnect is not None:
                self._on_reconnect(self._state.session_id, self._state.reconnects)
            return

    async def _carry_out(self, plan: Generator[Step, Any, Call[None]]) -> Call[None]:
        import asyncio

        from ash.remote.aio import exchange

        reply: Any = None
        while True:
            try:
                step = plan.send(reply)
            except StopIteration as end:
                call: Call[None] = end.value
                return call
            if isinstance(step, float):
                await asyncio.sleep(step)
            reply = None if isinstance(step, float) else await exchange(self._server, step)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def close(self) -> None:
        """Leave the stream; the turn goes on in the server."""
        self._is_closed = True
        self._disconnect()

    async def aclose(self) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(RuntimeError):  # the event loop may be gone already
            self._disconnect()

    async def __aenter__(self) -> AsyncEventStream:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@contextmanager
def explained(server: Server) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise failure(server, error) from error
