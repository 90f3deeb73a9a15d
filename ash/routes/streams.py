"""Event streams: one client that follows a session's log. It holds no queue, and it drops a client that does not read.

A stream waits for the log, encodes what is new in one go and writes it in one go. Silence is broken by a comment, which
is also how a client that left is noticed. After the headers an error can only be told as an event.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing

from aiohttp import web

from ash import dialect, models, sse
from ash.errors import AshError
from ash.models import Event
from ash.routes.answers import log_failure
from ash.routes.parts import Parts

log = logging.getLogger(__name__)

WRITE_TIMEOUT = 30.0
"""Seconds a client may leave a full connection unread before it is dropped. The log keeps everything for its return."""
_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream:
    """A response that goes through the log from `after` on. A subclass says how an event looks and which one is the last."""

    def __init__(self, request: web.Request, parts: Parts, session_id: str, after: int) -> None:
        self._request, self._log, self._id, self._after = request, parts.log, session_id, after
        self._keepalive = parts.config.keepalive_interval
        self._response = web.StreamResponse(headers=_HEADERS)
        self._is_done = False

    def encode(self, event: Event) -> bytes:
        shown = dialect.frame(event)
        return sse.encode(*shown, id=event.seq) if shown is not None else b""

    def is_last(self, event: Event) -> bool:
        raise NotImplementedError

    def farewell(self, error: str) -> bytes:
        """What a client is told when the stream has to end before its last event."""
        return sse.encode("error", {"error": error})

    async def run(self, *, first: Event | None = None, is_live: bool = True) -> web.StreamResponse:
        """Send what the log has and, when `is_live`, what it gets: until the last event, the client's departure or the server's end.

        `first` is an event after `after` that is in the log and at hand already.
        """
        try:
            await self._response.prepare(self._request)
            await self._send_all([first] if first is not None else [], is_live)
        except ConnectionError:
            log.debug("session %s: a client left its stream after event %d", self._id, self._after)
        return self._response

    async def _send_all(self, first: Sequence[Event], is_live: bool) -> None:
        try:
            await self._send(first)
            while is_live and await self._follow():
                await self._write(sse.KEEPALIVE)
            while not self._is_done and (events := await self._log.read(self._id, after=self._after)):
                await self._send(events)
        except AshError as error:
            log.error("session %s: a stream had to end after event %d: %s", self._id, self._after, error)
            await self._write(self.farewell(error.message))
        except ConnectionError:
            raise
        except Exception:  # noqa: BLE001 - the request's edge: after the headers nobody else can tell the client, who would wait for ever
            await self._write(self.farewell(log_failure(f"session {self._id}: its stream after event {self._after}")))
        else:
            if is_live and not self._is_done:
                await self._write(self.farewell("The server is stopping; continue later with Last-Event-ID"))

    async def _follow(self) -> bool:
        """Send events as they come. True when there was none for the keepalive interval, False when no more are to be followed."""
        clock = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(self._keepalive) as silence, aclosing(self._log.follow(self._id, self._after)) as batches:
                async for events in batches:
                    silence.reschedule(None)
                    await self._send(events)
                    if self._is_done:
                        break
                    silence.reschedule(clock() + self._keepalive)
        except TimeoutError:
            return True
        return False

    async def _send(self, events: Sequence[Event]) -> None:
        frames = []
        for event in events:
            frames.append(self.encode(event))
            self._after = event.seq
            if self.is_last(event):
                self._is_done = True
                break
        if data := b"".join(frames):
            await self._write(data)

    async def _write(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(WRITE_TIMEOUT):
                await self._response.write(data)
        except TimeoutError as error:
            log.warning("session %s: dropped a client that read nothing for %g seconds", self._id, WRITE_TIMEOUT)
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError("the client does not read") from error


class TurnStream(EventStream):
    """The stream of one turn, which ends with exactly one `done`. The end of another turn, recorded late, is not part of it."""

    def __init__(self, request: web.Request, parts: Parts, session_id: str, after: int, turn_id: str) -> None:
        super().__init__(request, parts, session_id, after)
        self._turn_id = turn_id

    def encode(self, event: Event) -> bytes:
        if self._has_lost_its_end(event):
            return self.farewell("The end of this turn is not in the log; the session has gone on with another one")
        return b"" if event.type == models.TURN_ENDED and not self._is_own(event) else super().encode(event)

    def is_last(self, event: Event) -> bool:
        return self._has_lost_its_end(event) or (event.type == models.TURN_ENDED and self._is_own(event))

    def _has_lost_its_end(self, event: Event) -> bool:
        """Whether another turn begins while this one has not ended: in a log where its end is missing, or comes too late."""
        return event.type == models.TURN_STARTED and not self._is_own(event)

    def _is_own(self, event: Event) -> bool:
        return event.data.get("turnId") == self._turn_id

    def farewell(self, error: str) -> bytes:
        return super().farewell(error) + sse.encode("done", {"sessionId": self._id})


def is_session_end(event: Event) -> bool:
    return event.type == models.SESSION_STATUS_CHANGED and event.data.get("to") == models.ENDED


class SessionStream(EventStream):
    """The stream of a session across its turns. It ends when the session has."""

    def is_last(self, event: Event) -> bool:
        return is_session_end(event)

    def encode(self, event: Event) -> bytes:
        return sse.encode("session_end", {"sessionId": self._id}, id=event.seq) if self.is_last(event) else super().encode(event)
