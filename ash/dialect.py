"""The `/api` dialect: records and log events as the reference's clients expect them on the wire. Pure functions.

Shapes and names follow the reference's contract; nothing here decides anything else. All ids are UUIDs, all data of an
event is an object and never null, because published clients have generated types that insist on it.
"""

from __future__ import annotations

import re
from typing import Any

from ash import models
from ash.models import Agent, ApiKey, Credential, Event, Json, Session

# Frames of the message stream: log type -> SSE event name. A type that is not here is not part of that stream.
_FRAMES = {
    models.TURN_STARTED: "session_start",
    models.TURN_INITIALIZED: "message",
    models.TEXT_DELTA: "text_delta",
    models.THINKING_DELTA: "thinking_delta",
    models.ASSISTANT_THINKING: "thinking_delta",
    models.ASSISTANT_DELTA: "message",
    models.TOOL_USE: "tool_use",
    models.ASSISTANT_MESSAGE: "message",
    models.TOOL_RESULT: "tool_result",
    models.USER_MESSAGE: "message",
    models.MODEL_RETRIED: "message",
    models.RESULT_RECORDED: "message",
    models.TURN_COMPLETED: "turn_complete",
    models.TURN_FAILED: "error",
    models.TURN_ENDED: "done",
}
# A block's own type names its frame, and it comes from the sandbox: it must not end a line, nor pass for a frame of ours.
_BLOCK_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_OWN_NAMES = frozenset((*_FRAMES.values(), "session_end", "resync"))

# Rows of GET /events: log type -> the timeline's type. The reference's enum is closed; other types are not shown there.
_TIMELINE = {
    models.ASSISTANT_MESSAGE: "text",
    models.TOOL_USE: "tool_start",
    models.TOOL_RESULT: "tool_result",
    models.ASSISTANT_THINKING: "reasoning",
    models.TURN_FAILED: "error",
    models.TURN_COMPLETED: "turn_complete",
    models.SESSION_STATUS_CHANGED: "lifecycle",
    models.LIMIT_REACHED: "lifecycle",
    models.EGRESS_REFUSED: "lifecycle",
    models.EGRESS_RECORDED: "lifecycle",
}
TIMELINE_TYPES = tuple(dict.fromkeys(_TIMELINE.values()))
MESSAGE_TYPES = (models.TURN_STARTED, models.ASSISTANT_MESSAGE, models.RESULT_RECORDED)


def timeline_sources(kind: str | None) -> tuple[str, ...]:
    """The log types behind a timeline type, or behind all of them."""
    return tuple(source for source, shown in _TIMELINE.items() if kind in (None, shown))


def frame(event: Event) -> tuple[str, Json] | None:
    """The SSE event name and data of a log event, or None where the message stream does not show it."""
    if event.type in (models.BLOCK_DELTA, models.ASSISTANT_BLOCK):
        return _block_name(event.data.get("type")), event.data
    name = _FRAMES.get(event.type)
    if name is None or (event.type == models.ASSISTANT_THINKING and event.data.get("streamed")):
        return None
    return name, _frame_data(event)


def _block_name(kind: Any) -> str:
    is_name = isinstance(kind, str) and _BLOCK_NAME.fullmatch(kind) and kind not in _OWN_NAMES
    return str(kind) if is_name else "block"


def _frame_data(event: Event) -> Json:
    data = event.data
    if event.type == models.TURN_STARTED:
        return {"sessionId": event.session_id, "version": data.get("version"), "turnId": data.get("turnId")}
    if event.type == models.ASSISTANT_THINKING:
        return {"delta": data.get("thinking", "")}
    if event.type == models.TURN_ENDED:
        return {"sessionId": event.session_id, "status": data.get("status"), "turnId": data.get("turnId")}
    return data


def agent(record: Agent) -> Json:
    """The values of `env` are hidden: only the names are anyone's business."""
    shown = {
        "id": record.id,
        "name": record.name,
        "tenantId": record.tenant_id,
        "version": record.version,
        "path": f"agents/{record.digest}",
        "config": record.config,
        "createdAt": record.created_at,
        "updatedAt": record.updated_at,
    }
    return {**shown, "env": dict.fromkeys(record.env, "***")} if record.env else shown


