"""What the server answers, as typed records. Each keeps the whole JSON object in `raw`; nothing here does I/O."""

from __future__ import annotations

import json
from typing import Any, NamedTuple, TypeVar, cast

from ash.errors import ProtocolError

Json = dict[str, Any]
_NOTHING: Json = {}  # the default of an object; `read` gives each record one of its own
T = TypeVar("T")


def camel(name: str) -> str:
    """`agent_name` as it is on the wire: `agentName`."""
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def read(record: type[T], raw: Any) -> T:
    """A record from the server's object. Raises ProtocolError when it lacks what every server of this API sends."""
    fields = cast("tuple[str, ...]", getattr(record, "_fields", ()))
    if not isinstance(raw, dict):
        raise ProtocolError(f"the server did not answer with {record.__name__}; is this address an Ash server?")
    defaults = cast("Json", getattr(record, "_field_defaults", {}))
    values: Json = {name: {} for name in fields if defaults.get(name) == {}}
    values.update((name, raw[camel(name)]) for name in fields if raw.get(camel(name)) is not None)
    missing = [camel(name) for name in fields if name not in values and name not in defaults]
    if missing:
        raise ProtocolError(f"the server's {record.__name__} lacks {', '.join(missing)}; is this address an Ash server?")
    return record(**{**values, "raw": raw})


def _show(record: Any) -> str:
    shown = [(name, getattr(record, name)) for name in record._fields if name != "raw"]
    return f"{type(record).__name__}({', '.join(f'{name}={value!r}' for name, value in shown if value not in (None, '', {}, []))})"


class Agent(NamedTuple):
    """A deployed agent at its newest version. The values of `env` are hidden by the server."""

    id: str
    name: str
    version: int
    path: str = ""
    env: dict[str, str] = _NOTHING
    config: Json = _NOTHING
    created_at: str = ""
    updated_at: str = ""
    raw: Json = _NOTHING

    def __repr__(self) -> str:
        return _show(self)


class Session(NamedTuple):
    """One conversation. `turn` is what runs right now (`{"id", "state"}`), None when nothing does."""

    id: str
    agent_name: str
    status: str
    agent_version: int | None = None
    model: str | None = None
    config: Json = _NOTHING
    limits: Json = _NOTHING
    sandbox_id: str = ""
    parent_session_id: str | None = None
    turn: Json | None = None
    created_at: str = ""
    last_active_at: str = ""
    raw: Json = _NOTHING

    def __repr__(self) -> str:
        return _show(self)


class SessionList(list[Session]):
    """Sessions of one page; `total` counts those on all pages."""

    total: int = 0


class Message(NamedTuple):
    """One message of a conversation. `content` is what was sent (user) or the whole message object (assistant)."""

    id: str
    role: str
    sequence: int
    content: Any = None
    created_at: str = ""
    raw: Json = _NOTHING

    def __repr__(self) -> str:
        return _show(self)

    @property
    def text(self) -> str:
        return _blocks_text(self.content) if self.role == "user" else assistant_text(self.content)


class SessionEvent(NamedTuple):
    """One row of a session's timeline."""

    id: str
    type: str
    sequence: int
    data: Any = None
    created_at: str = ""
    raw: Json = _NOTHING

    def __repr__(self) -> str:
        return _show(self)


class ExecResult(NamedTuple):
    """How a command in the sandbox ended."""

    exit_code: int
    stdout: str = ""
    stderr: str = ""
    timed_out: bool = False
    truncated: bool = False
    raw: Json = _NOTHING

    def __repr__(self) -> str:
        return _show(self)


class SessionFile(NamedTuple):
    """A file of a session's workspace; `path` is relative to it."""

    path: str
    size: int = 0
    modified_at: str = ""
    raw: Json = _NOTHING

    def __repr__(self) -> str:
        return _show(self)


class SessionFiles(list[SessionFile]):
    """The files of a workspace by path; `is_cut` says that there are more than the server lists."""

    is_cut: bool = False


