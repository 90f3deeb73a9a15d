"""Reads a Messages API request as a conversation: who said what, and which tools were called since the last prompt. Pure."""

from __future__ import annotations

import re
from typing import NamedTuple

from ash.models import Json
from ash.offline.requested import Call
from ash.offline.requests import blocks, merged

_REMINDER = re.compile(r"<system-reminder>.*?</system-reminder>\s*", re.DOTALL)
_CWD = re.compile(r"(?:working directory|cwd)(?: is)?:?\s*`?(/[^\s`]*[^\s`.,;)])", re.IGNORECASE)


class Result(NamedTuple):
    call: Call
    text: str
    is_error: bool


class Conversation(NamedTuple):
    prompts: list[str]
    """What the person said, oldest first."""
    replies: list[str]
    """What the model answered to each prompt; the last prompt has none yet."""
    rounds: list[list[Result]]
    """The tool calls since the last prompt, with what came back."""
    system: str
    tools: dict[str, Json]
    """The tools offered: name to input schema."""
    attachments: int
    """Images and documents with the last prompt."""

    @property
    def prompt(self) -> str:
        return self.prompts[-1] if self.prompts else ""

    @property
    def cwd(self) -> str:
        found = _CWD.search(self.system)
        return found.group(1) if found else ""


def read(request: Json) -> Conversation:
    prompts: list[str] = []
    replies: list[str] = []
    rounds: list[list[Result]] = []
    calls: dict[str, Call] = {}
    attachments = 0
    for message in merged([message for message in request["messages"] if message["role"] != "system"]):
        if message["role"] == "assistant":
            calls.update({block["id"]: Call(block["name"], block["input"]) for block in blocks(message) if block["type"] == "tool_use"})
            if prompts:
                replies[-1] = "\n".join(part for part in (replies[-1], text_of(message)) if part)
            continue
        results = _results(message, calls)
        rounds += [results] if results else []
        said, attached = text_of(message), _attached(message)
        if said or attached:
            prompts.append(said)
            replies.append("")
            rounds, attachments = [], attached
    tools = {str(tool.get("name", tool.get("type"))): tool.get("input_schema") or {} for tool in request.get("tools") or []}
    return Conversation(prompts, replies, rounds, _system(request), tools, attachments)


def text_of(message: Json) -> str:
    """The message's text blocks, without what the client itself put in for the model."""
    text = "\n".join(block["text"] for block in blocks(message) if block["type"] == "text")
    return _REMINDER.sub("", text).strip()


def _results(message: Json, calls: dict[str, Call]) -> list[Result]:
    return [
        Result(calls[block["tool_use_id"]], _result_text(block), bool(block.get("is_error")))
        for block in blocks(message)
        if block["type"] == "tool_result" and block["tool_use_id"] in calls
    ]


def _result_text(block: Json) -> str:
    content = block.get("content") or ""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return "\n".join(part["text"] if part.get("type") == "text" else f"[{part.get('type')}]" for part in parts)


def _attached(message: Json) -> int:
    return sum(1 for block in blocks(message) if block["type"] in ("image", "document"))


def _system(request: Json) -> str:
    system = request.get("system") or ""
    parts = [system] if isinstance(system, str) else [block.get("text", "") for block in system]
    return _REMINDER.sub("", "\n".join(parts)).strip()
