"""Plausible token counts for a model that has no tokenizer: the same text always counts the same. Pure; no I/O.

Never exact for a real model; good enough to show where usage, cache figures and `max_tokens` come from.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ash.models import Json
from ash.offline.requests import blocks

_PIECE = re.compile(r"\s*\w{1,6}|\s*[^\w\s]|\s+")
_LONG_TEXT = 20_000
_IMAGE_TOKENS = 1500
_MESSAGE_OVERHEAD = 4
_TOOLS_OVERHEAD = 340


def pieces(text: str) -> list[str]:
    """The text cut into what counts as one token each."""
    return _PIECE.findall(text)


def count_text(text: str) -> int:
    return len(pieces(text)) if len(text) <= _LONG_TEXT else len(text) // 4


def count_request(request: Json) -> int:
    return sum(size for size, _ in _parts(request))


def input_usage(request: Json) -> Json:
    """The input side of `usage`. Everything up to the last cache breakpoint is cached; of that, what an earlier request of the
    same conversation had already sent (all before the last assistant message) counts as read, the rest as created."""
    parts = _parts(request)
    marked = [index for index, (_, is_marked) in enumerate(parts) if is_marked]
    cached = marked[-1] + 1 if marked else 0
    if request.get("cache_control"):
        cached = len(parts)
    known = min(cached, _known_parts(request, len(parts)))
    read = sum(size for size, _ in parts[:known])
    created = sum(size for size, _ in parts[known:cached])
    return {
        "input_tokens": sum(size for size, _ in parts[cached:]),
        "cache_creation_input_tokens": created,
        "cache_read_input_tokens": read,
        "cache_creation": {"ephemeral_5m_input_tokens": created, "ephemeral_1h_input_tokens": 0},
    }


def _parts(request: Json) -> list[tuple[int, bool]]:
    """Each cacheable part in the API's order (tools, system, messages): its tokens, and whether a breakpoint stands on it."""
    tools, system = request.get("tools") or [], request.get("system") or []
    parts = [(_count_json(tool), _is_marked(tool)) for tool in tools]
    if tools:
        parts[0] = (parts[0][0] + _TOOLS_OVERHEAD, parts[0][1])
    parts += [(count_block(block), _is_marked(block)) for block in blocks({"content": system})] if system else []
    for message in request["messages"]:
        sizes = [(count_block(block), _is_marked(block)) for block in blocks(message)]
        sizes[0] = (sizes[0][0] + _MESSAGE_OVERHEAD, sizes[0][1])
        parts += sizes
    return parts


def _known_parts(request: Json, total: int) -> int:
    """How many parts an earlier request of this conversation had sent: all before its last assistant message."""
    tail = 0
    for message in reversed(request["messages"]):
        tail += len(blocks(message))
        if message["role"] == "assistant":
            return total - tail
    return 0


def count_block(block: Json) -> int:
    kind = block.get("type")
    if kind == "text":
        return count_text(str(block.get("text", "")))
    if kind == "image":
        return _IMAGE_TOKENS
    if kind == "document":
        return _IMAGE_TOKENS + len(str(block.get("source", ""))) // 16
    if kind == "tool_result":
        content = block.get("content") or ""
        return _MESSAGE_OVERHEAD + sum(count_block(inner) for inner in blocks({"content": content})) if content else _MESSAGE_OVERHEAD
    if kind == "thinking":
        return count_text(str(block.get("thinking", "")))
    return _count_json(block)


def _count_json(value: Any) -> int:
    return max(1, len(json.dumps(value, separators=(",", ":"))) // 4)


def _is_marked(part: Any) -> bool:
    return isinstance(part, dict) and bool(part.get("cache_control"))
