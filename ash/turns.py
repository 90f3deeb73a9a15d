"""The living part of a session: its sandbox, at most one turn, and the pump that writes what the bridge says into the log.

It knows no requests and no records. Whatever dies, `LiveSession.finish` writes the one event that ends a turn.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ash import models
from ash.errors import AshError, InvalidRequest, ProtocolError, SandboxFailed, TurnRunning
from ash.events import EventLog
from ash.limits import SessionLimits
from ash.models import Json, NewEvent
from ash.sandbox import Sandbox

log = logging.getLogger(__name__)

INTERRUPT_GRACE = 10.0
"""Seconds an interrupted bridge gets to end its turn before its sandbox is stopped."""
_RETRY_DELAYS = (0.1, 0.5, 2.0, 10.0, 30.0)


class ActiveTurn:
    """A turn under way. `ended` is set once its terminal event is in the log."""

    def __init__(self, content: str | list[Any], options: Json) -> None:
        self.id = models.new_id()
        self.content = content
        self.options = options
        self.streamed = bool(options.get("includePartialMessages"))
        self.interrupted = False
        self.sandbox: Sandbox | None = None  # the one that was asked to run it
        self.error: str | None = None
        self.overdue: str | None = None  # why the server ended it
        self.met: list[Json] = []  # the limit that was the reason
        self.last_sign = time.monotonic()
        self.recorded_bytes = 0
        self.is_ending = False
        self.ended = asyncio.Event()


class LiveSession:
    """What the server holds in memory for one session, for as long as it has users, a sandbox or a turn.

    `lock` guards its status together with its sandbox, `config_lock` the merging of changes to its configuration.
    """

    def __init__(self, session_id: str, event_log: EventLog, counters: Counter[str], max_turn_bytes: int, limits: SessionLimits) -> None:
        self.limits = limits  # those of its sandbox, once it has one
        self.session_id = session_id
        self.lock = asyncio.Lock()
        self.config_lock = asyncio.Lock()
        self.users = 0
        self.commands = 0  # of `exec`, under way
        self.dying: Sandbox | None = None  # given up, perhaps not gone yet
        self.sandbox: Sandbox | None = None
        self.turn: ActiveTurn | None = None
        self.needs_init = False
        self.idle_since = time.monotonic()
        self._counters = counters
        self._max_turn_bytes = max_turn_bytes
        self._log = event_log

    @property
    def is_idle(self) -> bool:
        return self.turn is None and not self.commands and not self.lock.locked()

    @property
    def is_unused(self) -> bool:
        return not self.users and self.sandbox is None and self.turn is None

    def begin(self, turn: ActiveTurn) -> None:
        """Take the one place for a turn. Raises TurnRunning; nothing is awaited, so that no second turn slips in."""
        if self.turn is not None:
            raise TurnRunning("A turn is already running in this session; wait for its `done` event or interrupt it")
        self.turn = turn

    async def pump(self, sandbox: Sandbox) -> None:
        """Write a sandbox's events into the log until it is gone, then end the turn that it left open."""
        trouble = ""
        try:
            async for events in sandbox.batches():
                await self._record(events)
        except Exception as error:  # the edge of the loop: whatever it is, the turn must end and the sandbox must not run on unheard
            log.exception("session %s: its events could not be recorded", self.session_id)
            trouble = f"its events could not be recorded: {error}"
            await sandbox.stop(grace=0)
        if self.sandbox is sandbox:
            self.sandbox = None
        met = [{"limit": sandbox.limit_reached, "message": sandbox.failure}] if sandbox.limit_reached else []
        if self.turn is not None and self.turn.sandbox is sandbox:
            reason = trouble or sandbox.failure or "the sandbox ended during the turn"
            await self.finish(self.turn, "failed", reason, before=self._note_limits(met))
        elif met:
            await self._log_limits(met)

    def _note_limits(self, met: list[Json]) -> list[NewEvent]:
        for data in met:
            self._counters[f"limit {data['limit']}"] += 1
        return [NewEvent(models.LIMIT_REACHED, data) for data in met]

    async def _log_limits(self, met: list[Json]) -> None:
        try:
            await self._log.append(self.session_id, self._note_limits(met))
        except AshError as error:
            log.error("session %s: that it reached a limit could not be recorded: %s", self.session_id, error)

    async def _record(self, batch: list[Json]) -> None:
        """Events that came together share a commit."""
        turn, entries = self.turn, list[NewEvent]()
        for event in batch:
            if turn is None or turn.is_ending or event.get("turn_id") != turn.id:
                continue
            turn.last_sign = time.monotonic()
            if event["ev"] in ("message", "delta"):
                self._count(turn, event["data"])
                entries += models.expand(event["data"], streamed=turn.streamed)
            elif event["ev"] == "error":
                turn.error = event["error"]
            elif event["ev"] == "done":
                met = turn.sandbox.limits_met() if turn.sandbox is not None else []
                await self.finish(turn, event["status"], event.get("error"), before=[*entries, *self._note_limits(met)])
                return  # a bridge has one turn at a time: what else it sent belongs to none
        if turn is None or not turn.is_ending:
            await self._log.append(self.session_id, entries)

    def _count(self, turn: ActiveTurn, data: Json) -> None:
        """All sessions share one disk: a turn that floods its log is ended. Raises ProtocolError."""
        turn.recorded_bytes += len(models.dump(data))
        if turn.recorded_bytes > self._max_turn_bytes:
            raise ProtocolError(f"the turn produced more than {self._max_turn_bytes >> 20} MiB of events (max_turn_mb)")

    async def finish(self, turn: ActiveTurn, status: str, error: str | None = None, before: Sequence[NewEvent] = ()) -> None:
        """End a turn with its terminal event, synced to disk, behind the entries `before`. Only the first call for a turn counts."""
        if self.turn is not turn:
            return
        if turn.is_ending:
            await turn.ended.wait()
            return
        turn.is_ending = True
        if turn.interrupted and status == "failed":
            status = "interrupted"
        elif turn.overdue is not None and status == "interrupted":
            status, turn.error = "failed", turn.overdue  # nobody asked for it but the server
        reason = NewEvent(models.TURN_FAILED, {"error": turn.error or turn.overdue or error or "the turn failed"})
        end = NewEvent(models.TURN_ENDED, {"turnId": turn.id, "status": status})
        events = [*before, *([*self._note_limits(turn.met), reason] if status == "failed" else []), end]
        await self._append_surely(events)
        # Whoever appended goes on before any follower of the log does, so a client that reads `done` finds the place free.
        self.turn = None
        self.idle_since = time.monotonic()
        self._counters[status] += 1
        turn.ended.set()

    async def _append_surely(self, events: list[NewEvent]) -> None:
        """Again and again, however long the disk stays full: a turn without its end would be one that runs for ever."""
        for delay in itertools.chain(_RETRY_DELAYS, itertools.repeat(_RETRY_DELAYS[-1])):
            try:
                await self._log.append(self.session_id, events, sync=True)
                return
            except InvalidRequest as error:  # something the bridge said cannot be stored; the end has to be all the same
                log.error("session %s: the last events of its turn were dropped: %s", self.session_id, error)
                events = events[-1:]
            except AshError as error:
                log.error("session %s: the end of its turn could not be recorded, next try in %s s: %s", self.session_id, delay, error)
                await asyncio.sleep(delay)

    async def query(self, turn: ActiveTurn, sandbox: Sandbox) -> None:
        """Hand the turn to the bridge. From here on the pump ends it."""
        if self.turn is not turn or turn.is_ending:  # ended while its sandbox was starting
            return
        turn.sandbox = sandbox
        turn.last_sign = time.monotonic()
        try:
            await sandbox.query(turn.id, turn.content, turn.options)
        except SandboxFailed as error:
            await self.finish(turn, "failed", str(error))

    async def watch(self, turn: ActiveTurn, turn_timeout: float, hang_timeout: float) -> None:
        """Wait for the turn's end; a turn that takes too long, or whose bridge fell silent, is ended here."""
        deadline = time.monotonic() + turn_timeout
        while not turn.ended.is_set():
            limit = min(deadline, turn.last_sign + hang_timeout)
            try:
                async with asyncio.timeout(max(0.0, limit - time.monotonic())):
                    await turn.ended.wait()
            except TimeoutError:
                await self._check_overdue(turn, deadline, turn_timeout, hang_timeout)

    async def _check_overdue(self, turn: ActiveTurn, deadline: float, turn_timeout: float, hang_timeout: float) -> None:
        moment = time.monotonic()
        if moment >= deadline:
            turn.overdue = f"the turn took longer than {turn_timeout:g} s, the session's limit (turn_timeout), and was ended"
            turn.met = [{"limit": "turn_time", "message": turn.overdue}]
            await self.break_off(turn, "failed")
        elif moment >= turn.last_sign + hang_timeout:
            turn.overdue = f"the agent's process gave no sign of life for {hang_timeout:g} seconds and was ended"
            await self.break_off(turn, "failed", grace=0)

    async def interrupt(self, turn: ActiveTurn) -> None:
        """Ask the bridge to end the turn now. One that does not within INTERRUPT_GRACE loses its sandbox."""
        turn.interrupted = True
        await self.break_off(turn, "interrupted")

    async def break_off(self, turn: ActiveTurn, status: str, grace: float = INTERRUPT_GRACE) -> None:
        """End a turn: by asking its bridge first, for `grace` seconds, then by taking its sandbox away."""
        sandbox = turn.sandbox
        if sandbox is not None and grace:
            await self._ask_to_end(turn, sandbox, grace)
        if self.turn is not turn:
            return
        if sandbox is not None and self.sandbox is sandbox:
            self.sandbox, self.dying = None, sandbox  # before the place is free: the next turn must not be handed to it
        await self.finish(turn, status)
        if sandbox is not None:
            await sandbox.stop(grace=0)

    async def _ask_to_end(self, turn: ActiveTurn, sandbox: Sandbox, grace: float) -> None:
        try:
            async with asyncio.timeout(grace):
                await sandbox.interrupt(turn.id)
                await turn.ended.wait()
        except (TimeoutError, SandboxFailed):
            log.warning("session %s: its bridge did not end the turn when asked", self.session_id)

    async def give_up(self, grace: float = 5.0) -> None:
        """Stop the sandbox, if there is one. The session's folder stays, so that the session can wake again."""
        sandbox, self.sandbox = self.sandbox, None
        if sandbox is not None:
            self.dying = sandbox
            await sandbox.stop(grace)

    async def wait_until_gone(self) -> None:
        """Two bridges on one folder would be one too many: wait for the last one's end."""
        if self.dying is not None:
            await self.dying.stop(grace=0)
            self.dying = None
