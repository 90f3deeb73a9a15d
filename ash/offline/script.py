"""Replies prepared in a JSON file, for tests and demonstrations: text, thinking, tool calls, delays, errors, broken streams.

Which reply comes is read off the request itself, so a script goes on where it was after a restart. Nothing is sent here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from ash.errors import ConfigError, ModelRefused
from ash.models import Json
from ash.offline import answers, requests
from ash.offline.conversation import text_of
from ash.offline.stream import Answer

_STOP_REASONS = ("end_turn", "max_tokens", "stop_sequence", "tool_use", "pause_turn", "refusal", "model_context_window_exceeded")
_KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 402: "billing_error", 403: "permission_error", 404: "not_found_error",
    409: "conflict_error", 413: "request_too_large", 429: "rate_limit_error", 504: "timeout_error", 529: "overloaded_error",
}  # fmt: skip
_REMEMBERED_ERRORS = 10_000

_Check = tuple[Callable[[Any], bool], str]
_TEXT: _Check = (lambda value: isinstance(value, str) and bool(value), "a text that is not empty")
_SECONDS: _Check = (lambda value: type(value) in (int, float) and 0 <= value < 86400, "a number of seconds")
_COUNT: _Check = (lambda value: type(value) is int and value >= 0, "a whole number, 0 or more")
_SIZE: _Check = (lambda value: _COUNT[0](value) and value > 0, "a whole number, 1 or more")
_HANG: _Check = (lambda value: isinstance(value, bool) or _COUNT[0](value), "true, or the number of events after which nothing comes")
_OBJECT: _Check = (lambda value: isinstance(value, dict), "an object")
_STATUS: _Check = (lambda value: _COUNT[0](value) and 400 <= value <= 599, "an HTTP status from 400 to 599")

_REPLY_FIELDS: dict[str, _Check] = {
    "match": _TEXT,
    "text": (lambda value: isinstance(value, str), "a text"),
    "thinking": _TEXT,
    "tools": (lambda value: isinstance(value, list) and bool(value), "a list of {name, input}"),
    "delay": _SECONDS,
    "delta_delay": _SECONDS,
    "chunk": _SIZE,
    "stop_reason": (lambda value: value in _STOP_REASONS, f"one of {', '.join(_STOP_REASONS)}"),
    "usage": (lambda value: isinstance(value, dict) and all(_COUNT[0](count) for count in value.values()), "an object of token counts"),
    "error": _OBJECT,
    "cut": _COUNT,
    "hang": _HANG,
}
_TOOL_FIELDS: dict[str, _Check] = {"name": _TEXT, "input": _OBJECT, "id": _TEXT}
_ERROR_FIELDS: dict[str, _Check] = {
    "status": _STATUS,
    "type": _TEXT,
    "message": _TEXT,
    "times": _SIZE,
    "after": _COUNT,
    "headers": (lambda value: isinstance(value, dict) and all(isinstance(text, str) for text in value.values()), "an object of texts"),
}


def load(path: str) -> list[Json]:
    """The replies of a script file. Raises ConfigError that names the file, the reply and the field."""
    try:
        with open(path, encoding="utf-8") as file:
            script = json.load(file)
    except OSError as error:
        raise ConfigError(f"offline script {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"offline script {path}: not valid JSON: {error}") from error
    return parse(script, f"offline script {path}")


def parse(script: Any, where: str = "offline script") -> list[Json]:
    if not isinstance(script, dict) or not isinstance(script.get("replies"), list):
        raise ConfigError(f'{where}: must be an object with a list: {{"replies": [...]}}')
    if extra := set(script) - {"replies"}:
        raise ConfigError(f"{where}: unknown field {min(extra)!r}; there is only 'replies'")
    replies: list[Json] = script["replies"]
    for index, reply in enumerate(replies):
        _check_reply(reply, f"{where}: replies[{index}]")
    return replies


def _check_reply(reply: Any, where: str) -> None:
    _check_fields(reply, _REPLY_FIELDS, where)
    for index, tool in enumerate(reply.get("tools", [])):
        _check_fields(tool, _TOOL_FIELDS, f"{where}.tools[{index}]")
        if "name" not in tool:
            raise ConfigError(f"{where}.tools[{index}].name is missing")
    if "error" in reply:
        _check_fields(reply["error"], _ERROR_FIELDS, f"{where}.error")
    try:
        re.compile(reply.get("match", ""))
    except re.error as error:
        raise ConfigError(f"{where}.match is not a valid regular expression: {error}") from error


def _check_fields(value: Any, fields: dict[str, _Check], where: str) -> None:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be an object, got {json.dumps(value)[:60]}")
    for name, given in value.items():
        if name not in fields:
            raise ConfigError(f"{where}.{name}: there is no such field; the fields are {', '.join(fields)}")
        is_right, expected = fields[name]
        if not is_right(given):
            raise ConfigError(f"{where}.{name} must be {expected}, got {json.dumps(given)[:60]}")


class Player:
    """Answers requests: from the script where it has a reply, else as the demo model. Remembers only which errors it gave."""

    def __init__(self, replies: list[Json] | None = None) -> None:
        self._matched = [(index, reply) for index, reply in enumerate(replies or []) if "match" in reply]
        self._in_order = [(index, reply) for index, reply in enumerate(replies or []) if "match" not in reply]
        self._errors_given: OrderedDict[tuple[int, str], int] = OrderedDict()

    def answer(self, request: Json) -> Answer:
        """The answer to a checked request."""
        found = self._find(request)
        if found is None:
            return Answer(answers.compose(request))
        index, reply = found
        refusal = self._refusal(index, reply, request)
        return _to_answer(reply, request, refusal)

    def _find(self, request: Json) -> tuple[int, Json] | None:
        last = _last_text(request)
        for index, reply in self._matched:
            if reply["match"] in last or re.search(reply["match"], last):
                return index, reply
        turn = sum(1 for message in request["messages"] if message["role"] == "assistant")
        return self._in_order[turn] if turn < len(self._in_order) else None

    def _refusal(self, index: int, reply: Json, request: Json) -> ModelRefused | None:
        """The reply's error, as long as this request has not been given it as often as `times` says."""
        error = reply.get("error")
        if error is None:
            return None
        key = (index, hashlib.sha256(json.dumps(request["messages"]).encode()).hexdigest())
        given = self._errors_given.pop(key, 0)
        self._errors_given[key] = given + 1
        if len(self._errors_given) > _REMEMBERED_ERRORS:
            self._errors_given.popitem(last=False)
        if given >= error.get("times", given + 1):
            return None
        status = error.get("status", 500)
        kind = error.get("type") or _KINDS.get(status, "api_error")
        return ModelRefused(error.get("message", "This error is scripted."), status=status, kind=kind, headers=error.get("headers"))


