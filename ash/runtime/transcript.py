"""Keeps a conversation in the form the model API accepts: every tool call answered, nothing empty. Pure."""

from __future__ import annotations

import json
from typing import Any

Json = dict[str, Any]
_SHORT_RESULT = 500
LOST = "The call was interrupted before its result was known; it may or may not have had its effect."
INTERRUPTED = "[Request interrupted by user]"


def repair(messages: list[Json]) -> list[Json]:
    """The same conversation with results for calls that have none, and without empty messages and stray results."""
    kept = [clean for message in messages if (clean := _without_empty(message)) is not None]
    repaired: list[Json] = []
    open_calls: list[str] = []
    for message in kept:
        if message["role"] == "user":
            message = _with_results(message, open_calls)
        elif open_calls:
            repaired.append(_lost(open_calls))
        if message["content"]:
            repaired.append(message)
        open_calls = _ids(message, "tool_use", "id") if message["role"] == "assistant" else []
    return [*repaired, _lost(open_calls)] if open_calls else repaired


def _without_empty(message: Any) -> Json | None:
    if not isinstance(message, dict) or message.get("role") not in ("user", "assistant"):
        return None
    content = message.get("content")
    if isinstance(content, list):
        content = [block for block in content if isinstance(block, dict) and not _is_empty_text(block)]
    elif not isinstance(content, str) or not content.strip():
        content = []
    return {"role": message["role"], "content": content} if content else None


def _is_empty_text(block: Json) -> bool:
    return block.get("type") == "text" and not str(block.get("text") or "").strip()


def _with_results(message: Json, open_calls: list[str]) -> Json:
    """Answers of `open_calls` come first, each exactly once; answers to anything else are dropped."""
    content = message["content"]
    if isinstance(content, str):
        if not open_calls:
            return message
        content = [{"type": "text", "text": content}]
    given = {block.get("tool_use_id"): block for block in content if block.get("type") == "tool_result"}
    others = [block for block in content if block.get("type") != "tool_result"]
    results = [given.get(call) or _lost_result(call) for call in open_calls]
    return {"role": "user", "content": results + others}


def _lost(open_calls: list[str]) -> Json:
    return {"role": "user", "content": [_lost_result(call) for call in open_calls]}


def _lost_result(call: str) -> Json:
    return {"type": "tool_result", "tool_use_id": call, "content": LOST, "is_error": True}


def _ids(message: Json, kind: str, field: str) -> list[str]:
    content = message["content"]
    return [str(block.get(field)) for block in content if block.get("type") == kind] if isinstance(content, list) else []


def without_media(message: Json) -> Json:
    """The message with images and documents replaced by a note: what to keep after the provider refused them."""
    if isinstance(message["content"], str):
        return message
    return {**message, "content": [_media_note(block) for block in message["content"]]}


def has_media(message: Json) -> bool:
    return without_media(message) != message


def without_results(message: Json) -> Json:
    """The message with long results of tools replaced by a note of their size: what to keep of a turn that grew too long."""
    if isinstance(message["content"], str):
        return message
    return {**message, "content": [_result_note(block) for block in message["content"]]}


def _result_note(block: Json) -> Json:
    size = len(json.dumps(block.get("content"))) if block.get("type") == "tool_result" else 0
    if size <= _SHORT_RESULT:
        return block
    note = f"[result of {size} characters left out: with it the conversation was too long for the model; ask for less at a time]"
    return {**block, "content": note}


def _media_note(block: Json) -> Json:
    if block.get("type") in ("image", "document"):
        return {"type": "text", "text": f"[{block['type']} left out: the model provider refused it]"}
    if block.get("type") == "tool_result" and isinstance(block.get("content"), list):
        return {**block, "content": [_media_note(part) for part in block["content"]]}
    return block
