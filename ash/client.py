"""The client library: AshClient (synchronous) and AsyncAshClient (asyncio), over the same requests, records and events.

Standard library only, and light to import. It talks to a server and never starts one.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, TypeVar, Unpack

from ash.errors import AshError, ConnectionFailed, TurnFailed
from ash.remote import calls
from ash.remote.calls import Call, ConfigOptions, Content, CredentialOptions, MessageOptions, SessionOptions
from ash.remote.cursor import FollowState, TurnCollector, TurnState
from ash.remote.folder import Progress, agent_name
from ash.remote.records import (
    Agent,
    ApiKey,
    Credential,
    Event,
    EventData,
    ExecResult,
    Health,
    Json,
    LogLine,
    Message,
    Session,
    SessionEvent,
    SessionFile,
    SessionFiles,
    SessionList,
    TurnResult,
)
from ash.remote.server import parse_server
from ash.remote.streams import AsyncEventStream, EventStream, Positions, Reconnected, explained

if TYPE_CHECKING:
    import ssl

__all__ = [
    "Agent", "ApiKey", "AshClient", "AshError", "AsyncAshClient", "AsyncEventStream", "ConfigOptions", "ConnectionFailed", "Credential",
    "CredentialOptions", "Event", "EventData", "EventStream", "ExecResult", "Health", "LogLine", "Message", "MessageOptions", "Session",
    "SessionEvent", "SessionFile", "SessionFiles", "SessionList", "SessionOptions", "TurnFailed", "TurnResult", "agent_name",
]  # fmt: skip

T = TypeVar("T")
DEFAULT_URL = "http://localhost:4100"
_TIMEOUT, _STREAM_TIMEOUT = 60.0, 60.0


class _Configured:
    """What both clients hold: the server's address, the positions of sessions, and whom to tell of reconnections."""

    def __init__(
        self,
        server_url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        timeout: float = _TIMEOUT,
        stream_timeout: float = _STREAM_TIMEOUT,
        ssl_context: ssl.SSLContext | None = None,
        on_reconnect: Reconnected | None = None,
        stored_key: str | None = None,
    ) -> None:
        self._server = parse_server(server_url, api_key, timeout, stream_timeout, ssl_context, stored_key)
        self._positions = Positions()
        self._on_reconnect = on_reconnect

    @property
    def server_url(self) -> str:
        return self._server.url

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._server.url!r})"

    def _turn(self, session_id: str, content: Content, options: MessageOptions) -> tuple[TurnState, Call[None]]:
        return TurnState(session_id, content, self._positions.get(session_id)), calls.send_message(session_id, content, **options)

    def _created(self, session: Session) -> Session:
        self._positions.note(session.id, 0)
        return session


