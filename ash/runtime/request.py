"""Builds the Messages API request of one model call: prompt, tools, conversation, cache breakpoints, options. Pure.

Everything before the newest message is the same bytes from call to call, which is what makes prompt caching work: no
clock, no counter and no random value goes into a request.
"""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]
MAX_TOKENS = 32_000
"""What every current model can answer at most, at least; the older ones are listed."""
_OLDER_MODELS = (("claude-3-7", 32_000), ("claude-3-5", 8_192), ("claude-3-", 4_096))
_MAX_BREAKPOINTS = 4
_MARK = {"type": "ephemeral"}
_MARKABLE = ("text", "image", "document", "tool_result")
_DEFAULT_THINKING_BUDGET = 10_000


def build(model: str, system: list[str], tools: list[Json], transcript: list[Json], options: Json) -> Json:
    """`options` are those of the turn: effort, thinking, outputFormat."""
    thinking = _thinking(options.get("thinking"))
    request: Json = {"model": model, "max_tokens": max_tokens(model, thinking), "stream": True}
    request.update(_marked(system, tools, transcript))
    if thinking:
        request["thinking"] = thinking
    output = _output_config(options)
    if output:
        request["output_config"] = output
    return request


def max_tokens(model: str, thinking: Json | None) -> int:
    limit = next((limit for part, limit in _OLDER_MODELS if part in model), MAX_TOKENS)
    budget = (thinking or {}).get("budget_tokens")
    return max(limit, budget + 8_192) if isinstance(budget, int) else limit  # the budget must be the smaller of the two


def _thinking(given: Any) -> Json | None:
    """The API's form of what the SDKs send (`budgetTokens`)."""
    if not isinstance(given, dict) or "type" not in given:
        return None
    thinking = {name: value for name, value in given.items() if name != "budgetTokens" and value is not None}
    if given["type"] == "enabled":
        thinking.setdefault("budget_tokens", given.get("budgetTokens") or _DEFAULT_THINKING_BUDGET)
    return thinking


def _output_config(options: Json) -> Json:
    config: Json = {}
    if options.get("effort"):
        config["effort"] = options["effort"]
    if isinstance(options.get("outputFormat"), dict):
        config["format"] = options["outputFormat"]
    return config


def _marked(system: list[str], tools: list[Json], transcript: list[Json]) -> Json:
    """The cached parts with their breakpoints: as many of our own as the user's blocks leave of the four."""
    free = max(0, _MAX_BREAKPOINTS - sum(_count_marks(message) for message in transcript))
    blocks: list[Json] = [{"type": "text", "text": text} for text in system]
    messages = list(transcript)
    ends = [index for index, message in enumerate(messages) if message["role"] == "user" and _can_mark(message)][-2:]
    if blocks and free > 0:
        blocks[-1]["cache_control"] = _MARK
    for index in ends[::-1][: max(0, free - 1)]:
        messages[index] = _mark(messages[index])
    shown = list(tools)
    if shown and free > 1 + len(ends):
        shown[-1] = {**shown[-1], "cache_control": _MARK}
    return {"system": blocks, "messages": messages, **({"tools": shown} if shown else {})}


def _count_marks(message: Json) -> int:
    content = message["content"]
    return sum(isinstance(block, dict) and "cache_control" in block for block in content) if isinstance(content, list) else 0


def _can_mark(message: Json) -> bool:
    content = message["content"]
    if isinstance(content, str):
        return bool(content)
    last = content[-1] if content else None
    return isinstance(last, dict) and last.get("type") in _MARKABLE and "cache_control" not in last


def _mark(message: Json) -> Json:
    content = message["content"]
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    blocks[-1] = {**blocks[-1], "cache_control": _MARK}
    return {**message, "content": blocks}
