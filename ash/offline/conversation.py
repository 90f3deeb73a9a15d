"""Reads a Messages API request as a conversation: who said what, and which tools were called since the last prompt. Pure."""

from __future__ import annotations

import re
from typing import NamedTuple

from ash.models import Json
from ash.offline.requested import Call
from ash.offline.requests import blocks, merged

_REMINDER = ("<system-reminder>", "</system-reminder>")
_SPACE = re.compile(r"\s*")
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
    replies: list[list[str]] = []
    rounds: list[list[Result]] = []
    calls: dict[str, Call] = {}
    attachments = 0
    for message in merged([message for message in request["messages"] if message["role"] != "system"]):
        if message["role"] == "assistant":
            calls.update({block["id"]: Call(block["name"], block["input"]) for block in blocks(message) if block["type"] == "tool_use"})
            if prompts:
                replies[-1].append(text_of(message))
            continue
        results = _results(message, calls)
        rounds += [results] if results else []
        said, attached = text_of(message), _attached(message)
        if said or attached:
            prompts.append(said)
            replies.append([])
            rounds, attachments = [], attached
    tools = {str(tool.get("name", tool.get("type"))): tool.get("input_schema") or {} for tool in request.get("tools") or []}
    said_before = ["\n".join(filter(None, parts)) for parts in replies]
    return Conversation(prompts, said_before, rounds, _system(request), tools, attachments)


def text_of(message: Json) -> str:
    """The message's text blocks, without what the client itself put in for the model."""
    text = "\n".join(block["text"] for block in blocks(message) if block["type"] == "text")
    return _without_reminders(text).strip()


def _without_reminders(text: str) -> str:
    """Not by a pattern: many openings without an end would each be searched to the end of the text."""
    opening, ending = _REMINDER
    kept, start = [], 0
    while (opened := text.find(opening, start)) >= 0 and (ended := text.find(ending, opened)) >= 0:
        kept.append(text[start:opened])
        space = _SPACE.match(text, ended + len(ending))
        start = space.end() if space else ended + len(ending)
    return "".join([*kept, text[start:]])


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
    return _without_reminders("\n".join(parts)).strip()
