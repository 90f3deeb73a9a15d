"""The records that travel between the layers, the session statuses with their transitions, and the event types.

Pure data: no I/O, no SQL, no HTTP. How a record or an event looks on the wire is said in `dialect`.
"""

from __future__ import annotations

import json
import time
import uuid
from datetime import UTC, datetime
from typing import Any, NamedTuple

from ash.errors import ProtocolError

Json = dict[str, Any]
DEFAULT_TENANT = "default"
LONG_RESULT = 20_000
"""Characters of a tool result beyond which it is left out of the conversation when its turn has failed."""
MAX_BLOCKS = 1000
"""Most blocks in one message: each may become an event of its own."""
RESERVED_VARIABLES = ("ANTHROPIC_", "CLAUDE_CODE_")
"""Beginnings of variables that decide about the model's address and key: the server's affair, never an agent's or a session's."""

# Session statuses, the six words of the wire, and which change is allowed. `store.transition` enforces this table.
STARTING, ACTIVE, PAUSED, STOPPED, ERROR, ENDED = "starting", "active", "paused", "stopped", "error", "ended"
STATUSES = (STARTING, ACTIVE, PAUSED, STOPPED, ERROR, ENDED)
TRANSITIONS: dict[str, tuple[str, ...]] = {
    # to: from
    ACTIVE: (STARTING, PAUSED, STOPPED, ERROR),
    PAUSED: (ACTIVE,),
    STOPPED: (ACTIVE, STARTING),
    ERROR: (STARTING, ACTIVE),
    ENDED: (STARTING, ACTIVE, PAUSED, STOPPED, ERROR),
}

# Event types of a session's log. One event is one frame of a stream at most, so that `seq` is a cursor for each frame.
SESSION_STATUS_CHANGED = "session.status_changed"  # {action, from, to, …}
TURN_STARTED = "turn.started"  # {turnId, content, options, version}
TURN_INITIALIZED = "turn.initialized"  # the SDK's system/init message
ASSISTANT_DELTA = "assistant.delta"  # the SDK's stream_event message
TEXT_DELTA = "text.delta"  # {delta}
THINKING_DELTA = "thinking.delta"  # {delta}
BLOCK_DELTA = "block.delta"  # any other delta, as the model API sends it
ASSISTANT_THINKING = "assistant.thinking"  # {thinking}: one whole thinking block; `streamed` says its deltas were sent before
ASSISTANT_BLOCK = "assistant.block"  # any other block that is not text, tool use or thinking
TOOL_USE = "tool.use"  # {id, name, input}
ASSISTANT_MESSAGE = "assistant.message"  # the SDK's assistant message
TOOL_RESULT = "tool.result"  # {tool_use_id, tool_name, content, is_error}
USER_MESSAGE = "user.message"  # the SDK's user message, which holds the tool results
MODEL_RETRIED = "model.retried"  # the SDK's system message about a model call that is tried again
USAGE_RECORDED = "usage.recorded"  # {model, input_tokens, output_tokens, …}
EGRESS_REFUSED = "egress.refused"  # {host, port, reason, …}: a connection out of the sandbox that was not allowed
EGRESS_RECORDED = "egress.recorded"  # {hosts: {host: {connections, bytesUp, bytesDown}}, refused}: what a sandbox used, at its end
LIMIT_REACHED = "limit.reached"  # {limit (of LIMITS), message, …}: the session met one of its limits
RESULT_RECORDED = "result.recorded"  # the SDK's result message
TURN_COMPLETED = "turn.completed"  # {numTurns, result}
TURN_FAILED = "turn.failed"  # {error}
TURN_ENDED = "turn.ended"  # {turnId, status: completed|interrupted|failed}; exactly one per turn, always its last

LIMITS = ("memory", "processes", "disk", "files", "turn_time")
EVENT_TYPES = tuple(value for name, value in list(globals().items()) if name.isupper() and isinstance(value, str) and "." in value)


class Agent(NamedTuple):
    """A deployed definition at its newest version. `digest` names the folder with that version's files."""

    id: str
    tenant_id: str
    name: str
    version: int
    digest: str
    env: dict[str, str]
    config: Json
    created_at: str
    updated_at: str


