"""What a stream of events has seen, and how it goes on after a break. Pure; the clients do the I/O it asks for.

A break after the first event: the stream continues behind the last event's id, so nothing is lost and nothing comes twice.
A break before it: the message may or may not have arrived. It is never sent again by itself; the session's history is asked
instead. Where the history can tell, the stream goes on with the turn that was found; otherwise the caller gets an error.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from typing import Any

from ash import sse
from ash.errors import AshError, CapacityReached, ConnectionFailed, RateLimited, Timeout, TurnFailed, UpstreamError
from ash.remote import calls
from ash.remote.calls import Call, Content
from ash.remote.http1 import BrokenResponse, CannotConnect, NothingFollows
from ash.remote.records import Event, EventData, Json, Message, TurnResult

Step = float | Call[Any]
"""What a plan asks of its client: to wait so many seconds, or to make a request and send its answer back."""

_DELAYS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 5.0, 5.0, 5.0, 5.0)
_SEARCH_DELAYS = (0.0, 0.5, 1.5)
_PAGE = 1000
_STABLE = 5.0
"""Seconds after which a connection counts as good although it brought no event: an idle session is silent but for keepalives."""
_PASSING = (CapacityReached, RateLimited, Timeout, UpstreamError)


class StreamState:
    """The cursor of one stream, shared by both clients. Subclasses say how a break is bridged and when the stream is over."""

    def __init__(self, session_id: str, last_id: int | None) -> None:
        self.session_id = session_id
        self.last_id = last_id
        self.reconnects = 0
        self.is_finished = False
        self.gave_up = False
        self._decoder = sse.Decoder()
        self._connected_at = time.monotonic()
        self._failures = 0

    def decode(self, chunk: bytes) -> list[Event]:
        """The new events in `chunk`. One that was seen before the connection broke is left out."""
        try:
            frames = list(self._decoder.feed(chunk))
        except ValueError as error:
            raise BrokenResponse(str(error)) from error
        events = [event for frame in frames if (event := self._accept(frame)) is not None]
        if events or time.monotonic() - self._connected_at > _STABLE:
            self._failures = 0
        return events

    def _accept(self, frame: sse.Frame) -> Event | None:
        id = int(frame.id) if frame.id is not None and frame.id.isdecimal() else None
        if self.is_finished or self._is_known(frame.event, id):
            return None
        self.last_id = self.last_id if id is None else id
        return Event(frame.event, EventData(frame.data, frame.event), id)

    def _is_known(self, kind: str, id: int | None) -> bool:
        """Whether an event adds nothing. In a stream with ids one without is the server's word on why it closes; we come back."""
        if self.last_id is None or kind == "resync":
            return False
        return id is None or id <= self.last_id

    def connected(self) -> None:
        """A new connection stands: bytes of the last one must not mix with it."""
        self._decoder = sse.Decoder()
        self._connected_at = time.monotonic()

    def is_passing(self, error: Exception) -> bool:
        """Whether it makes sense to try again: the connection broke, or the server is not ready yet."""
        return not self.gave_up and isinstance(error, (OSError, *_PASSING))

    def _pause(self, error: Exception) -> float:
        """How long to wait before the next attempt; raises `error` when there were enough of them."""
        if self._failures >= len(_DELAYS):
            self.gave_up = True
            raise error
        delay = _DELAYS[self._failures] * (0.75 + os.urandom(1)[0] / 512)
        self._failures += 1
        return delay

    def plan(self, error: Exception) -> Generator[Step, Any, Call[None]]:
        """What to do after `error`: yields waits and questions, returns the request to continue with, or raises."""
        raise NotImplementedError


