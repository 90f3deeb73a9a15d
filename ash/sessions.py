"""Sessions: create, message, pause, resume, stop, end. Composes store, log, agents, gateway and sandboxes; knows no HTTP and no SQL.

An active session needs no process: one that has been idle gives up its sandbox and keeps its status, and its next message
starts a new one on the same folder, with the conversation rebuilt from the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

from ash import __version__, limits, models
from ash.agents import Agents, check_env
from ash.config import Config
from ash.credentials import Credentials
from ash.egress import Egress, EgressAccess
from ash.errors import (
    AgentNotFound,
    AgentUnusable,
    AshError,
    CapacityReached,
    CredentialUnusable,
    InvalidRequest,
    SandboxUnresponsive,
    SessionEnded,
)
from ash.events import EventLog
from ash.gateway import Gateway, ModelAccess
from ash.limits import SessionLimits
from ash.models import ACTIVE, ENDED, ERROR, PAUSED, STARTING, STOPPED, TRANSITIONS, Agent, Json, NewEvent, Session
from ash.policy import Policies
from ash.sandbox import ExecResult, Sandbox, Sandboxes, SandboxSpec, Ticket
from ash.store import KEEP, Store
from ash.tasks import Tasks
from ash.turns import ActiveTurn, LiveSession

log = logging.getLogger(__name__)

_SAID = (models.TURN_STARTED, models.ASSISTANT_MESSAGE, models.USER_MESSAGE)
_ENDED = (models.TURN_ENDED,)
_PAGE = 1000
_CHANGEABLE = ("allowedTools", "disallowedTools", "betas", "subagents", "initialAgent", "permissionMode", "systemPrompt")
_NOT_ACTIVE = {
    PAUSED: "Session is paused; resume it first: `ash session resume {id}`, or POST …/resume",
    STOPPED: "Session is stopped; resume it first: `ash session resume {id}`, or POST …/resume",
    ERROR: "Session is error; resume it first: `ash session resume {id}`, or POST …/resume",
    STARTING: "Session is starting; try again in a moment",
    ENDED: "Session is ended; create a new one",
}

_HAS_ENDED = "Session has ended — create a new session"
_NEEDS_ISOLATION = (
    "Credentials for hosts are put in by the egress proxy, which a server with --sandbox none has not: start it without, or delete them"
)
_RECORD_TIMEOUT = 5.0
_IDLE_CHECK = 5.0
_RECENT_USE = 10.0
INIT_PATIENCE = 5.0
"""Seconds a sandbox gets to take its agent before another one takes its place."""
ASKED_LIMITS = "limits"
"""The option that keeps which limits were asked for; which are in force depends on the policy as well."""
AGENT_ENV = "agentEnv"
"""The option that keeps the agent's environment as it was when the session began, as its files and its version are kept."""
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

    def __init__(
        self, *, store: Store, log: EventLog, agents: Agents, gateway: Gateway, egress: Egress, sandboxes: Sandboxes,
        config: Config, policies: Policies, credentials: Credentials,
    ) -> None:  # fmt: skip
        self._egress = egress
        self._credentials = credentials
        self._policies = policies
        self._server_limits = limits.of_server(config)
        self._default_limits = limits.resolve({}, self._server_limits, {})
        self._store, self._log, self._agents, self._gateway, self._sandboxes = store, log, agents, gateway, sandboxes
        self._config = config
        self._sessions_dir = os.path.join(config.data_dir, "sessions")
        self._live: dict[str, LiveSession] = {}
        self._tasks = Tasks()
        self._serving = Tasks()
        self._counters: Counter[str] = Counter()
        sandboxes.on_pressure = self._make_room
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
        with contextlib.suppress(TimeoutError):  # with a full disk the next start has to record the end
            async with asyncio.timeout(_RECORD_TIMEOUT):
                if turn is not None:
                    turn.error = "The server is shutting down. The conversation is kept: send the message again."
                    await live.finish(turn, "failed")
        await live.give_up(grace=2.0)
        self._forget_if_unused(live)

    # Creating and finding

    async def create(self, tenant_id: str, agent_name: str, *, model: str | None = None, options: Json | None = None) -> Session:
        """A new session on the newest version of the agent, ready for its first message. Its sandbox is warm when one waits."""
        self._refuse_when_closing()
        options = {key: value for key, value in (options or {}).items() if value is not None}
        check_env(options.get("extraEnv") or {}, "extraEnv")
        agent = await self._agent(tenant_id, agent_name)
        if options.get("credentialId"):
            await self._credentials.check(tenant_id, agent.name, options["credentialId"])
        self._check_folder(agent.name, agent.digest)
        options = {**options, **self._asked_limits(agent, options.pop("limits", {}))}
        model = model or await self._agent_model(agent.digest)
        self._gateway.require_allowed(model)
        if agent.env:
            options[AGENT_ENV] = agent.env
        session = self._new_session(agent, model, options)
        # Asked for before there is a row: of a session that is refused for want of room nothing stays.
        async with self._sandboxes.admitted(self._spec(session, self._limits(session), is_fresh=True)) as ticket:
            return await self._create(session, ticket)

    async def _create(self, session: Session, ticket: Ticket) -> Session:
        await self._store.create_session(session)
        with self._using(session.id) as live:
            try:
                async with live.lock:
                    sandbox = await self._start(session, live, ticket=ticket)
                    active, _ = await asyncio.gather(
                        self._store.transition(session.id, ACTIVE, sandbox_id=sandbox.id),
                        self._record_change(session.id, "created", STARTING, ACTIVE, agentName=session.agent_name, model=session.model),
                    )
            except BaseException as error:  # whatever it was, the session must not stay `starting`
                await asyncio.shield(self._fail_creation(session, live, error))
                raise
        return active or session

    async def _agent(self, tenant_id: str, name: str) -> Agent:
        try:
            return await self._agents.get(tenant_id, name)
        except AgentNotFound as error:
            raise AgentNotFound(f'Agent "{name}" not found; `ash deploy` makes one') from error

    def _asked_limits(self, agent: Agent, given: Json) -> Json:
        """The option that keeps what the session and its agent ask for. Raises InvalidRequest for more than the policy allows."""
        asked = limits.parse(given)
        limits.check(asked, self._server_limits, self._policies.current.maximum_of(agent.tenant_id, agent.name))
        try:
            of_agent = limits.parse(agent.config.get("limits") or {}, "config.limits")
        except InvalidRequest as error:  # deployed before this was checked
            raise AgentUnusable(f'The limits of agent "{agent.name}" are wrong: {error.message}; deploy it again') from error
        both = {**of_agent, **asked}
        return {ASKED_LIMITS: limits.wire(both)} if both else {}

    def _limits(self, session: Session) -> SessionLimits:
        """What the session's next sandbox gets: what was asked for, within what the policy allows by now."""
        asked = limits.parse(session.options.get(ASKED_LIMITS, {}))
        return limits.resolve(asked, self._server_limits, self._policies.current.maximum_of(session.tenant_id, session.agent_name))

    def check_agent_limits(self, tenant_id: str, name: str, config: Json) -> None:
        """Raise InvalidRequest for what is wrong with `limits` in the configuration that an agent is deployed with."""
        asked = limits.parse(config.get("limits") or {}, "config.limits")
        limits.check(asked, self._server_limits, self._policies.current.maximum_of(tenant_id, name), "config.limits")

    def limits_of(self, session: Session) -> Json:
        """The limits in force, as they go over the wire: those of its sandbox, or those that its next one gets."""
        live = self._live.get(session.id)
        return (live.limits if live is not None and live.sandbox is not None else self._limits(session)).wire()

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

    async def _fail_creation(self, session: Session, live: LiveSession, error: BaseException) -> None:
        await live.give_up(grace=0)
        reason = error.message if isinstance(error, AshError) else "internal error"
        await self._record_change(session.id, "failed", STARTING, ERROR, error=reason)
        await self._store.transition(session.id, ERROR)

    async def get(self, tenant_id: str, id: str) -> Session:
        return await self._store.get_session(tenant_id, id)

    async def list(
        self, tenant_id: str, *, agent: str | None = None, status: str | None = None, limit: int | None = None, offset: int = 0
    ) -> Found:
        return await self._store.list_sessions(tenant_id, agent=agent, status=status, limit=limit, offset=offset)

    def live(self, id: str) -> Json:
        """What only the running server knows of a session, as fields of its wire object."""
        turn = self._live[id].turn if id in self._live else None
        shown = {"id": turn.id, "state": "running"} if turn is not None else None
        return {"turn": shown, "egress": self._egress.live(id)}

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
            "made_room": self._counters["made_room"],
            "replaced": self._counters["replaced"],
            "limits_reached": {limit: self._counters[f"limit {limit}"] for limit in models.LIMITS},
        }

    async def resources(self, id: str) -> Json | None:
        """What the session's sandbox uses just now; None while it has none."""
        sandbox = self._live[id].sandbox if id in self._live else None
        return await sandbox.usage() if sandbox is not None else None

    async def usages(self) -> tuple[Json, Json]:
        """What each sandbox uses just now: by session, and those that wait for one, by their own ids."""
        rest = await self._sandboxes.usages()
        owners = {live.sandbox.id: live.session_id for live in list(self._live.values()) if live.sandbox is not None}
        return {owners[id]: rest.pop(id) for id in list(rest) if id in owners}, rest

    # Turns

    async def send(self, tenant_id: str, id: str, content: Content, options: Json | None = None) -> Turn:
        """Start a turn. Returns once its first event is in the log; the turn then goes on whoever listens.

        Raises InvalidRequest when the session is not active and TurnRunning while another turn runs.
        """
        self._refuse_when_closing()
        session = await self._store.get_session(tenant_id, id)
        if options and options.get("model"):
            self._gateway.require_allowed(options["model"])
        if not isinstance(content, str):
            self._gateway.require_allowed_content(content)
        turn = ActiveTurn(content, options or {})
        with self._using(id) as live:
            if live.sandbox is None or live.lock.locked():
                async with live.lock:
                    session = await self._store.get_session(tenant_id, id)
                    await self._require_wakeable(session, live)
                    self._begin(session, live, turn)
            else:
                self._begin(session, live, turn)
            first_seq = await self._record_start(live, turn)
            self._counters["started"] += 1
            _ = self._tasks.start(self._run_turn(session, live, turn), f"turn {turn.id}")
        return Turn(turn.id, first_seq)

    async def _record_start(self, live: LiveSession, turn: ActiveTurn) -> int:
        data = {"turnId": turn.id, "content": turn.content, "options": turn.options, "version": __version__}
        try:
            event, *_ = await self._log.append(live.session_id, [NewEvent(models.TURN_STARTED, data)])
        except BaseException:  # without its first event there is no turn: free the place, whatever the reason
            live.turn = None
            raise
        return event.seq

    async def _require_wakeable(self, session: Session, live: LiveSession) -> None:
        """Refuse a message for which no sandbox can be had now, rather than let its turn fail. To be called under the session's lock."""
        self._require_active(session)
        if live.sandbox is None and live.turn is None:
            await self._sandboxes.check_wake()

    def _begin(self, session: Session, live: LiveSession, turn: ActiveTurn) -> None:
        self._require_active(session)
        live.begin(turn)

    def _require_active(self, session: Session) -> None:
        if session.status != ACTIVE:
            raise InvalidRequest(_NOT_ACTIVE[session.status].replace("{id}", session.id))

    async def _run_turn(self, session: Session, live: LiveSession, turn: ActiveTurn) -> None:
        with self._using(session.id):
            try:
                sandbox = await self._ensure_sandbox(session, live)
                await live.query(turn, sandbox)
                await live.watch(turn, live.limits.turn_timeout, self._config.hang_timeout)
            except AshError as error:
                await live.finish(turn, "failed", error.message)
            except Exception:  # the edge of a turn: one without an end would block its session for ever
                log.exception("session %s: its turn failed in an unexpected way", session.id)
                await live.finish(turn, "failed", "internal error; the server's log has the details")

    async def interrupt(self, tenant_id: str, id: str) -> bool:
        """End the running turn, at whatever point it is. False when none runs."""
        await self._store.get_session(tenant_id, id)
        with self._using(id) as live:
            if live.turn is None:
                return False
            await live.interrupt(live.turn)
        return True

    # The sandbox of a session

    @contextlib.contextmanager
    def _using(self, id: str) -> Iterator[LiveSession]:
        """The session's living part, made when there is none, and kept at least as long as the block lasts."""
        live = self._live.setdefault(id, LiveSession(id, self._log, self._counters, self._config.max_turn_mb << 20, self._default_limits))
        live.users += 1
        try:
            yield live
        finally:
            live.users -= 1
            self._forget_if_unused(live)

    def _forget_if_unused(self, live: LiveSession) -> None:
        if live.is_unused and self._live.get(live.session_id) is live:
            del self._live[live.session_id]

    async def _ensure_sandbox(self, session: Session, live: LiveSession) -> Sandbox:
        """The session's sandbox, started on its folder when it has none, and told what was changed since it was."""
        async with live.lock:
            if live.sandbox is None:
                return await self._wake_up(session, live)
            is_busy = live.turn is not None and live.turn.sandbox is live.sandbox
            if live.needs_init and not is_busy:
                live.needs_init = False  # before the row is read: a change that comes later asks again
                try:
                    session = await self._store.get_session(session.tenant_id, session.id)
                    await self._init(live.sandbox, session, await self._transcript(live), self._config.start_timeout)
                except BaseException:
                    live.needs_init = True
                    raise
            return live.sandbox

    async def _wake_up(self, session: Session, live: LiveSession) -> Sandbox:
        await live.wait_until_gone()
        live.needs_init = False
        session = await self._store.get_session(session.tenant_id, session.id)  # it may have been paused or changed meanwhile
        self._require_active(session)
        self._check_folder(session.agent_name, session.agent_digest)
        self._counters["wakes"] += 1
        sandbox = await self._start(session, live, transcript=await self._transcript(live))
        await self._store.update_session(session.id, sandbox_id=sandbox.id)
        return sandbox

    def _spec(self, session: Session, granted: SessionLimits, *, is_fresh: bool) -> SandboxSpec:
        folder = os.path.join(self._sessions_dir, session.id)
        return SandboxSpec(session.id, folder, self._agents.folder(session.agent_digest), is_fresh, granted.sandbox)

    async def _start(
        self, session: Session, live: LiveSession, *, ticket: Ticket | None = None, transcript: Transcript | None = None
    ) -> Sandbox:  # fmt: skip
        """A sandbox for the session, initialized and served; a new session brings its ticket."""
        live.limits = self._limits(session)
        for name, asked in limits.parse(session.options.get(ASKED_LIMITS, {})).items():
            if live.limits.values[name] != asked:
                log.warning("session %s gets a %s of %g, not the %g asked for: the policy was changed",
                            session.id, name, live.limits.values[name], asked)  # fmt: skip
        spec = self._spec(session, live.limits, is_fresh=ticket is not None)
        try:
            sandbox = await self._claim(session, spec, ticket, transcript or [], INIT_PATIENCE)
        except SandboxUnresponsive as error:  # it is replaced, not waited for; the session's folder is there by now
            log.warning("session %s: its sandbox is replaced: %s", session.id, error)
            self._counters["replaced"] += 1
            sandbox = await self._claim(session, spec._replace(fresh=False), None, transcript or [], self._config.start_timeout)
        live.sandbox, live.idle_since = sandbox, time.monotonic()
        _ = self._serving.start(self._serve(live, sandbox), f"sandbox {sandbox.id}")
        return sandbox

    async def _claim(
        self, session: Session, spec: SandboxSpec, ticket: Ticket | None, transcript: Transcript, patience: float
    ) -> Sandbox:  # fmt: skip
        sandbox = await self._sandboxes.claim(spec, ticket)
        try:
            saving = self._store.save_sandbox(session.id, sandbox.handle)
            _ = await asyncio.gather(saving, self._init(sandbox, session, transcript, patience))
        except BaseException:  # a sandbox that nobody will own must not live on, whatever went wrong
            await asyncio.shield(self._discard(sandbox))
            raise
        return sandbox

    async def _discard(self, sandbox: Sandbox) -> None:
        await sandbox.stop(grace=0)
        await self._store.delete_sandbox(sandbox.id)

    async def _serve(self, live: LiveSession, sandbox: Sandbox) -> None:
        with self._using(live.session_id):
            await live.pump(sandbox)
            await self._store.delete_sandbox(sandbox.id)

    async def _init(self, sandbox: Sandbox, session: Session, transcript: Transcript, patience: float) -> None:
        own = await self._credentials.open(session)
        if own.bound and self._config.sandbox == "none":
            raise CredentialUnusable(_NEEDS_ISOLATION)
        model = session.model or self._gateway.default_model(has_key=own.model_key is not None)
        access = ModelAccess(session.id, session.tenant_id, model, own.model_key, is_revoked=own.is_revoked)
        self._gateway.bind(sandbox.id, access)
        agent = {"name": session.agent_name, "version": session.agent_version, "sessionId": session.id}
        options = {key: value for key, value in session.options.items() if key not in (AGENT_ENV, ASKED_LIMITS, "extraEnv", "credentialId")}
        network = await self._agents.network(session.agent_digest)
        hosts = (*network.hosts, *(credential.rule for credential in own.bound))
        way = EgressAccess(session.id, session.tenant_id, session.agent_name, hosts, network.denied, own.bound)
        variables = self._egress.bind(sandbox.id, way)
        await self._egress.prepare(sandbox.id)
        env = {**session.options.get(AGENT_ENV, {}), **session.options.get("extraEnv", {}), **variables}
        given = {"model": model, "env": env, "toolTimeout": self._limits(session).tool_timeout}
        await sandbox.init(agent, {**options, **given}, transcript, timeout=patience)

    async def _transcript(self, live: LiveSession) -> Transcript:
        """The conversation so far, without the turn that is just beginning."""
        said = await self._read_all(live.session_id, _SAID)
        ended = await self._read_all(live.session_id, _ENDED)  # asked for by itself, as the log has an index for each of the two
        events = sorted([*said, *ended], key=lambda event: event.seq)
        beginning = live.turn.id if live.turn is not None else None
        return models.rebuild_transcript([event for event in events if event.data.get("turnId", "") != beginning])

    async def _read_all(self, id: str, types: tuple[str, ...]) -> Events:
        found: Events = []
        while page := await self._log.read(id, after=found[-1].seq if found else 0, limit=_PAGE, types=types):
            found += page
        return found

    async def _hibernate_idle(self) -> None:
        while True:
            shortest = min((live.limits.idle_timeout for live in self._live.values()), default=self._config.idle_timeout)
            await asyncio.sleep(min(_IDLE_CHECK, shortest / 4))
            moment = time.monotonic()
            for live in list(self._live.values()):
                if live.sandbox is not None and live.is_idle and live.idle_since < moment - live.limits.idle_timeout:
                    await self._hibernate(live)

    async def _hibernate(self, live: LiveSession, grace: float = 5.0) -> bool:
        with self._using(live.session_id):
            try:
                async with live.lock:
                    if live.sandbox is not None and live.turn is None and not live.commands:
                        self._counters["hibernations"] += 1
                        await live.give_up(grace)
                        return True
            except Exception:  # the edge of the loop: one session's trouble must not keep the others awake
                log.exception("session %s could not be hibernated", live.session_id)
        return False

    async def _make_room(self, is_new: bool) -> bool:
        """Hibernate the session that has been idle longest, for one that needs a sandbox. False when none can be.

        One that was in use a moment ago gives way to a session that goes on, not to a new one: two that take turns would otherwise
        only start sandboxes.
        """
        latest = time.monotonic() - (_RECENT_USE if is_new else 0.0)
        for live in sorted(self._live.values(), key=lambda live: live.idle_since):
            may_go = live.sandbox is not None and live.is_idle and live.idle_since <= latest
            if may_go and await self._hibernate(live, grace=1.0):
                self._counters["made_room"] += 1
                return True
        return False

    # Changing a session

    async def update_config(self, tenant_id: str, id: str, changes: Json) -> Session:
        """Merge `changes` (model and the options that may change; None takes one back) into the session, from its next message on."""
        with self._using(id) as live:
            async with live.config_lock:
                session = await self._store.get_session(tenant_id, id)
                if session.status == ENDED:
                    raise SessionEnded(_HAS_ENDED)
                options = {**session.options, **{key: changes[key] for key in _CHANGEABLE if key in changes}}
                given = {key: value for key, value in options.items() if value is not None}
                if "model" in changes:
                    self._gateway.require_allowed(changes["model"])
                session = await self._store.update_session(id, model=changes.get("model", KEEP), options=given)
                live.needs_init = True
        return session

    def refresh(self) -> None:
        """Something that sessions are told at their start was changed: tell those that run again, before their next messages."""
        for live in self._live.values():
            live.needs_init = True

    async def pause(self, tenant_id: str, id: str) -> Session:
        """Give up the sandbox by the user's own wish; a running turn is interrupted first. Only `resume` makes it active again."""
        return await self._leave(tenant_id, id, PAUSED, "pause", "paused")

    async def stop(self, tenant_id: str, id: str) -> Session:
        return await self._leave(tenant_id, id, STOPPED, "stop", "stopped")

    async def end(self, tenant_id: str, id: str) -> Session:
        """End the session for good. Its row, messages and files stay. Ending it again changes nothing."""
        return await self._leave(tenant_id, id, ENDED, "end", "ended")

    async def _leave(self, tenant_id: str, id: str, to: str, verb: str, action: str) -> Session:
        await self._store.get_session(tenant_id, id)
        with self._using(id) as live:
            async with live.lock:
                session = await self._store.get_session(tenant_id, id)
                if session.status == to == ENDED:
                    return session
                if session.status not in TRANSITIONS[to]:
                    raise InvalidRequest(f'Cannot {verb} session with status "{session.status}"')
                if live.turn is not None:
                    await live.interrupt(live.turn)
                await live.give_up()
                return await self._change_status(session, to, action)

    async def _change_status(self, session: Session, to: str, action: str, **more: Any) -> Session:
        """To be called under the session's lock. The event comes first: killed in between, the change can be asked for again."""
        await self._record_change(session.id, action, session.status, to, **more)
        return await self._store.transition(session.id, to) or await self._store.get_session(session.tenant_id, session.id)

    async def resume(self, tenant_id: str, id: str) -> Session:
        """Make a paused, stopped or failed session active again; its sandbox starts in the background. No-op when active."""
        await self._store.get_session(tenant_id, id)
        with self._using(id) as live:
            async with live.lock:
                session = await self._store.get_session(tenant_id, id)
                if session.status == ENDED:
                    raise SessionEnded(_HAS_ENDED)
                if session.status == ACTIVE:
                    return session
                self._refuse_when_closing()
                self._check_folder(session.agent_name, session.agent_digest)
                session = await self._change_status(session, ACTIVE, "resumed", path="cold", source="local")
            _ = self._tasks.start(self._wake(session), f"wake {id}")
        return session

    async def _wake(self, session: Session) -> None:
        """Have the sandbox ready before the next message asks for it. A failure is left for that message to report."""
        with self._using(session.id) as live:
            try:
                await self._ensure_sandbox(session, live)
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
        with self._using(id) as live:
            live.commands += 1  # first, so that the sandbox is not given up as soon as it is there
            try:
                sandbox = live.sandbox or await self._ensure_sandbox(session, live)
                return await sandbox.exec(command, timeout=min(timeout, live.limits.tool_timeout), **options)
            finally:
                live.commands -= 1
                live.idle_since = time.monotonic()

    async def logs(self, tenant_id: str, id: str, after: int = -1) -> Lines:
        """What the session's sandbox wrote beside its events; empty while it has none."""
        await self._store.get_session(tenant_id, id)
        sandbox = self._live[id].sandbox if id in self._live else None
        return sandbox.logs(after) if sandbox is not None else []

    def _refuse_when_closing(self) -> None:
        if self._is_closing:
            raise CapacityReached("The server is shutting down; try again in a moment")
