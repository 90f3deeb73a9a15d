"""Puts a model's answer together from its stream events. Pure; unknown kinds of blocks and deltas are carried through."""

from __future__ import annotations

import json
from typing import Any

Json = dict[str, Any]


class Reply:
    """One assistant message as far as it has come. `is_complete` once its `message_stop` was added."""

    def __init__(self) -> None:
        self.message: Json = {}
        self.is_complete = False
        self._blocks: dict[int, Json] = {}
        self._inputs: dict[int, list[str]] = {}
        self._texts: dict[tuple[int, str], list[str]] = {}
        self.cut_calls: set[str] = set()
        """Ids of tool calls whose input did not arrive whole."""

    def add(self, event: Json) -> None:
        kind, index = event.get("type"), event.get("index", 0)
        if kind == "message_start":
            self.message = dict(event.get("message") or {})
            self.message["usage"] = dict(self.message.get("usage") or {})
        elif kind == "content_block_start":
            self._blocks[index] = dict(event.get("content_block") or {})
        elif kind == "content_block_delta" and index in self._blocks:
            self._add_delta(index, event.get("delta") or {})
        elif kind == "message_delta":
            self._finish(event)
        elif kind == "message_stop":
            self.is_complete = True

    def _add_delta(self, index: int, delta: Json) -> None:
        block = self._blocks[index]
        for name, value in delta.items():
            if name == "type":
                continue
            if name == "partial_json":
                self._inputs.setdefault(index, []).append(str(value))
            elif name == "citation":
                block["citations"] = [*(block.get("citations") or []), value]
            elif isinstance(value, str) and name != "signature":
                self._texts.setdefault((index, name), []).append(value)
            else:
                block[name] = value

    def _finish(self, event: Json) -> None:
        self.message.update(event.get("delta") or {})
        usage = {name: value for name, value in (event.get("usage") or {}).items() if value is not None}
        self.message.setdefault("usage", {}).update(usage)

    def build(self) -> Json:
        """The message with all its blocks, as the API takes it back."""
        content = [self._build_block(index) for index in sorted(self._blocks)]
        return {"type": "message", "role": "assistant", "stop_reason": None, "stop_sequence": None, **self.message, "content": content}

    def _build_block(self, index: int) -> Json:
        block = dict(self._blocks[index])
        for (owner, name), parts in self._texts.items():
            if owner == index:
                block[name] = "".join([str(block.get(name) or ""), *parts])
        if "input" in block or index in self._inputs:
            self._build_input(block, self._inputs.get(index))
        return block

    def _build_input(self, block: Json, parts: list[str] | None) -> None:
        try:
            given = json.loads("".join(parts)) if parts and "".join(parts).strip() else block.get("input", {})
        except ValueError:
            given = None
        if not isinstance(given, dict):
            self.cut_calls.add(str(block.get("id")))
        block["input"] = given if isinstance(given, dict) else {}


def calls(message: Json) -> list[Json]:
    """The tool calls of a message that are ours to answer."""
    return [block for block in message["content"] if block.get("type") == "tool_use"]


def text(message: Json) -> str:
    return "".join(str(block.get("text", "")) for block in message["content"] if block.get("type") == "text")


def add_usage(total: Json, usage: Json) -> None:
    """Add one call's token counts to the running sums."""
    for name in ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"):
        total[name] = total.get(name, 0) + int(usage.get(name) or 0)
