"""Decides what the offline model answers to a request: call the tools that were asked for, tell what they said, or talk. Pure.

The same request always gives the same answer. Nothing here runs a tool; it only asks for one, as a real model does.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from ash.models import Json
from ash.offline import chat, conversation, requested
from ash.offline.conversation import Conversation, Result
from ash.offline.requested import Call

_SHOWN_CHARS = 4000
_READ_CHARS = 4000
_LINE_NUMBER = re.compile(r"^ *\d+(?:\t|→| ?\| ?)", re.MULTILINE)


def compose(request: Json) -> list[Json]:
    """The content blocks of the answer."""
    talk = conversation.read(request)
    body = _body(request, talk)
    return [*_thoughts(request, talk, body), *body]


def _body(request: Json, talk: Conversation) -> list[Json]:
    choice = request.get("tool_choice") or {}
    schema = _output_schema(request)
    if choice.get("type") in ("any", "tool"):
        name = choice.get("name") or _closest_tool(talk) or next(iter(talk.tools))
        return [_tool_use(Call(name, _fill(talk.tools[name], talk.prompt[:_READ_CHARS])))]
    if choice.get("type") != "none" and (step := _next_step(talk)):
        return [_text(_announce(step)), *(_tool_use(call) for call in step)]
    if schema is not None:
        return [_text(json.dumps(_fill(schema, talk.prompt[:_READ_CHARS])))]
    answer = _report(talk) if talk.rounds else _refusal(talk) or chat.respond(talk)
    return [_text(f"{answer}\n\n{chat.NOTICE}" if len(talk.prompts) == 1 else answer)]


def _text(text: str) -> Json:
    return {"type": "text", "text": text}


def _tool_use(call: Call) -> Json:
    return {"type": "tool_use", "name": call.name, "input": call.input}


def _output_schema(request: Json) -> Json | None:
    format = (request.get("output_config") or {}).get("format") or request.get("output_format") or {}
    schema = format.get("schema") if isinstance(format, dict) and format.get("type") == "json_schema" else None
    return schema if isinstance(schema, dict) else None


def _thoughts(request: Json, talk: Conversation, body: list[Json]) -> list[Json]:
    mode = (request.get("thinking") or {}).get("type", "disabled")
    if mode == "disabled" or (mode == "between_tools" and not talk.rounds):
        return []
    calls = [block["name"] for block in body if block["type"] == "tool_use"]
    next_thing = f"That takes {' and '.join(calls)}, so I call it." if calls else "I have what I need, so I answer."
    return [{"type": "thinking", "thinking": f"The user asks: {chat.quote(talk.prompt, 200)} {next_thing}"}]


# Tools


def _next_step(talk: Conversation) -> list[Call]:
    """The calls to make now: the next step of what was asked for, unless a call of the step before it failed."""
    if talk.rounds and any(result.is_error for result in talk.rounds[-1]):
        return []
    steps = requested.plan(talk.prompt, talk.tools, talk.cwd).steps
    if not steps and not talk.rounds and (name := _closest_tool(talk)):
        steps = [[Call(name, _fill(talk.tools[name], talk.prompt[:_READ_CHARS]))]]
    return steps[len(talk.rounds)] if len(talk.rounds) < len(steps) else []


_KNOWN_TOOLS = {"Bash", "Read", "Write", "Edit", "Glob", "Grep", "TodoWrite"}


def _closest_tool(talk: Conversation) -> str | None:
    """A tool that is not one of the usual ones and whose name the prompt speaks of: "weather" for `get_weather`."""
    prompt = talk.prompt[:_READ_CHARS].lower()
    words = set(re.findall(r"\w{4,}", prompt))
    for name in talk.tools:
        parts = {part.lower() for part in re.findall(r"[A-Z]?[a-z]{3,}", name.split("__")[-1])}
        if name not in _KNOWN_TOOLS and (name.lower() in prompt or parts & words):
            return name
    return None


def _refusal(talk: Conversation) -> str | None:
    """What to say when the request is for tools that are not there."""
    missing = requested.plan(talk.prompt, talk.tools, talk.cwd).missing
    if not missing:
        return None
    names = " and ".join(f"`{name}`" for name in missing)
    offered = ", ".join(f"`{name}`" for name in talk.tools) or "none"
    return f"That takes the tool {names}, which this session does not offer me (offered: {offered})."


def _announce(step: list[Call]) -> str:
    return " ".join(_ANNOUNCED.get(call.name, lambda call: f"I will call `{call.name}`.")(call) for call in step)


_ANNOUNCED: dict[str, Any] = {
    "Bash": lambda call: f"I will run `{call.input.get('command', '')}`.",
    "Read": lambda call: f"I will read {call.input.get('file_path', 'a file')}.",
    "Write": lambda call: f"I will write {call.input.get('file_path', 'a file')}.",
    "Edit": lambda call: f"I will edit {call.input.get('file_path', 'a file')}.",
    "Glob": lambda call: f"I will look for files that match `{call.input.get('pattern', '')}`.",
    "Grep": lambda call: f"I will search for `{call.input.get('pattern', '')}`.",
    "TodoWrite": lambda call: "I will note that down.",
}


def _report(talk: Conversation) -> str:
    """What the tools said, in words."""
    parts = [_told(result) for results in talk.rounds for result in results]
    if len(parts) > 1 and talk.rounds[0][0].call.name == "Read" and talk.rounds[-1][0].call.name == "Edit":
        parts = parts[1:]
    left = len(requested.plan(talk.prompt, talk.tools, talk.cwd).steps) - len(talk.rounds)
    if left > 0:
        parts.append(f"So I stopped there; {left} more step{'s were' if left > 1 else ' was'} not tried.")
    return "\n\n".join(parts)


def _told(result: Result) -> str:
    call, text = result.call, result.text.strip("\n")
    if result.is_error:
        return f"That did not work. `{call.name}` said:\n\n{_fenced(text or 'nothing')}"
    if call.name == "Bash":
        command = call.input.get("command", "")
        return f"I ran `{command}`. It printed:\n\n{_fenced(text)}" if text else f"I ran `{command}`. It finished without output."
    if call.name == "Read":
        content = _LINE_NUMBER.sub("", text)
        path = call.input.get("file_path", "")
        return f"This is in {path}:\n\n{_fenced(content)}" if content else f"{path} is empty."
    if call.name == "Write":
        return f"I wrote {call.input.get('file_path', '')} ({len(str(call.input.get('content', '')))} characters)."
    if call.name == "Edit":
        change = call.input
        return f"I replaced “{change.get('old_string')}” with “{change.get('new_string')}” in {change.get('file_path')}."
    if call.name == "TodoWrite":
        todos = call.input.get("todos")
        items = [str(item.get("content")) for item in (todos if isinstance(todos, list) else []) if isinstance(item, dict)]
        return f"I noted {len(items)} task{'s' if len(items) != 1 else ''}:\n\n" + "\n".join(f"- {item}" for item in items)
    found = {"Glob": "These files match", "Grep": "This is what I found for"}.get(call.name)
    subject = f"{found} `{call.input.get('pattern', '')}`" if found else f"`{call.name}` answered"
    return f"{subject}:\n\n{_fenced(text or 'nothing')}"


def _fenced(text: str) -> str:
    shown = text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}\n… ({len(text) - _SHOWN_CHARS} more characters)"
    fence = "````" if "```" in shown else "```"
    return f"{fence}\n{shown}\n{fence}"


# Values that fit a JSON schema, taken from the prompt where it has some


def _fill(schema: Any, prompt: str, depth: int = 0) -> Any:
    if not isinstance(schema, dict):
        return _subject(prompt)
    if "const" in schema or "default" in schema:
        return schema.get("const", schema.get("default"))
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        named = [value for value in schema["enum"] if re.search(rf"\b{re.escape(str(value))}\b", prompt, re.IGNORECASE)]
        return (named or schema["enum"])[0]
    options = schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf")
    if isinstance(options, list) and options and depth < 8:
        return _fill(options[0], prompt, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    return _fill_kind(kind[0] if isinstance(kind, list) and kind else kind, schema, prompt, depth)


def _fill_kind(kind: Any, schema: Json, prompt: str, depth: int) -> Any:
    if kind == "object":
        given, required = schema.get("properties"), schema.get("required")
        properties = given if isinstance(given, dict) else {}
        # Once each: a name repeated at every depth would multiply the work.
        named = dict.fromkeys(name for name in required if isinstance(name, str)) if isinstance(required, list) else {}
        names = list(named) or ([] if depth > 2 else list(properties))
        return {name: _fill(properties.get(name), prompt, depth + 1) for name in names} if depth < 8 else {}
    if kind == "array":
        items = schema.get("items")
        return [_fill(items, prompt, depth + 1)] if isinstance(items, dict) and depth < 8 else []
    if kind in ("integer", "number"):
        number, least = re.search(r"-?\d{1,15}(?:\.\d{1,15})?", prompt), schema.get("minimum")
        is_usable = isinstance(least, (int, float)) and abs(least) < 10**15
        value = float(number.group()) if number else float(least if is_usable and least is not None else 1)
        return int(value) if kind == "integer" or value.is_integer() else value
    if kind in ("boolean", "null"):
        return True if kind == "boolean" else None
    return _subject(prompt)


@functools.lru_cache(maxsize=16)
def _subject(prompt: str) -> str:
    """What the prompt is about: what it quotes, what follows "in", "for" or "of", else all of it."""
    quoted = re.search(r"[\"“`']([^\"”`']+)[\"”`']", prompt)
    after = re.search(r"\b(?:in|for|of|about|at|from|to) ([^?.!,\n]+?)(?= (?:in|for|of|on|at|from|to|with)\b|[?.!,\n]|$)", prompt)
    found = quoted or after
    return (found.group(1) if found else prompt).strip(" ?.!")