class Session(NamedTuple):
    """One conversation with one version of an agent. `options` holds what it was created with, as it is needed at each wake."""

    id: str
    tenant_id: str
    agent_name: str
    agent_version: int
    agent_digest: str
    status: str
    model: str | None
    options: Json
    parent_session_id: str | None
    sandbox_id: str
    created_at: str
    last_active_at: str


class SandboxHandle(NamedTuple):
    """What must be remembered of a sandbox to find it, or its remains, again after the server was killed."""

    id: str
    pid: int
    start_time: int
    """Field 22 of /proc/<pid>/stat, in clock ticks since boot: tells this process from a later one with its pid."""
    cgroup: str | None
    run_dir: str
    session_dir: str
    uid: int | None


class NewEvent(NamedTuple):
    type: str
    data: Json


class Event(NamedTuple):
    """One entry of a session's log. `seq` counts from 1 without gaps."""

    session_id: str
    seq: int
    type: str
    data: Json
    created_at: str


class ApiKey(NamedTuple):
    id: str
    tenant_id: str
    label: str
    created_at: str


class Credential(NamedTuple):
    """A secret that is used upstream, without the secret. Those with a `host` are put in at egress, the others are for models.

    `agent` names the agent whose sessions all get it; None: only the sessions that ask for it by id.
    """

    id: str
    tenant_id: str
    type: str
    label: str
    agent: str | None
    host: str | None
    header: str | None
    template: str | None
    variable: str | None
    created_at: str
    last_used_at: str | None = None


def new_id() -> str:
    """A UUIDv4: clients with generated types parse ids as UUIDs."""
    return str(uuid.uuid4())


def now() -> str:
    """The time as RFC 3339 in UTC with milliseconds and `Z`."""
    return timestamp(time.time())


def timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def dump(value: object) -> str:
    """Compact JSON, as it is stored."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def expand(message: Json, *, streamed: bool) -> list[NewEvent]:
    """The log entries for one SDK message of the bridge: the derived ones first, in block order, then the message itself.

    `streamed` says that this turn's partial messages were logged, so that a whole thinking block is not sent twice. The message
    comes from the sandbox: any field of it may be missing or hold anything.
    """
    kind = message.get("type")
    if kind == "stream_event":
        return [*_expand_delta(message.get("event")), NewEvent(ASSISTANT_DELTA, message)]
    if kind == "assistant":
        return [*_expand_blocks(message, streamed), NewEvent(ASSISTANT_MESSAGE, message)]
    if kind == "user":
        return [*_expand_results(message), NewEvent(USER_MESSAGE, message)]
    if kind == "result":
        summary = {"numTurns": message.get("num_turns"), "result": message.get("result")}
        return [NewEvent(TURN_COMPLETED, summary), NewEvent(RESULT_RECORDED, message)]
    if kind == "system" and message.get("subtype") == "init":
        return [NewEvent(TURN_INITIALIZED, message)]
    return [NewEvent(MODEL_RETRIED, message)] if kind == "system" else []


def _expand_delta(event: Any) -> list[NewEvent]:
    delta = event.get("delta") if isinstance(event, dict) and event.get("type") == "content_block_delta" else None
    if not isinstance(delta, dict):
        return []
    if delta.get("type") == "text_delta":
        return [NewEvent(TEXT_DELTA, {"delta": _text(delta.get("text"))})]
    if delta.get("type") == "thinking_delta":
        return [NewEvent(THINKING_DELTA, {"delta": _text(delta.get("thinking"))})]
    return [NewEvent(BLOCK_DELTA, delta)]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _blocks(message: Json) -> list[Json]:
    inner = message.get("message")
    content = inner.get("content") if isinstance(inner, dict) else None
    if not isinstance(content, list):
        return []
    if len(content) > MAX_BLOCKS:
        raise ProtocolError(f"a message of {len(content)} blocks; the limit is {MAX_BLOCKS}")
    return [block for block in content if isinstance(block, dict)]


def _expand_blocks(message: Json, streamed: bool) -> list[NewEvent]:
    events = []
    for block in _blocks(message):
        kind = block.get("type")
        if kind == "tool_use":
            events.append(NewEvent(TOOL_USE, {key: block.get(key) for key in ("id", "name", "input")}))
        elif kind == "thinking":
            events.append(NewEvent(ASSISTANT_THINKING, {"thinking": _text(block.get("thinking")), "streamed": streamed}))
        elif kind != "text":
            events.append(NewEvent(ASSISTANT_BLOCK, block))
    return events


def _expand_results(message: Json) -> list[NewEvent]:
    given = message.get("tool_names")
    names = given if isinstance(given, dict) else {}
    return [
        NewEvent(TOOL_RESULT, {
            "tool_use_id": (id := block.get("tool_use_id")),
            "tool_name": names.get(id) if isinstance(id, str) else None,
            "content": block.get("content", ""),
            "is_error": bool(block.get("is_error")),
        })
        for block in _blocks(message)
        if block.get("type") == "tool_result"
    ]  # fmt: skip


def message_text(message: Json) -> str:
    """The text blocks of an SDK assistant message, joined."""
    return "".join(_text(block.get("text")) for block in _blocks(message) if block.get("type") == "text")


def rebuild_transcript(events: list[Event]) -> list[Json]:
    """The conversation as the model API takes it, from the log alone; other events are passed over.

    A turn that was cut off may end in tool calls without results; they get an error result, as the API demands one each. A turn
    that failed before the model said anything, or that the model refused, is left out: sent again it would spoil every later one.
    """
    messages: list[Json] = []
    for turn in _turns(events):
        if not _is_spoilt(turn):
            said = [message for event in turn if (message := _message(event))]
            messages += [_shortened(message) for message in said] if _has_failed(turn) else said
    return _answer_open_calls(messages)


def _turns(events: list[Event]) -> list[list[Event]]:
    turns: list[list[Event]] = []
    for event in events:
        if event.type == TURN_STARTED or not turns:
            turns.append([])
        turns[-1].append(event)
    return turns


def _is_spoilt(turn: list[Event]) -> bool:
    answers = [event.data.get("message") for event in turn if event.type == ASSISTANT_MESSAGE]
    is_refused = any(isinstance(answer, dict) and answer.get("stop_reason") == "refusal" for answer in answers)
    return (_has_failed(turn) and not answers) or is_refused


def _has_failed(turn: list[Event]) -> bool:
    return any(event.type == TURN_ENDED and event.data.get("status") == "failed" for event in turn)


def _shortened(message: Json) -> Json:
    """A message of a failed turn without its long tool results: they may be why it failed, and would fail every later turn."""
    if not isinstance(message["content"], list):
        return message
    return {**message, "content": [_shortened_result(block) for block in message["content"]]}


def _shortened_result(block: Any) -> Any:
    is_result = isinstance(block, dict) and block.get("type") == "tool_result"
    size = len(dump(block.get("content"))) if is_result else 0
    return {**block, "content": f"[{size} characters, left out because the turn failed]"} if size > LONG_RESULT else block


def _message(event: Event) -> Json | None:
    """The message that an event adds to the conversation."""
    if event.type == TURN_STARTED:
        return {"role": "user", "content": event.data["content"]}
    inner = event.data.get("message") if event.type in (ASSISTANT_MESSAGE, USER_MESSAGE) else None
    if not isinstance(inner, dict) or not inner.get("content"):
        return None
    return {"role": inner.get("role", "assistant"), "content": inner["content"]}


def _answer_open_calls(messages: list[Json]) -> list[Json]:
    repaired: list[Json] = []
    for position, message in enumerate(messages):
        repaired.append(message)
        calls = _ids(message, "tool_use", "id") if message["role"] == "assistant" else []
        following = messages[position + 1] if position + 1 < len(messages) else {"role": "", "content": []}
        open_calls = [call for call in calls if call not in _ids(following, "tool_result", "tool_use_id")]
        if open_calls:
            lost = "The call was interrupted before its result was recorded; it may or may not have had its effect."
            results = [{"type": "tool_result", "tool_use_id": call, "content": lost, "is_error": True} for call in open_calls]
            repaired.append({"role": "user", "content": results})
    return repaired


def _ids(message: Json, kind: str, field: str) -> list[Any]:
    content = message["content"]
    return (
        [block.get(field) for block in content if isinstance(block, dict) and block.get("type") == kind]
        if isinstance(content, list)
        else []
    )
