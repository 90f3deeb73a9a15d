"""Checks a Messages API request the way the real API does, so that a mistake shows up offline first. Pure; no I/O.

Raises ModelRefused with the real API's status, error type and wording; says nothing about what to answer.
"""

from __future__ import annotations

import re
from typing import Any

from ash.errors import ModelRefused
from ash.models import Json

_FIELDS = frozenset({
    "billing_policy", "cache_control", "compaction", "container", "context_management", "diagnostics", "fallback_credit_token",
    "fallbacks", "inference_geo", "max_tokens", "mcp_servers", "messages", "metadata", "model", "output_config", "output_format",
    "service_tier", "speed", "stop_sequences", "stream", "system", "temperature", "thinking", "thread", "tool_choice", "tools",
    "top_k", "top_p", "user_profile_id",
})  # fmt: skip
_USER_BLOCKS = frozenset({"text", "image", "document", "search_result", "tool_result", "container_upload"})
_ASSISTANT_BLOCKS = frozenset({"text", "thinking", "redacted_thinking", "tool_use", "server_tool_use", "compaction"})
_REQUIRED = {
    "text": ("text",),
    "image": ("source",),
    "document": ("source",),
    "tool_result": ("tool_use_id",),
    "tool_use": ("id", "name", "input"),
    "thinking": ("thinking", "signature"),
    "redacted_thinking": ("data",),
}
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")
_MAX_BREAKPOINTS = 4
_MIN_THINKING_TOKENS = 1024
_MAX_MESSAGES = 100_000
_MAX_DEPTH = 200
_RESULT_BLOCKS = frozenset({"text", "image", "document", "search_result", "tool_reference"})
_STRINGS = {"tool_use": ("id", "name"), "tool_result": ("tool_use_id",), "thinking": ("thinking",)}


def invalid(message: str) -> ModelRefused:
    return ModelRefused(message, status=400, kind="invalid_request_error")


def check(request: Any, *, counting: bool = False) -> Json:
    """The request itself when the API would take it; `counting` is for count_tokens, which needs no `max_tokens`."""
    if not isinstance(request, dict):
        raise invalid("The request body must be a JSON object.")
    _check_depth(request)
    _check_fields(request, counting)
    _check_system(request.get("system"))
    _check_output(request)
    _check_messages(request["messages"])
    _check_tools(request.get("tools"), request.get("tool_choice"))
    _check_thinking(request)
    found = _count_breakpoints(request)
    if found > _MAX_BREAKPOINTS:
        raise invalid(f"A maximum of {_MAX_BREAKPOINTS} blocks with cache_control may be provided. Found {found}.")
    return request