_HIDDEN_OPTIONS = ("agentEnv", "limits", "extraEnv", "credentialId", "systemPrompt")
_MASKED_FIELDS = ("env", "headers")


def session(record: Session, **live: Any) -> Json:
    """`live` adds what only the running server knows, such as the turn that is under way."""
    return {
        "id": record.id,
        "tenantId": record.tenant_id,
        "agentName": record.agent_name,
        "agentVersion": record.agent_version,
        "sandboxId": record.sandbox_id,
        "status": record.status,
        "model": record.model,
        "config": {key: _shown_option(key, value) for key, value in record.options.items() if key not in _HIDDEN_OPTIONS},
        "runnerId": None,
        "parentSessionId": record.parent_session_id,
        "createdAt": record.created_at,
        "lastActiveAt": record.last_active_at,
        **live,
    }


def _shown_option(name: str, value: Any) -> Any:
    """An option as anyone may see it: the variables and headers of MCP servers are often keys, so only their names are shown."""
    if name != "mcpServers" or not isinstance(value, dict):
        return value
    return {server: _masked(config) if isinstance(config, dict) else "***" for server, config in value.items()}


def _masked(config: Json) -> Json:
    return {
        field: (dict.fromkeys(value, "***") if isinstance(value, dict) else "***") if field in _MASKED_FIELDS else value
        for field, value in config.items()
    }


def message(event: Event, tenant_id: str, sequence: int) -> Json:
    """A row of GET /messages. `content` is JSON in a string, as the reference has it."""
    is_user = event.type == models.TURN_STARTED
    content = {"type": "user", "content": event.data.get("content")} if is_user else event.data
    return {
        "id": _row_id(event),
        "sessionId": event.session_id,
        "tenantId": tenant_id,
        "role": "user" if is_user else "assistant",
        "content": models.dump(content),
        "sequence": sequence,
        "createdAt": event.created_at,
    }


def timeline(event: Event, tenant_id: str) -> Json:
    """A row of GET /events. `data` is JSON in a string; `sequence` is the log's, so it rises but may skip."""
    return {
        "id": _row_id(event),
        "sessionId": event.session_id,
        "tenantId": tenant_id,
        "type": _TIMELINE[event.type],
        "data": models.dump(_timeline_data(event)),
        "sequence": event.seq,
        "createdAt": event.created_at,
    }


def _timeline_data(event: Event) -> Json:
    data = event.data
    if event.type == models.ASSISTANT_MESSAGE:
        return {"text": models.message_text(data)}
    if event.type == models.TOOL_USE:
        return {"toolName": data.get("name"), "name": data.get("name"), "toolId": data.get("id"), "input": data.get("input")}
    if event.type == models.TOOL_RESULT:
        failed = bool(data.get("is_error"))
        text = _result_text(data.get("content"))
        return {
            "toolName": data.get("tool_name"),
            "name": data.get("tool_name"),
            "toolId": data.get("tool_use_id"),
            "stdout": "" if failed else text,
            "stderr": text if failed else "",
            "isError": failed,
        }
    if event.type in (models.LIMIT_REACHED, models.EGRESS_REFUSED, models.EGRESS_RECORDED):
        return {"action": event.type.replace(".", "_"), **data}
    return data


def _result_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(str(part.get("text", f"[{part.get('type')}]")) for part in parts if isinstance(part, dict))


def _row_id(event: Event) -> str:
    """A UUID made of the session's id and the sequence number: stable, unique, and nothing to store."""
    import uuid

    return str(uuid.uuid5(uuid.UUID(event.session_id), str(event.seq)))


def credential(record: Credential) -> Json:
    """Never the secret. `active` is the reference's; here a credential that exists is."""
    bound = {name: getattr(record, name) for name in ("agent", "host", "header", "template", "variable")}
    return {
        "id": record.id,
        "type": record.type,
        "label": record.label,
        "active": True,
        "createdAt": record.created_at,
        "lastUsedAt": record.last_used_at,
        **{name: value for name, value in bound.items() if value is not None},
    }


def api_key(record: ApiKey) -> Json:
    return {"id": record.id, "label": record.label, "keyPrefix": "••••••••", "createdAt": record.created_at}
