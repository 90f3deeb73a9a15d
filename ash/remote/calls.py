"""Every request of the API as data: method, path, body, and how to read the answer. Pure; both clients send these."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypedDict, TypeVar, Unpack

from ash.errors import InvalidRequest
from ash.remote import records
from ash.remote.folder import Progress, Upload, scan
from ash.remote.records import (
    Agent,
    ApiKey,
    Credential,
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
    read,
)

T = TypeVar("T")
Content = str | list[Any]
_NO_HEADERS: dict[str, str] = {}
_STREAM = {"Accept": "text/event-stream"}
_EXEC_TIMEOUT = 30.0
_TRANSFER_TIMEOUT = 120.0


class Call(NamedTuple, Generic[T]):
    """One request. `timeout` is what it needs beyond the client's own, in seconds; `is_raw` says that the answer is no JSON but bytes."""

    method: str
    path: str
    parse: Callable[[Any], T]
    body: bytes | Upload | None = None
    timeout: float = 0.0
    headers: dict[str, str] = _NO_HEADERS
    is_raw: bool = False


class SessionOptions(TypedDict, total=False):
    """What `create_session` takes besides the agent."""

    model: str | None
    system_prompt: str | None
    permission_mode: str | None
    allowed_tools: list[str] | None
    disallowed_tools: list[str] | None
    mcp_servers: Json | None
    extra_env: dict[str, str] | None
    limits: dict[str, float] | None
    betas: list[str] | None
    subagents: Json | None
    initial_agent: str | None
    credential_id: str | None


class ConfigOptions(TypedDict, total=False):
    """What `update_session_config` may change; it holds from the next message."""

    model: str | None
    system_prompt: str | None
    permission_mode: str | None
    allowed_tools: list[str] | None
    disallowed_tools: list[str] | None
    betas: list[str] | None
    subagents: Json | None
    initial_agent: str | None


class CredentialOptions(TypedDict, total=False):
    """Where a credential is put in, and for whom; `docs/credentials.md` says more."""

    label: str | None
    agent: str | None
    host: str | None
    header: str | None
    template: str | None
    variable: str | None


class MessageOptions(TypedDict, total=False):
    """What a message takes besides its content; it holds for that turn."""

    include_partial_messages: bool | None
    model: str | None
    max_turns: int | None
    max_budget_usd: float | None
    effort: str | None
    thinking: Json | None
    output_format: Json | None


def _body(table: type, options: Any) -> Json:
    """The options under their names on the wire. None means not given; an unknown name is a TypeError, as for any argument."""
    known = table.__annotations__
    for name in options:
        if name not in known:
            raise TypeError(f"unexpected option {name!r}; the options are {', '.join(known)}")
    return {records.camel(name): value for name, value in options.items() if value is not None}


def _json(value: Json) -> bytes:
    try:
        return json.dumps(value, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"this cannot be sent as JSON: {error}") from error


def _path(*segments: str) -> str:
    from urllib.parse import quote

    for segment in segments:
        if not isinstance(segment, str) or segment.strip(".") == "":
            raise InvalidRequest(f"{segment!r} is not an id or a name")
    return "/api/" + "/".join(quote(segment, safe="") for segment in segments)


def _query(path: str, **parameters: object) -> str:
    from urllib.parse import urlencode

    given = {name: value for name, value in parameters.items() if value is not None}
    return f"{path}?{urlencode(given)}" if given else path


def _in(key: str, record: type[T]) -> Callable[[Any], T]:
    return lambda raw: read(record, raw.get(key) if isinstance(raw, dict) else None)


def _rows(raw: Any, key: str) -> list[Any]:
    rows = raw.get(key) if isinstance(raw, dict) else None
    return rows if isinstance(rows, list) else []


def _nothing(_raw: Any) -> None:
    return None


# The server and its agents


def health() -> Call[Health]:
    return Call("GET", "/health", lambda raw: read(Health, raw))


def policy() -> Call[Json]:
    return Call("GET", "/api/policy", lambda raw: raw if isinstance(raw, dict) else {})


def deploy_agent(
    name: str, path: str, *, env: dict[str, str] | None = None, config: Json | None = None, on_progress: Progress | None = None
) -> Call[Agent]:
    fields: Json = {"name": name}
    if env is not None:
        fields["env"] = env
    if config is not None:
        fields["config"] = config
    upload = Upload(scan(path), fields, on_progress)
    return Call("POST", "/api/agents", _in("agent", Agent), upload, timeout=120.0)


def list_agents() -> Call[list[Agent]]:
    return Call("GET", "/api/agents", lambda raw: [read(Agent, row) for row in _rows(raw, "agents")])


def get_agent(name: str) -> Call[Agent]:
    return Call("GET", _path("agents", name), _in("agent", Agent))


def delete_agent(name: str) -> Call[None]:
    return Call("DELETE", _path("agents", name), _nothing)


# Sessions

_as_session = _in("session", Session)


def create_session(agent: str, **options: Unpack[SessionOptions]) -> Call[Session]:
    if (limits := options.get("limits")) is not None:
        options["limits"] = {records.camel(name): value for name, value in limits.items()}
    return Call("POST", "/api/sessions", _as_session, _json({"agent": agent, **_body(SessionOptions, options)}))


def _as_sessions(raw: Any) -> SessionList:
    sessions = SessionList(read(Session, row) for row in _rows(raw, "sessions"))
    total = raw.get("total") if isinstance(raw, dict) else None
    sessions.total = total if isinstance(total, int) else len(sessions)
    return sessions


def list_sessions(
    agent: str | None = None, status: str | None = None, limit: int | None = None, offset: int | None = None
) -> Call[SessionList]:
    query = _query("/api/sessions", agent=agent, status=status, limit=limit, offset=offset, includeTotal="true")
    return Call("GET", query, _as_sessions)


