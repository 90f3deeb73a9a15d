"""The messages that a turn sends besides the model's own, in the shapes that clients of agent SDKs know. Pure."""

from __future__ import annotations

from typing import Any, NamedTuple

from ash.runtime.model import ModelError

Json = dict[str, Any]
_MODEL_USAGE = {
    "inputTokens": "input_tokens",
    "outputTokens": "output_tokens",
    "cacheReadInputTokens": "cache_read_input_tokens",
    "cacheCreationInputTokens": "cache_creation_input_tokens",
}


class End(NamedTuple):
    """How a turn ended, as its result message says it."""

    subtype: str
    text: str
    is_error: bool = False
    stop_reason: str | None = None


def init(cwd: str, tools: list[str], model: str, mode: str) -> Json:
    return {
        "type": "system",
        "subtype": "init",
        "cwd": cwd,
        "tools": tools,
        "mcp_servers": [],
        "model": model,
        "permissionMode": mode,
        "slash_commands": [],
        "apiKeySource": "none",
        "agents": [],
        "skills": [],
        "plugins": [],
        "output_style": "default",
    }


def api_retry(failure: ModelError, attempt: int, max_retries: int, delay: float) -> Json:
    return {
        "type": "system",
        "subtype": "api_retry",
        "attempt": attempt,
        "max_retries": max_retries,
        "retry_delay_ms": round(delay * 1000),
        "error_status": failure.status,
        "error": failure.kind,
        "message": str(failure),
    }


def tool_progress(call: Json, seconds: float) -> Json:
    return {
        "type": "tool_progress",
        "tool_use_id": call["id"],
        "tool_name": call.get("name"),
        "parent_tool_use_id": None,
        "elapsed_time_seconds": round(seconds, 1),
    }


def assistant(message: Json) -> Json:
    return {"type": "assistant", "message": message, "parent_tool_use_id": None}


def user(content: list[Json]) -> Json:
    return {"type": "user", "message": {"role": "user", "content": content}, "parent_tool_use_id": None}


def tool_results(calls: list[Json], results: list[Json], detail: Json) -> Json:
    return {**user(results), "tool_use_result": detail, "tool_names": {call["id"]: call.get("name") for call in calls}}


def stream_event(event: Json) -> Json:
    return {"type": "stream_event", "event": event, "parent_tool_use_id": None}


def result(end: End, *, model: str, calls: int, seconds: float, api_seconds: float, usage: Json, denials: list[Json]) -> Json:
    """`total_cost_usd` is 0: prices are known to nobody inside a sandbox."""
    model_usage = {name: usage[source] for name, source in _MODEL_USAGE.items()}
    return {
        "type": "result",
        "subtype": end.subtype,
        "is_error": end.is_error,
        "duration_ms": round(seconds * 1000),
        "duration_api_ms": round(api_seconds * 1000),
        "num_turns": calls,
        "result": end.text,
        "stop_reason": end.stop_reason,
        "total_cost_usd": 0,
        "usage": usage,
        "modelUsage": {model: {**model_usage, "costUSD": 0}},
        "permission_denials": denials,
    }