class AshClient(_Configured):
    """Calls a server and waits for each answer. Safe to share between threads.

    `timeout` bounds one request in seconds, `stream_timeout` the silence of a stream (servers send a sign of life every 15 s).
    `api_key` goes with every request; `stored_key` only to a server that asks, on this machine only to one of this user or root.
    Errors are the classes of `ash.errors`; ConnectionFailed when no server answers.
    """

    def _run(self, call: Call[T]) -> T:
        from ash.remote.connection import exchange

        with explained(self._server):
            return exchange(self._server, call)

    def health(self) -> Health:
        return self._run(calls.health())

    def policy(self) -> Json:
        """The operator's policy as it is in force, and where each part of it comes from."""
        return self._run(calls.policy())

    def deploy_agent(
        self,
        name: str,
        path: str,
        *,
        env: dict[str, str] | None = None,
        config: Json | None = None,
        on_progress: Progress | None = None,
    ) -> Agent:
        """Upload the folder at `path` as the newest version of agent `name`. `env` and `config` are kept when not given."""
        return self._run(calls.deploy_agent(name, path, env=env, config=config, on_progress=on_progress))

    def list_agents(self) -> list[Agent]:
        return self._run(calls.list_agents())

    def get_agent(self, name: str) -> Agent:
        return self._run(calls.get_agent(name))

    def delete_agent(self, name: str) -> None:
        self._run(calls.delete_agent(name))

    def create_session(self, agent: str, **options: Unpack[SessionOptions]) -> Session:
        """A session that is ready for its first message."""
        return self._created(self._run(calls.create_session(agent, **options)))

    def list_sessions(
        self, agent: str | None = None, *, status: str | None = None, limit: int | None = None, offset: int | None = None
    ) -> SessionList:
        """Newest first; `.total` of the list counts those beyond `limit` too."""
        return self._run(calls.list_sessions(agent, status, limit, offset))

    def get_session(self, session_id: str) -> Session:
        return self._run(calls.get_session(session_id))

    def update_session_config(self, session_id: str, **changes: Unpack[ConfigOptions]) -> Session:
        return self._run(calls.update_session_config(session_id, **changes))

    def pause_session(self, session_id: str) -> Session:
        return self._run(calls.change_session(session_id, "pause"))

    def resume_session(self, session_id: str) -> Session:
        return self._run(calls.change_session(session_id, "resume"))

    def stop_session(self, session_id: str) -> Session:
        return self._run(calls.change_session(session_id, "stop"))

    def fork_session(self, session_id: str) -> Session:
        return self._run(calls.change_session(session_id, "fork"))

    def end_session(self, session_id: str) -> Session:
        return self._run(calls.end_session(session_id))

    def interrupt(self, session_id: str) -> bool:
        """End the turn that runs. False when none does."""
        return self._run(calls.interrupt(session_id))

    def exec(
        self,
        session_id: str,
        command: str,
        *,
        timeout: float | None = None,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        stdin: str | None = None,
    ) -> ExecResult:
        """Run a shell command in the session's sandbox; `timeout` in seconds."""
        return self._run(calls.exec(session_id, command, timeout=timeout, cwd=cwd, env=env, stdin=stdin))

    def send_message_stream(self, session_id: str, content: Content, **options: Unpack[MessageOptions]) -> EventStream:
        """Start a turn and iterate over its events, up to `done`. The message is sent by this call."""
        state, call = self._turn(session_id, content, options)
        return EventStream(self._server, state, call, self._positions, self._on_reconnect)

    def send_message(self, session_id: str, content: Content, **options: Unpack[MessageOptions]) -> TurnResult:
        """Start a turn and wait for its end. Raises TurnFailed when it ends in an error."""
        turn = TurnCollector()
        with self.send_message_stream(session_id, content, **options) as stream:
            for event in stream:
                turn.feed(event)
        return turn.result()

    def follow(self, session_id: str, after: int = 0) -> EventStream:
        """Iterate over the session's events behind cursor `after`, past ones first, across turns, until the session ends."""
        state = FollowState(session_id, after)
        return EventStream(self._server, state, calls.follow(session_id, after), self._positions, self._on_reconnect)

    def list_messages(self, session_id: str, *, after: int | None = None, limit: int | None = None) -> list[Message]:
        return self._run(calls.list_messages(session_id, after=after, limit=limit))

    def list_session_events(
        self, session_id: str, *, after: int | None = None, limit: int | None = None, type: str | None = None
    ) -> list[SessionEvent]:
        return self._run(calls.list_session_events(session_id, after=after, limit=limit, type=type))

    def session_logs(self, session_id: str, *, after: int | None = None) -> list[LogLine]:
        return self._run(calls.session_logs(session_id, after=after))

    def list_session_files(self, session_id: str, *, hidden: bool = True) -> SessionFiles:
        """The files of the workspace, without `node_modules`, `.git` and `__pycache__`; unless `hidden`, without caches either."""
        return self._run(calls.list_session_files(session_id, hidden=hidden))

    def read_session_file(self, session_id: str, path: str) -> bytes:
        return self._run(calls.read_session_file(session_id, path))

    def download_workspace(self, session_id: str) -> bytes:
        """The whole workspace as a tar.gz archive. Links are left out."""
        return self._run(calls.download_workspace(session_id))

    def upload_workspace(self, session_id: str, archive: bytes) -> int:
        """Put the files of a tar archive, gzipped or not, into the workspace, in place of those of the same name; returns their number."""
        return self._run(calls.upload_workspace(session_id, archive))

    def list_api_keys(self) -> list[ApiKey]:
        return self._run(calls.list_api_keys())

    def create_api_key(self, label: str | None = None) -> ApiKey:
        """The only answer that holds the key itself."""
        return self._run(calls.create_api_key(label))

    def delete_api_key(self, key_id: str) -> None:
        self._run(calls.delete_api_key(key_id))

    def store_credential(self, type: str, key: str, **options: Unpack[CredentialOptions]) -> Credential:
        """Have the server keep a secret for agents: a model's key (type `anthropic`), or with a `host` one for their tools (`custom`)."""
        return self._run(calls.store_credential(type, key, **options))

    def list_credentials(self) -> list[Credential]:
        return self._run(calls.list_credentials())

    def delete_credential(self, credential_id: str) -> None:
        self._run(calls.delete_credential(credential_id))

    def close(self) -> None:
        """Nothing is kept open between calls; this is here for those who close what they opened."""

    def __enter__(self) -> AshClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class AsyncAshClient(_Configured):
    """AshClient for asyncio: the same methods, awaited. A cancelled call closes its connection."""

    async def _run(self, call: Call[T]) -> T:
        from ash.remote.aio import exchange

        with explained(self._server):
            return await exchange(self._server, call)

    async def health(self) -> Health:
        return await self._run(calls.health())

    async def policy(self) -> Json:
        return await self._run(calls.policy())

    async def deploy_agent(
        self,
        name: str,
        path: str,
        *,
        env: dict[str, str] | None = None,
        config: Json | None = None,
        on_progress: Progress | None = None,
    ) -> Agent:
        """Upload the folder at `path` as the newest version of agent `name`. `on_progress` is called from another thread."""
        import asyncio

        call = await asyncio.to_thread(calls.deploy_agent, name, path, env=env, config=config, on_progress=on_progress)
        return await self._run(call)

    async def list_agents(self) -> list[Agent]:
        return await self._run(calls.list_agents())

    async def get_agent(self, name: str) -> Agent:
        return await self._run(calls.get_agent(name))

    async def delete_agent(self, name: str) -> None:
        await self._run(calls.delete_agent(name))

    async def create_session(self, agent: str, **options: Unpack[SessionOptions]) -> Session:
        return self._created(await self._run(calls.create_session(agent, **options)))

    async def list_sessions(
        self, agent: str | None = None, *, status: str | None = None, limit: int | None = None, offset: int | None = None
    ) -> SessionList:
        return await self._run(calls.list_sessions(agent, status, limit, offset))

    async def get_session(self, session_id: str) -> Session:
        return await self._run(calls.get_session(session_id))

    async def update_session_config(self, session_id: str, **changes: Unpack[ConfigOptions]) -> Session:
        return await self._run(calls.update_session_config(session_id, **changes))

    async def pause_session(self, session_id: str) -> Session:
        return await self._run(calls.change_session(session_id, "pause"))

    async def resume_session(self, session_id: str) -> Session:
        return await self._run(calls.change_session(session_id, "resume"))

    async def stop_session(self, session_id: str) -> Session:
        return await self._run(calls.change_session(session_id, "stop"))

    async def fork_session(self, session_id: str) -> Session:
        return await self._run(calls.change_session(session_id, "fork"))

    async def end_session(self, session_id: str) -> Session:
        return await self._run(calls.end_session(session_id))

    async def interrupt(self, session_id: str) -> bool:
        return await self._run(calls.interrupt(session_id))

    async def exec(
        self,
        session_id: str,
        command: str,
        *,
        timeout: float | None = None,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        stdin: str | None = None,
    ) -> ExecResult:
        return await self._run(calls.exec(session_id, command, timeout=timeout, cwd=cwd, env=env, stdin=stdin))

    def send_message_stream(self, session_id: str, content: Content, **options: Unpack[MessageOptions]) -> AsyncEventStream:
        """`async for event in client.send_message_stream(…)`. The message is sent when the first event is asked for."""
        state, call = self._turn(session_id, content, options)
        return AsyncEventStream(self._server, state, call, self._positions, self._on_reconnect)

    async def send_message(self, session_id: str, content: Content, **options: Unpack[MessageOptions]) -> TurnResult:
        turn = TurnCollector()
        async with self.send_message_stream(session_id, content, **options) as stream:
            async for event in stream:
                turn.feed(event)
        return turn.result()

    def follow(self, session_id: str, after: int = 0) -> AsyncEventStream:
        state = FollowState(session_id, after)
        return AsyncEventStream(self._server, state, calls.follow(session_id, after), self._positions, self._on_reconnect)

    async def list_messages(self, session_id: str, *, after: int | None = None, limit: int | None = None) -> list[Message]:
        return await self._run(calls.list_messages(session_id, after=after, limit=limit))

    async def list_session_events(
        self, session_id: str, *, after: int | None = None, limit: int | None = None, type: str | None = None
    ) -> list[SessionEvent]:
        return await self._run(calls.list_session_events(session_id, after=after, limit=limit, type=type))

    async def session_logs(self, session_id: str, *, after: int | None = None) -> list[LogLine]:
        return await self._run(calls.session_logs(session_id, after=after))

    async def list_session_files(self, session_id: str, *, hidden: bool = True) -> SessionFiles:
        return await self._run(calls.list_session_files(session_id, hidden=hidden))

    async def read_session_file(self, session_id: str, path: str) -> bytes:
        return await self._run(calls.read_session_file(session_id, path))

    async def download_workspace(self, session_id: str) -> bytes:
        return await self._run(calls.download_workspace(session_id))

    async def upload_workspace(self, session_id: str, archive: bytes) -> int:
        return await self._run(calls.upload_workspace(session_id, archive))

    async def list_api_keys(self) -> list[ApiKey]:
        return await self._run(calls.list_api_keys())

    async def create_api_key(self, label: str | None = None) -> ApiKey:
        return await self._run(calls.create_api_key(label))

    async def delete_api_key(self, key_id: str) -> None:
        await self._run(calls.delete_api_key(key_id))

    async def store_credential(self, type: str, key: str, **options: Unpack[CredentialOptions]) -> Credential:
        return await self._run(calls.store_credential(type, key, **options))

    async def list_credentials(self) -> list[Credential]:
        return await self._run(calls.list_credentials())

    async def delete_credential(self, credential_id: str) -> None:
        await self._run(calls.delete_credential(credential_id))

    async def aclose(self) -> None:
        """Nothing is kept open between calls; this is here for those who close what they opened."""

    async def __aenter__(self) -> AsyncAshClient:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()
