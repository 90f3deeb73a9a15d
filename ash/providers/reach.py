"""What a model request would have the provider do beyond answering: fetch an address, search, run code, keep state, ask other models.

Such a request leads out of a sandbox past its egress, so that only what is known to stay inside passes without the operator's
word; what is new is refused until it is named. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ash.models import Json

_FIELDS = frozenset((
    "model", "messages", "max_tokens", "system", "tools", "tool_choice", "stream", "stop_sequences", "temperature", "top_p", "top_k",
    "metadata", "thinking", "service_tier", "speed", "context_management", "compaction", "output_config", "output_format", "cache_control",
))  # fmt: skip
_BLOCKS = frozenset((
    "text", "image", "document", "search_result", "thinking", "redacted_thinking", "tool_use", "tool_result", "tool_reference",
    "compaction", "server_tool_use", "mcp_tool_use",
))  # fmt: skip
_PAST = ("_tool_result", "_result", "_error", "_output")
"""Ends of the types of blocks that only tell what a tool of the provider gave in an earlier call."""
_SOURCES = ("base64", "text", "content")
_CALLER_TOOLS = ("bash_", "text_editor_", "computer_", "memory_", "tool_search_tool_")
"""Beginnings of the types of tools that the caller runs itself, or that only look through the other tools."""


def find_features(request: Json) -> list[str]:
    """The names of all that needs the operator's word: fields, types of tools and of blocks, `url_source`, `file_source`."""
    found = dict.fromkeys(name for name in request if name not in _FIELDS)
    found.update(dict.fromkeys(_of_tools(request.get("tools"))))
    found.update(dict.fromkeys(_of_blocks(request.get("system"), request.get("messages"))))
    return list(found)


def find_models(request: Json) -> list[str]:
    """Every model that the request names: its own, those that stand in for it, those that its tools ask."""
    fallbacks = request.get("fallbacks")
    named = [request["model"]]
    named += [f"fallbacks: {fallbacks}"] if isinstance(fallbacks, str) else []  # which ones they are the provider decides
    entries = [*_objects(fallbacks), *_objects(request.get("tools")), *_added_tools(request)]
    return list(dict.fromkeys(named + [entry["model"] for entry in entries if isinstance(entry.get("model"), str)]))


def _objects(value: Any) -> Iterator[Json]:
    """The objects in a list; one object counts as a list of it."""
    for item in [value] if isinstance(value, dict) else value if isinstance(value, list) else []:
        if isinstance(item, dict):
            yield item


def _of_tools(tools: Any) -> Iterator[str]:
    for tool in _objects(tools):
        kind = tool.get("type", "custom")
        if kind is not None and kind != "custom" and not str(kind).startswith(_CALLER_TOOLS):
            yield str(kind)


def _of_blocks(*places: Any) -> Iterator[str]:
    for block in _blocks(*places):
        kind = str(block.get("type", "text"))
        if kind not in _BLOCKS and not kind.endswith(_PAST):
            yield kind
        if kind == "tool_addition":
            yield from _of_tools(list(block.values()))
        source = block.get("source")
        if isinstance(source, dict) and source.get("type") not in _SOURCES:
            yield f"{source.get('type')}_source"


def _blocks(*places: Any) -> Iterator[Json]:
    """All content blocks, those inside others too. A tool's input is not content: there anything may stand."""
    waiting = list(places)
    while waiting:
        for item in _objects(waiting.pop()):
            if "role" not in item:
                yield item
            source = item.get("source")
            waiting += [item.get("content"), source.get("content") if isinstance(source, dict) else None]


def _added_tools(request: Json) -> Iterator[Json]:
    for block in _blocks(request.get("messages")):
        if block.get("type") == "tool_addition":
            yield from _objects(list(block.values()))