class TurnState(StreamState):
    """The stream of one turn: begins with a message, ends with `done`."""

    def __init__(self, session_id: str, content: Content, known: int | None) -> None:
        super().__init__(session_id, None)
        self._content = content
        self._known = known
        """The last event of the session that this client saw before it sent the message; None when it saw none."""
        self._was_sent = False
        self._turns_to_skip = 0

    def _accept(self, frame: sse.Frame) -> Event | None:
        if self._turns_to_skip:
            if frame.event == "session_start":
                self._turns_to_skip -= 1
            if self._turns_to_skip:
                return None
            if self._known is None or int(frame.id or 0) <= self._known:
                raise self._uncertain()
        event = super()._accept(frame)
        if event is not None and event.type == "done":
            self.is_finished = True
        return event

    def plan(self, error: Exception) -> Generator[Step, Any, Call[None]]:
        if isinstance(error, CannotConnect) and not self._was_sent:
            self.gave_up = True
            raise error
        if isinstance(error, NothingFollows) and self.last_id is not None:
            self.is_finished = True
            return calls.continue_turn(self.session_id, self.last_id)
        self._was_sent = True
        yield self._pause(error)
        if self.last_id is not None:
            return calls.continue_turn(self.session_id, self.last_id)
        self._turns_to_skip = yield from self._find_turn(error)
        return calls.follow(self.session_id, 0)

    def _find_turn(self, error: Exception) -> Generator[Step, Any, int]:
        """Which turn of the session our message began, counted from 1. Asks more than once: it may still be on its way."""
        if self._known is None:
            raise self._uncertain() from error
        for delay in _SEARCH_DELAYS:
            yield delay
            sent = [message for message in (yield from self._history()) if message.role == "user"]
            if sent and sent[-1].content == self._content:
                return len(sent)
        raise self._uncertain() from error

    def _history(self) -> Generator[Step, Any, list[Message]]:
        messages: list[Message] = []
        while True:
            after = messages[-1].sequence if messages else None
            page: list[Message] = yield calls.list_messages(self.session_id, after=after, limit=_PAGE)
            messages += page
            if len(page) < _PAGE:
                return messages

    def _uncertain(self) -> AshError:
        return ConnectionFailed(
            f"the connection broke before the server confirmed the message; it may or may not have reached session {self.session_id}. "
            "It was not sent a second time: look at the session's messages, then send it again if it is not among them"
        )


class FollowState(StreamState):
    """The stream of a whole session, across its turns. It is over when the session has ended."""

    def __init__(self, session_id: str, after: int) -> None:
        super().__init__(session_id, after)

    def plan(self, error: Exception) -> Generator[Step, Any, Call[None]]:
        if isinstance(error, NothingFollows):
            self.is_finished = True
        else:
            yield self._pause(error)
        if isinstance(error, StreamOver):
            session = yield calls.get_session(self.session_id)
            self.is_finished = session.status == "ended"
        return calls.follow(self.session_id, self.last_id or 0)


class StreamOver(BrokenResponse):
    """The server closed the stream in good order, though not at its end."""

    def __init__(self) -> None:
        super().__init__("the server closed the stream before its end")


class TurnCollector:
    """Puts the events of one turn together. Pure; feed it events in order, then ask for the result."""

    def __init__(self) -> None:
        self._messages: list[Json] = []
        self._texts: list[str] = []
        self._error = ""
        self._is_over = False
        self._done: Json = {}

    def feed(self, event: Event) -> None:
        if event.type == "message" and event.data.get("type") != "stream_event":
            self._messages.append(event.data)
            self._texts += [event.text] if event.text else []
        elif event.type == "error":
            self._error = str(event.data) or "the turn failed"
        elif event.type == "done":
            self._done, self._is_over = event.data, True

    def result(self) -> TurnResult:
        """Raises TurnFailed when the turn ended in an error, or when nobody knows how it ended."""
        if not self._is_over and not self._error:
            raise TurnFailed("the stream ended before the turn did; look at the session's messages for what became of it")
        status = str(self._done.get("status") or "completed")
        if self._error or status == "failed":
            raise TurnFailed(self._error or "the turn failed")
        last: Json = next((message for message in reversed(self._messages) if message.get("type") == "result"), {})
        answer = last.get("result")
        return TurnResult(
            text=answer if isinstance(answer, str) else "".join(self._texts[-1:]),
            status=status,
            is_error=bool(last.get("is_error")),
            usage=last.get("usage") or {},
            cost_usd=last.get("total_cost_usd"),
            num_turns=last.get("num_turns"),
            duration_ms=last.get("duration_ms"),
            turn_id=str(self._done.get("turnId") or ""),
            messages=tuple(self._messages),
            raw=last,
        )
