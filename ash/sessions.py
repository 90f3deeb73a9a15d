"""Sessions: create, message, pause, resume, stop, end. Composes store, log, agents, gateway and sandboxes; knows no HTTP and no SQL.

An active session needs no process: one that has been idle gives up its sandbox and keeps its status, and its next message
starts a new one on the same folder, with the conversation rebuilt from the log.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from types import TracebackType
from typing import Any, NamedTuple

from ash import __version__, models
from ash.agents import Agents, check_env
from ash.config import Config
from ash.errors import AgentNotFound, AgentUnusable, AshError, CapacityReached, InvalidRequest, SessionEnded
from ash.events import EventLog
from ash.gateway import Gateway, ModelAccess
from ash.models import ACTIVE, ENDED, ERROR, PAUSED, STARTING, STOPPED, Agent, Json, NewEvent, Session
from ash.sandbox import ExecResult, Sandbox, Sandboxes, SandboxSpec
from ash.store import KEEP, Store
from ash.tasks import Tasks
from ash.turns import ActiveTurn, LiveSession

log = logging.getLogger(__name__)

_SAID = (models.TURN_STARTED, models.ASSISTANT_MESSAGE, models.USER_MESSAGE)
_ENDED = (models.TURN_ENDED,)
_PAGE = 1000
_CHANGEABLE = ("allowedTools", "disallowedTools", "betas", "subagents", "initialAgent", "permissionMode", "systemPrompt")
_NOT_ACTIVE = {
    PAUSED: "Session is paused; resume it with POST /api/sessions/{id}/resume",
    STOPPED: "Session is stopped; resume it with POST /api/sessions/{id}/resume",
    ERROR: "Session is error; resume it with POST /api/sessions/{id}/resume",
    STARTING: "Session is starting; try again in a moment",
    ENDED: "Session is ended; create a new one",
}

Transcript = list[Json]
"""Messages as the model API takes them. Named here, because inside the class `list` is a method."""
Content = str | list[Any]
Lines = list[Json]
Found = tuple[list[Session], int]
Events = list[models.Event]


class Turn(NamedTuple):
    """A started turn. `first_seq` is the sequence number of its first event in the session's log."""

    id: str
    first_seq: int