def get_session(id: str) -> Call[Session]:
    return Call("GET", _path("sessions", id), _as_session)


def update_session_config(id: str, **changes: Unpack[ConfigOptions]) -> Call[Session]:
    return Call("PATCH", _path("sessions", id, "config"), _as_session, _json(_body(ConfigOptions, changes)))


def change_session(id: str, verb: str) -> Call[Session]:
    """pause, resume, stop or fork."""
    return Call("POST", _path("sessions", id, verb), _as_session, b"{}")


def end_session(id: str) -> Call[Session]:
    return Call("DELETE", _path("sessions", id), _as_session)


def interrupt(id: str) -> Call[bool]:
    """The answer is False when no turn ran."""
    return Call("POST", _path("sessions", id, "interrupt"), _was_interrupted, b"{}")


def _was_interrupted(raw: Any) -> bool:
    return bool(raw.get("interrupted", raw.get("ok", True))) if isinstance(raw, dict) else True


def exec(
    id: str,
    command: str,
    *,
    timeout: float | None = None,
    cwd: str | None = None,
    env: dict[str, str] | None = None,
    stdin: str | None = None,
) -> Call[ExecResult]:
    given = {"timeout": None if timeout is None else round(timeout * 1000), "cwd": cwd, "env": env, "stdin": stdin}
    body = {"command": command, **{name: value for name, value in given.items() if value is not None}}
    patience = _EXEC_TIMEOUT if timeout is None else timeout
    return Call("POST", _path("sessions", id, "exec"), lambda raw: read(ExecResult, raw), _json(body), timeout=patience)


# Messages, events, logs


def list_messages(id: str, *, after: int | None = None, limit: int | None = None) -> Call[list[Message]]:
    query = _query(_path("sessions", id, "messages"), after=after, limit=limit)
    return Call("GET", query, lambda raw: [records.message(row) for row in _rows(raw, "messages")])


def list_session_events(
    id: str, *, after: int | None = None, limit: int | None = None, type: str | None = None
) -> Call[list[SessionEvent]]:
    query = _query(_path("sessions", id, "events"), after=after, limit=limit, type=type)
    return Call("GET", query, lambda raw: [records.session_event(row) for row in _rows(raw, "events")])


def session_logs(id: str, *, after: int | None = None) -> Call[list[LogLine]]:
    query = _query(_path("sessions", id, "logs"), after=after)
    return Call("GET", query, lambda raw: [read(LogLine, row) for row in _rows(raw, "logs")])


def send_message(id: str, content: Content, **options: Unpack[MessageOptions]) -> Call[None]:
    body = {"content": content, **_body(MessageOptions, options)}
    return Call("POST", _path("sessions", id, "messages"), _nothing, _json(body), headers=_STREAM)


def continue_turn(id: str, after: int) -> Call[None]:
    """Goes on with a turn's stream. It carries no content, so that whatever loses the header cannot start a turn with it."""
    return Call("POST", _path("sessions", id, "messages"), _nothing, b"{}", headers={**_STREAM, "Last-Event-ID": str(after)})


def follow(id: str, after: int) -> Call[None]:
    return Call("GET", _query(_path("sessions", id, "stream"), after=after), _nothing, headers=_STREAM)


# Files


def list_session_files(id: str, *, hidden: bool = True) -> Call[SessionFiles]:
    return Call("GET", _query(_path("sessions", id, "files"), includeHidden=None if hidden else "false"), _as_files)


def _as_files(raw: Any) -> SessionFiles:
    files = SessionFiles(read(SessionFile, row) for row in _rows(raw, "files"))
    files.is_cut = isinstance(raw, dict) and raw.get("truncated") is True
    return files


def read_session_file(id: str, path: str) -> Call[bytes]:
    from urllib.parse import quote

    if not path.strip("/"):
        raise InvalidRequest(f"{path!r} names no file")
    return Call("GET", f"{_path('sessions', id, 'files')}/{quote(path, safe='/')}", bytes, timeout=_TRANSFER_TIMEOUT, is_raw=True)


def download_workspace(id: str) -> Call[bytes]:
    return Call("GET", _path("sessions", id, "workspace"), bytes, timeout=_TRANSFER_TIMEOUT, is_raw=True)


def upload_workspace(id: str, archive: bytes) -> Call[int]:
    path = _path("sessions", id, "workspace")
    return Call("POST", path, _file_count, archive, timeout=_TRANSFER_TIMEOUT, headers={"Content-Type": "application/octet-stream"})


def _file_count(raw: Any) -> int:
    count = raw.get("files") if isinstance(raw, dict) else None
    return count if isinstance(count, int) else 0


# API keys


def list_api_keys() -> Call[list[ApiKey]]:
    return Call("GET", "/api/api-keys", lambda raw: [read(ApiKey, row) for row in _rows(raw, "keys")])


def create_api_key(label: str | None = None) -> Call[ApiKey]:
    return Call("POST", "/api/api-keys", lambda raw: read(ApiKey, raw), _json({} if label is None else {"label": label}))


def delete_api_key(id: str) -> Call[None]:
    return Call("DELETE", _path("api-keys", id), _nothing)


# Credentials


def store_credential(type: str, key: str, **options: Unpack[CredentialOptions]) -> Call[Credential]:
    body = {"type": type, "key": key, **_body(CredentialOptions, options)}
    return Call("POST", "/api/credentials", _in("credential", Credential), _json(body))


def list_credentials() -> Call[list[Credential]]:
    return Call("GET", "/api/credentials", lambda raw: [read(Credential, row) for row in _rows(raw, "credentials")])


def delete_credential(id: str) -> Call[None]:
    return Call("DELETE", _path("credentials", id), _nothing)