class LogLine(NamedTuple):
    """One line the sandbox wrote."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    level: str
    text: str
    ts: str = ""
    raw: Json = _NOTHING

    def __repr__(self) -> str:
        return _show(self)


class ApiKey(NamedTuple):
    """An API key. `key` is there only in the answer that created it."""

    id: str
    label: str = ""
    key: str = ""
    created_at: str = ""
    raw: Json = _NOTHING

    def __repr__(self) -> str:
        return _show(self._replace(key="***" if self.key else ""))


class Credential(NamedTuple):
    """A stored secret, without it. `host` and what follows are of those that are put in at egress."""

    id: str
    type: str
    label: str = ""
    agent: str | None = None
    host: str | None = None
    header: str | None = None
    template: str | None = None
    variable: str | None = None
    created_at: str = ""
    last_used_at: str | None = None
    raw: Json = _NOTHING

    def __repr__(self) -> str:
        return _show(self)


class Health(NamedTuple):
    """What the server says of itself."""

    status: str
    version: str = ""
    active_sessions: int = 0
    active_sandboxes: int = 0
    uptime: float = 0
    auth: str = ""
    isolation: str = ""
    limits: Json = _NOTHING
    model: Json = _NOTHING
    pool: Json = _NOTHING
    warnings: tuple[str, ...] = ()
    raw: Json = _NOTHING

    def __repr__(self) -> str:
        return _show(self)

    @property
    def is_offline(self) -> bool:
        """True when the built-in demo model answers, because no provider is configured."""
        return self.model.get("provider") == "offline"


def message(raw: Any) -> Message:
    """A row of the message list; its content comes as JSON in a string."""
    record = read(Message, raw)
    content = unpack(record.content)
    if record.role == "user" and isinstance(content, dict) and "content" in content:
        content = content["content"]
    return record._replace(content=content)


def session_event(raw: Any) -> SessionEvent:
    record = read(SessionEvent, raw)
    return record._replace(data=unpack(record.data))


def unpack(value: Any) -> Any:
    """JSON that travels in a string; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def assistant_text(data: Any) -> str:
    """The text of an assistant message as the agent loop shapes it; empty for every other kind of message."""
    if not isinstance(data, dict) or data.get("type") != "assistant" or not isinstance(data.get("message"), dict):
        return ""
    return _blocks_text(data["message"].get("content"))


def _blocks_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    blocks = content if isinstance(content, list) else []
    return "".join(str(block.get("text", "")) for block in blocks if isinstance(block, dict) and block.get("type") == "text")


class EventData(dict[str, Any]):
    """The data of an event: the whole object, that prints as its text.

    `str()` of an assistant message is its text, of every other `message` nothing (the closing `result` repeats the text), of a
    delta the delta, of an `error` the error; of anything else the object.
    """

    __slots__ = ("_kind",)

    def __init__(self, data: Any, kind: str) -> None:
        super().__init__(data if isinstance(data, dict) else {"value": data})
        self._kind = kind

    def __str__(self) -> str:
        if self._kind == "message":
            return assistant_text(self)
        if self._kind in ("text_delta", "thinking_delta"):
            return str(self.get("delta", ""))
        return str(self.get("error", "")) if self._kind == "error" else repr(self)

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __reduce__(self) -> tuple[Any, ...]:
        return EventData, (dict(self), self._kind)


class Event(NamedTuple):
    """One event of a stream. `id` is the cursor to continue after; None where the server gave none."""

    type: str
    data: EventData
    id: int | None = None

    @property
    def text(self) -> str:
        """The text of an assistant message or a text delta; empty otherwise."""
        return str(self.data) if self.type in ("message", "text_delta") else ""


class TurnResult(NamedTuple):
    """A whole turn. `text` is the final answer; `messages` holds every message of the agent loop, in order."""

    text: str
    status: str
    is_error: bool = False
    usage: Json = _NOTHING
    cost_usd: float | None = None
    num_turns: int | None = None
    duration_ms: float | None = None
    turn_id: str = ""
    messages: tuple[Json, ...] = ()
    raw: Json = _NOTHING
    """The agent loop's closing `result` message; empty when the turn was cut off before it."""

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return _show(self._replace(messages=()))