def _check_depth(value: Any) -> None:
    """What comes after this may recurse."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        inner = [child for parent in level for child in (parent.values() if isinstance(parent, dict) else parent)]
        level = [child for child in inner if isinstance(child, (dict, list))]
        if not level:
            return
    raise invalid(f"The request is nested more than {_MAX_DEPTH} deep.")


def _check_fields(request: Json, counting: bool) -> None:
    for name in ("model", "messages") if counting else ("model", "max_tokens", "messages"):
        if name not in request:
            raise invalid(f"{name}: Field required")
    for name in request:
        if name not in _FIELDS:
            raise invalid(f"{name}: Extra inputs are not permitted")
    if not isinstance(request["model"], str) or not request["model"]:
        raise invalid("model: Input should be a valid string")
    tokens = request.get("max_tokens", 1)
    if not isinstance(tokens, int) or isinstance(tokens, bool):
        raise invalid("max_tokens: Input should be a valid integer")
    if tokens < 0:
        raise invalid("max_tokens: Input should be greater than or equal to 0")
    if not isinstance(request.get("system", ""), (str, list)):
        raise invalid("system: Input should be a valid string or list")
    stops = request.get("stop_sequences") or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise invalid("stop_sequences: each stop sequence must be a non-empty string")


def _check_system(system: Any) -> None:
    for index, block in enumerate(system if isinstance(system, list) else []):
        if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise invalid(f"system.{index}: Input should be a text block")


def _check_output(request: Json) -> None:
    config = request.get("output_config")
    if not isinstance(config, (dict, type(None))):
        raise invalid("output_config: Input should be an object")
    formats = {"output_config.format": (config or {}).get("format"), "output_format": request.get("output_format")}
    for name, format in formats.items():
        if not isinstance(format, (dict, type(None))):
            raise invalid(f"{name}: Input should be an object")


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list):
        raise invalid("messages: Input should be a valid list")
    if not messages:
        raise invalid("messages: at least one message is required")
    if len(messages) > _MAX_MESSAGES:
        raise invalid(f"messages: at most {_MAX_MESSAGES} messages are allowed, got {len(messages)}")
    for index, message in enumerate(messages):
        _check_message(message, f"messages.{index}")
    if messages[0]["role"] == "assistant":
        raise invalid('messages: first message must use the "user" role')
    if messages[-1]["role"] == "assistant":
        raise invalid("This model does not support assistant message prefill. The conversation must end with a user message.")
    _check_pairs(messages)


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict):
        raise invalid(f"{where}: Input should be an object")
    for name in ("role", "content"):
        if name not in message:
            raise invalid(f"{where}.{name}: Field required")
    for name in message:
        if name not in ("role", "content"):
            raise invalid(f"{where}.{name}: Extra inputs are not permitted")
    role, content = message["role"], message["content"]
    if role not in ("user", "assistant", "system"):
        raise invalid(f"{where}.role: Input should be 'user', 'assistant' or 'system'")
    if not isinstance(content, (str, list)):
        raise invalid(f"{where}.content: Input should be a valid string or list")
    if not content:
        raise invalid(f"{where}: all messages must have non-empty content")
    for index, block in enumerate(content if isinstance(content, list) else []):
        _check_block(block, role, f"{where}.content.{index}")


def _check_block(block: Any, role: str, where: str) -> None:
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        raise invalid(f"{where}.type: Field required")
    kind = block["type"]
    allowed = _ASSISTANT_BLOCKS if role == "assistant" else _USER_BLOCKS
    if kind not in allowed and not kind.endswith("_tool_result"):
        tags = ", ".join(f"'{tag}'" for tag in sorted(allowed))
        raise invalid(f"{where}: Input tag '{kind}' found using 'type' does not match any of the expected tags: {tags}")
    for name in _REQUIRED.get(kind, ()):
        if name not in block:
            raise invalid(f"{where}.{kind}.{name}: Field required")
    for name in _STRINGS.get(kind, ()):
        if not isinstance(block[name], str):
            raise invalid(f"{where}.{kind}.{name}: Input should be a valid string")
    if kind == "text":
        _check_text(block["text"], where)
    if kind == "tool_use" and not isinstance(block["input"], dict):
        raise invalid(f"{where}.tool_use.input: Input should be a valid dictionary")
    if kind == "tool_result":
        _check_result(block.get("content", ""), f"{where}.tool_result.content")


def _check_result(content: Any, where: str) -> None:
    if not isinstance(content, (str, list)):
        raise invalid(f"{where}: Input should be a valid string or list")
    for index, block in enumerate(content if isinstance(content, list) else []):
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(kind, str) or kind not in _RESULT_BLOCKS:
            raise invalid(f"{where}.{index}.type: Input should be one of {', '.join(sorted(_RESULT_BLOCKS))}")
        if kind == "text" and not isinstance(block.get("text"), str):
            raise invalid(f"{where}.{index}.text.text: Input should be a valid string")


def _check_text(text: Any, where: str) -> None:
    if not isinstance(text, str):
        raise invalid(f"{where}.text.text: Input should be a valid string")
    if not text:
        raise invalid("messages: text content blocks must be non-empty")


def blocks(message: Json) -> list[Json]:
    """A message's content as blocks, whichever of its two forms it has."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _ids(message: Json, kind: str, field: str) -> list[str]:
    return [str(block[field]) for block in blocks(message) if block["type"] == kind]


def merged(messages: list[Json]) -> list[Json]:
    """Turns: neighbours of one role count as one message, as they do for the real model."""
    turns: list[Json] = []
    for message in messages:
        if turns and turns[-1]["role"] == message["role"]:
            turns[-1]["content"] += blocks(message)
        else:
            turns.append({"role": message["role"], "content": list(blocks(message))})
    return turns