def _last_text(request: Json) -> str:
    """What the model reacts to: the text of the last message, or what the tools said when it has none."""
    last = requests.merged(request["messages"])[-1]
    if text := text_of(last):
        return text
    contents = [block.get("content") or "" for block in requests.blocks(last) if block["type"] == "tool_result"]
    return "\n".join(content if isinstance(content, str) else text_of({"content": content}) for content in contents)


def _to_answer(reply: Json, request: Json, refusal: ModelRefused | None) -> Answer:
    hang = reply.get("hang", False)
    return Answer(
        blocks=_blocks(reply) or answers.compose(request),
        stop_reason=reply.get("stop_reason"),
        usage=reply.get("usage", {}),
        delay=reply.get("delay", 0.0),
        delta_delay=reply.get("delta_delay", 0.0),
        chunk=reply.get("chunk"),
        refusal=refusal,
        after=reply.get("error", {}).get("after"),
        cut=reply.get("cut"),
        hang=None if hang is False else int(hang) if not isinstance(hang, bool) else 0,
    )


def _blocks(reply: Json) -> list[Json]:
    blocks: list[Json] = []
    if "thinking" in reply:
        blocks.append({"type": "thinking", "thinking": reply["thinking"]})
    if reply.get("text"):
        blocks.append({"type": "text", "text": reply["text"]})
    return blocks + [{"type": "tool_use", "input": {}, **tool} for tool in reply.get("tools", [])]