class Sessions:
    """An async context manager: entering it puts right what a dead server left behind, leaving it ends every turn and sandbox."""

    def __init__(self, *, store: Store, log: EventLog, agents: Agents, gateway: Gateway, sandboxes: Sandboxes, config: Config) -> None:
        self._store, self._log, self._agents, self._gateway, self._sandboxes = store, log, agents, gateway, sandboxes
        self._config = config
        self._sessions_dir = os.path.join(config.data_dir, "sessions")
        self._live: dict[str, LiveSession] = {}
        self._tasks = Tasks()
        self._serving = Tasks()
        self._counters: Counter[str] = Counter()
        self._is_closing = False

    async def __aenter__(self) -> Sessions:
        await asyncio.to_thread(os.makedirs, self._sessions_dir, 0o711, True)
        await self._reconcile()
        _ = self._tasks.start(self._hibernate_idle(), "hibernate idle sessions")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.drain()
        await self._tasks.cancel()
        await self._serving.cancel()

    async def _reconcile(self) -> None:
        """Put right what the last server process left: its sandboxes, the turns it did not end, the sessions it did not finish starting."""
        left = await self._store.list_sandboxes()
        reaped = await self._sandboxes.reap([handle for _, handle in left])
        for _, handle in left:
            await self._store.delete_sandbox(handle.id)
        turns = await self._store.open_turns()
        for session_id, turn_id in turns:
            lost = {"error": "The server stopped while this turn was running. The conversation is kept: send the message again."}
            ended = {"turnId": turn_id, "status": "failed"}
            await self._log.append(session_id, [NewEvent(models.TURN_FAILED, lost), NewEvent(models.TURN_ENDED, ended)], sync=True)
        starting = await self._store.fail_starting()
        if reaped or turns or starting:
            log.info("after an unclean stop: %d sandboxes reaped, %d turns ended, %d unfinished sessions", reaped, len(turns), starting)

    async def drain(self) -> None:
        """Refuse new turns, give the running ones `shutdown_timeout` seconds, then end them and every sandbox. Idempotent."""
        self._is_closing = True
        running = [live.turn for live in self._live.values() if live.turn is not None]
        if running:
            log.info("waiting up to %g s for %d running turns", self._config.shutdown_timeout, len(running))
            waits = [asyncio.create_task(turn.ended.wait()) for turn in running]
            _, pending = await asyncio.wait(waits, timeout=self._config.shutdown_timeout)
            for wait in pending:
                wait.cancel()
        await asyncio.gather(*(self._shut(live) for live in list(self._live.values())))
        await self._serving.wait(timeout=5.0)

    async def _shut(self, live: LiveSession) -> None:
        turn = live.turn
        if turn is not None:
            turn.error = "The server is shutting down. The conversation is kept: send the message again."
            await live.finish(turn, "failed")
        await self._give_up(live, grace=2.0)

    # Creating and finding

    async def create(self, tenant_id: str, agent_name: str, *, model: str | None = None, options: Json | None = None) -> Session:
        """A new session on the newest version of the agent, ready for its first message. Its sandbox is warm when one waits."""
        self._refuse_when_closing()
        options = {key: value for key, value in (options or {}).items() if value is not None}
        if options.get("credentialId"):
            raise InvalidRequest("Invalid or inaccessible credential")
        check_env(options.get("extraEnv") or {}, "extraEnv")
        agent = await self._agent(tenant_id, agent_name)
        self._check_folder(agent.name, agent.digest)
        session = self._new_session(agent, model or await self._agent_model(agent.digest), options)
        await self._store.create_session(session)
        live = self._live_session(session.id)
        try:
            async with live.lock:
                sandbox = await self._start(session, live, is_fresh=True, env=agent.env)
                active, _ = await asyncio.gather(
                    self._store.transition(session.id, ACTIVE, sandbox_id=sandbox.id),
                    self._record_change(session.id, "created", STARTING, ACTIVE, agentName=agent.name, model=session.model),
                )
        except AshError as error:
            await self._fail_creation(session, live, error)
            raise
        return active or session

    async def _agent(self, tenant_id: str, name: str) -> Agent:
        try:
            return await self._agents.get(tenant_id, name)
        except AgentNotFound as error:
            raise AgentNotFound(f'Agent "{name}" not found; `ash deploy` makes one') from error

    def _new_session(self, agent: Agent, model: str | None, options: Json) -> Session:
        id, moment = models.new_id(), models.now()
        return Session(
            id, agent.tenant_id, agent.name, agent.version, agent.digest, STARTING, model, options, None, id, moment, moment
        )  # fmt: skip

    async def _agent_model(self, digest: str) -> str | None:
        model = (await self._agents.settings(digest)).get("model")
        return model if isinstance(model, str) else None

    def _check_folder(self, name: str, digest: str) -> None:
        if not os.path.isdir(self._agents.folder(digest)):
            raise AgentUnusable(f'The files of agent "{name}" are missing on the server; deploy it again')

    async def _fail_creation(self, session: Session, live: LiveSession, error: AshError) -> None:
        await self._give_up(live, grace=0)
        await self._store.transition(session.id, ERROR)
        await self._record_change(session.id, "failed", STARTING, ERROR, error=error.message)

    async def get(self, tenant_id: str, id: str) -> Session:
        return await self._store.get_session(tenant_id, id)

    async def list(
        self, tenant_id: str, *, agent: str | None = None, status: str | None = None, limit: int | None = None, offset: int = 0
    ) -> Found:
        return await self._store.list_sessions(tenant_id, agent=agent, status=status, limit=limit, offset=offset)

    def live(self, id: str) -> Json:
        """What only the running server knows of a session, as fields of its wire object."""
        turn = self._live[id].turn if id in self._live else None
        return {"turn": {"id": turn.id, "state": "running"} if turn is not None else None}

    def status(self) -> Json:
        """Counters for health and metrics."""
        return {
            "active_sandboxes": sum(live.sandbox is not None for live in self._live.values()),
            "running_turns": sum(live.turn is not None for live in self._live.values()),
            "pool": self._sandboxes.status(),
            "turns_started": self._counters["started"],
            "turns_by_status": {status: self._counters[status] for status in ("completed", "interrupted", "failed")},
            "wakes": self._counters["wakes"],
            "hibernations": self._counters["hibernations"],
        }

    # Turns

    async def send(self, tenant_id: str, id: str, content: Content, options: Json | None = None) -> Turn:
        """Start a turn. Returns once its first event is in the log; the turn then goes on whoever listens.

        Raises InvalidRequest when the session is not active and TurnRunning while another turn runs.
        """
        self._refuse_when_closing()
        session = await self._store.get_session(tenant_id, id)
        live = self._live_session(id)
        turn = ActiveTurn(content, options or {})
        if live.sandbox is None or live.lock.locked():
            async with live.lock:
                session = await self._store.get_session(tenant_id, id)
                self._begin(session, live, turn)
        else:
            self._begin(session, live, turn)
        first = NewEvent(models.TURN_STARTED, {"turnId": turn.id, "content": content, "options": options or {}, "version": __version__})
        try:
            event, *_ = await self._log.append(id, [first])
        except BaseException:  # without its first event there is no turn: free the place, whatever the reason
            live.turn = None
            raise
        self._counters["started"] += 1
        _ = self._tasks.start(self._run_turn(session, live, turn), f"turn {turn.id}")
        return Turn(turn.id, event.seq)

    def _begin(self, session: Session, live: LiveSession, turn: ActiveTurn) -> None:
        self._require_active(session)
        live.begin(turn)

    def _require_active(self, session: Session) -> None:
        if session.status != ACTIVE:
            raise InvalidRequest(_NOT_ACTIVE[session.status].replace("{id}", session.id))

    async def _run_turn(self, session: Session, live: LiveSession, turn: ActiveTurn) -> None:
        try:
            sandbox = await self._ensure_sandbox(session, live, exclude=turn)
            await live.query(turn, sandbox)
            await live.watch(turn, self._config.turn_timeout, self._config.hang_timeout)
            await self._store.update_session(session.id, last_active_at=models.now())
        except AshError as error:
            await live.finish(turn, "failed", error.message)

    async def interrupt(self, tenant_id: str, id: str) -> bool:
        """End the running turn, at whatever point it is. False when none runs."""
        await self._store.get_session(tenant_id, id)
        live = self._live.get(id)
        if live is None or live.turn is None:
            return False
        await live.interrupt(live.turn)
        return True

    # The sandbox of a session

    def _live_session(self, id: str) -> LiveSession:
        if id not in self._live:
            self._live[id] = LiveSession(id, self._log, self._counters)
        return self._live[id]

    async def _ensure_sandbox(self, session: Session, live: LiveSession, exclude: ActiveTurn | None = None) -> Sandbox:
        """The session's sandbox, started on its folder when it has none. `exclude` is the turn that is not yet part of the past."""
        async with live.lock:
            if live.sandbox is None:
                session = await self._store.get_session(session.tenant_id, session.id)  # it may have been paused meanwhile
                self._require_active(session)
                self._check_folder(session.agent_name, session.agent_digest)
                self._counters["wakes"] += 1
                transcript = await self._transcript(session.id, exclude)
                sandbox = await self._start(session, live, is_fresh=False, transcript=transcript)
                await self._store.update_session(session.id, sandbox_id=sandbox.id)
                return sandbox
            if live.needs_init:
                session = await self._store.get_session(session.tenant_id, session.id)
                await self._init(live.sandbox, session, await self._agent_env(session), await self._transcript(session.id, exclude))
                live.needs_init = False
            return live.sandbox

    async def _start(
        self,
        session: Session,
        live: LiveSession,
        *,
        is_fresh: bool,
        env: dict[str, str] | None = None,
        transcript: Transcript | None = None,
    ) -> Sandbox:
        """A sandbox for the session, initialized and served. `env` is that of its agent, where the caller has it."""
        folder = os.path.join(self._sessions_dir, session.id)
        sandbox = await self._sandboxes.claim(SandboxSpec(session.id, folder, self._agents.folder(session.agent_digest), is_fresh))
        try:
            variables = env if env is not None else await self._agent_env(session)
            _ = await asyncio.gather(
                self._store.save_sandbox(session.id, sandbox.handle), self._init(sandbox, session, variables, transcript or [])
            )
        except BaseException:  # a sandbox that nobody will own must not live on, whatever went wrong
            await asyncio.shield(self._discard(sandbox))
            raise
        live.sandbox, live.needs_init = sandbox, False
        _ = self._serving.start(self._serve(live, sandbox), f"sandbox {sandbox.id}")
        return sandbox

    async def _discard(self, sandbox: Sandbox) -> None:
        await sandbox.stop(grace=0)
        await self._store.delete_sandbox(sandbox.id)

    async def _serve(self, live: LiveSession, sandbox: Sandbox) -> None:
        await live.pump(sandbox)
        await self._store.delete_sandbox(sandbox.id)
        self._forget_if_idle(live)

    async def _init(self, sandbox: Sandbox, session: Session, variables: dict[str, str], transcript: Transcript) -> None:
        model = session.model or self._gateway.default_model()
        self._gateway.bind(sandbox.id, ModelAccess(session.id, session.tenant_id, model))
        agent = {"name": session.agent_name, "version": session.agent_version, "sessionId": session.id}
        options = {key: value for key, value in session.options.items() if key not in ("extraEnv", "credentialId")}
        env = {**variables, **session.options.get("extraEnv", {})}
        await sandbox.init(agent, {**options, "model": model, "env": env}, transcript)

    async def _agent_env(self, session: Session) -> dict[str, str]:
        try:
            return (await self._agents.get(session.tenant_id, session.agent_name)).env
        except AshError:  # the agent was deleted; its sessions go on without its environment
            return {}

    async def _transcript(self, id: str, exclude: ActiveTurn | None) -> Transcript:
        said = await self._read_all(id, _SAID)
        ended = await self._read_all(id, _ENDED)  # asked for by itself, as the log has an index for each of the two
        events = sorted([*said, *ended], key=lambda event: event.seq)
        return models.rebuild_transcript([event for event in events if exclude is None or event.data.get("turnId") != exclude.id])

    async def _read_all(self, id: str, types: tuple[str, ...]) -> Events:
        found: Events = []
        while page := await self._log.read(id, after=found[-1].seq if found else 0, limit=_PAGE, types=types):
            found += page
        return found

    async def _give_up(self, live: LiveSession, grace: float = 5.0) -> None:
        await live.give_up(grace)
        self._forget_if_idle(live)

    def _forget_if_idle(self, live: LiveSession) -> None:
        if live.sandbox is None and live.turn is None and not live.lock.locked() and self._live.get(live.session_id) is live:
            del self._live[live.session_id]

    async def _hibernate_idle(self) -> None:
        interval = min(30.0, self._config.idle_timeout / 4)
        while True:
            await asyncio.sleep(interval)
            oldest = time.monotonic() - self._config.idle_timeout
            for live in list(self._live.values()):
                if live.sandbox is not None and live.is_idle and live.idle_since < oldest:
                    await self._hibernate(live)

    async def _hibernate(self, live: LiveSession) -> None:
        async with live.lock:
            if live.turn is None:
                self._counters["hibernations"] += 1
                await live.give_up()
        self._forget_if_idle(live)

    # Changing a session

    async def update_config(self, tenant_id: str, id: str, changes: Json) -> Session:
        """Merge `changes` (model and the options that may change; None takes one back) into the session, from its next message on."""
        session = await self._store.get_session(tenant_id, id)
        if session.status == ENDED:
            raise SessionEnded("Session has ended — create a new session")
        options = {**session.options, **{key: changes[key] for key in _CHANGEABLE if key in changes}}
        given = {key: value for key, value in options.items() if value is not None}
        session = await self._store.update_session(id, model=changes.get("model", KEEP), options=given)
        if id in self._live:
            self._live[id].needs_init = True
        return session

    async def pause(self, tenant_id: str, id: str) -> Session:
        """Give up the sandbox by the user's own wish; a running turn is interrupted first. Only `resume` makes it active again."""
        return await self._leave(tenant_id, id, PAUSED, "pause", "paused")

    async def stop(self, tenant_id: str, id: str) -> Session:
        return await self._leave(tenant_id, id, STOPPED, "stop", "stopped")

    async def end(self, tenant_id: str, id: str) -> Session:
        """End the session for good. Its row, messages and files stay. Ending it again changes nothing."""
        session = await self._store.get_session(tenant_id, id)
        return session if session.status == ENDED else await self._leave(tenant_id, id, ENDED, "end", "ended")

    async def _leave(self, tenant_id: str, id: str, to: str, verb: str, action: str) -> Session:
        before = await self._store.get_session(tenant_id, id)
        live = self._live_session(id)
        async with live.lock:
            session = await self._store.transition(id, to)
            if session is not None:
                await self._let_go(live)
        self._forget_if_idle(live)
        if session is None:
            current = await self._store.get_session(tenant_id, id)
            raise InvalidRequest(f'Cannot {verb} session with status "{current.status}"')
        await self._record_change(id, action, before.status, to)
        return session

    async def _let_go(self, live: LiveSession) -> None:
        """End the turn, then the sandbox; the latter in the background, as nobody has to wait for its last process."""
        if live.turn is not None:
            await live.interrupt(live.turn)
        sandbox, live.sandbox = live.sandbox, None
        if sandbox is not None:
            _ = self._tasks.start(sandbox.stop(), f"stop sandbox {sandbox.id}")

    async def resume(self, tenant_id: str, id: str) -> Session:
        """Make a paused, stopped or failed session active again; its sandbox starts in the background. No-op when active."""
        session = await self._store.get_session(tenant_id, id)
        if session.status == ENDED:
            raise SessionEnded("Session has ended — create a new session")
        if session.status == ACTIVE:
            return session
        self._refuse_when_closing()
        self._check_folder(session.agent_name, session.agent_digest)
        resumed = await self._store.transition(id, ACTIVE)
        if resumed is None:
            return await self._store.get_session(tenant_id, id)
        await self._record_change(id, "resumed", session.status, ACTIVE, path="cold", source="local")
        _ = self._tasks.start(self._wake(resumed), f"wake {id}")
        return resumed

    async def _wake(self, session: Session) -> None:
        """Have the sandbox ready before the next message asks for it. A failure is left for that message to report."""
        live = self._live_session(session.id)
        try:
            await self._ensure_sandbox(session, live, exclude=live.turn)
        except AshError as error:
            log.warning("session %s did not wake ahead of its next message: %s", session.id, error)

    async def fork(self, tenant_id: str, id: str) -> Session:
        """A paused copy: the conversation and the workspace as they are now. It goes its own way from here."""
        parent = await self._store.get_session(tenant_id, id)
        self._check_folder(parent.agent_name, parent.agent_digest)
        moment, fork_id = models.now(), models.new_id()
        child = parent._replace(
            id=fork_id, status=PAUSED, parent_session_id=id, sandbox_id=fork_id, created_at=moment, last_active_at=moment
        )  # fmt: skip
        await self._sandboxes.copy_folder(os.path.join(self._sessions_dir, id), os.path.join(self._sessions_dir, fork_id))
        await self._store.fork_session(child)
        await self._record_change(fork_id, "forked", PAUSED, PAUSED, parentSessionId=id)
        return child

    async def _record_change(self, id: str, action: str, old: str, new: str, **more: Any) -> None:
        await self._log.append(id, [NewEvent(models.SESSION_STATUS_CHANGED, {"action": action, "from": old, "to": new, **more})])

    # Beside the conversation

    async def exec(self, tenant_id: str, id: str, command: str, *, timeout: float = 30.0, **options: Any) -> ExecResult:
        """Run a shell command in the workspace, beside a turn that may be running; wakes the session when it has no sandbox."""
        session = await self._store.get_session(tenant_id, id)
        self._require_active(session)
        live = self._live_session(id)
        sandbox = live.sandbox or await self._ensure_sandbox(session, live, exclude=live.turn)
        live.idle_since = time.monotonic() + timeout
        result = await sandbox.exec(command, timeout=timeout, **options)
        live.idle_since = time.monotonic()
        return result

    async def logs(self, tenant_id: str, id: str, after: int = -1) -> Lines:
        """What the session's sandbox wrote beside its events; empty while it has none."""
        await self._store.get_session(tenant_id, id)
        sandbox = self._live[id].sandbox if id in self._live else None
        return sandbox.logs(after) if sandbox is not None else []

    def _refuse_when_closing(self) -> None:
        if self._is_closing:
            raise CapacityReached("The server is shutting down; try again in a moment")