def _check_pairs(messages: list[Json]) -> None:
    """Each tool_use is answered in the very next turn, and nothing is answered that was not called."""
    turns = merged([message for message in messages if message["role"] != "system"])
    seen: set[str] = set()
    for index, turn in enumerate(turns):
        called = _ids(turns[index - 1], "tool_use", "id") if index and turn["role"] == "user" else []
        answers, expected = _ids(turn, "tool_result", "tool_use_id"), set(called)
        for answered in answers:
            if answered not in expected:
                raise invalid(
                    f"messages.{index}.content: unexpected `tool_use_id` found in `tool_result` blocks: {answered}. Each `tool_result` "
                    "block must have a corresponding `tool_use` block in the previous message."
                )
        given = set(answers)
        missing = [call for call in called if call not in given]
        if missing:
            raise invalid(
                f"messages.{index - 1}: `tool_use` ids were found without `tool_result` blocks immediately after: {', '.join(missing)}. "
                "Each `tool_use` block must have a corresponding `tool_result` block in the next message."
            )
        for call in _ids(turn, "tool_use", "id"):
            if call in seen:
                raise invalid(f"messages.{index}.content: `tool_use` ids must be unique")
            seen.add(call)


def _check_tools(tools: Any, choice: Any) -> None:
    if not isinstance(tools or [], list):
        raise invalid("tools: Input should be a valid list")
    names = [_tool_name(tool, f"tools.{index}") for index, tool in enumerate(tools or [])]
    if len(set(names)) < len(names):
        raise invalid("tools: Tool names must be unique.")
    if choice is None:
        return
    if not isinstance(choice, dict) or choice.get("type") not in ("auto", "any", "tool", "none"):
        raise invalid("tool_choice: Input should have a 'type' of 'auto', 'any', 'tool' or 'none'")
    if not names and choice["type"] != "none":
        raise invalid("tool_choice: may only be specified while providing tools.")
    if choice["type"] == "tool" and choice.get("name") not in names:
        raise invalid(f"Tool '{choice.get('name')}' not found in provided tools")


def _tool_name(tool: Any, where: str) -> str:
    if not isinstance(tool, dict):
        raise invalid(f"{where}: Input should be an object")
    is_custom = tool.get("type") in (None, "custom")
    for field in ("name", "input_schema") if is_custom else ():
        if field not in tool:
            raise invalid(f"{where}.custom.{field}: Field required")
    name = tool.get("name", tool.get("type"))
    if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
        raise invalid(f"{where}.custom.name: String should match pattern '^[a-zA-Z0-9_-]{{1,128}}$'")
    schema = tool.get("input_schema", {"type": "object"})
    if not isinstance(schema, dict) or schema.get("type") != "object":
        raise invalid(f"{where}.custom.input_schema.type: Input should be 'object'")
    return name


def _check_thinking(request: Json) -> None:
    thinking = request.get("thinking")
    if thinking is None:
        return
    if not isinstance(thinking, dict) or thinking.get("type") not in ("enabled", "disabled", "adaptive", "between_tools"):
        raise invalid("thinking: Input should have a 'type' of 'enabled', 'adaptive', 'between_tools' or 'disabled'")
    if thinking["type"] == "enabled":
        _check_budget(thinking.get("budget_tokens"), request.get("max_tokens"))
    if thinking["type"] in ("enabled", "adaptive") and (request.get("tool_choice") or {}).get("type") in ("any", "tool"):
        raise invalid("Thinking may not be enabled when tool_choice forces tool use.")


def _check_budget(budget: Any, limit: int | None) -> None:
    if not isinstance(budget, int) or isinstance(budget, bool):
        raise invalid("thinking.enabled.budget_tokens: Field required")
    if budget < _MIN_THINKING_TOKENS:
        raise invalid(f"thinking.enabled.budget_tokens: Input should be greater than or equal to {_MIN_THINKING_TOKENS}")
    if limit is not None and budget >= limit:
        raise invalid("`max_tokens` must be greater than `thinking.budget_tokens`.")


def _count_breakpoints(request: Json) -> int:
    system = request.get("system")
    parts = [*(request.get("tools") or []), *(system if isinstance(system, list) else [])]
    for message in request["messages"]:
        parts += blocks(message)
    marked = sum(1 for part in parts if isinstance(part, dict) and part.get("cache_control"))
    return marked + bool(request.get("cache_control"))
