"""An answer as the Messages API sends it: the streaming events, or the whole message. Pure, and deterministic: ids are hashes.

What the answer says is decided elsewhere; here it meets `max_tokens`, the stop sequences and the usage figures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from ash.errors import ModelRefused
from ash.models import Json
from ash.offline import tokens

MODEL = "offline"
_ALPHABET = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_MIN_DELTA_CHARS, _MAX_DELTA_CHARS = 12, 200


class Answer(NamedTuple):
    """What to answer. `blocks` are text {text}, thinking {thinking} and tool_use {name, input}, each with its `type`."""

    blocks: list[Json]
    stop_reason: str | None = None
    usage: Json = {}  # noqa: RUF012 - never changed in place
    delay: float = 0.0
    delta_delay: float = 0.0
    chunk: int | None = None
    refusal: ModelRefused | None = None
    after: int | None = None
    """Events after which `refusal` comes as an `error` event; None: instead of the answer."""
    cut: int | None = None
    """Events after which the connection breaks."""
    hang: int | None = None
    """Events after which nothing comes any more."""


class _Draft(NamedTuple):
    """The answer as far as limits let it come."""

    blocks: list[Json]
    stop_reason: str
    stop_sequence: str | None
    output_tokens: int
    seed: str


def fingerprint(request: Json) -> str:
    """The same for the same request, streamed or not."""
    shown = {name: value for name, value in request.items() if name != "stream"}
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def _id(prefix: str, seed: str) -> str:
    digest = hashlib.sha256(f"{prefix}{seed}".encode()).digest()
    return prefix + "01" + "".join(_ALPHABET[byte % len(_ALPHABET)] for byte in digest[:22])


def message(request: Json, answer: Answer) -> Json:
    """The answer to a request that does not stream."""
    draft = _draft(request, answer)
    content = [{name: value for name, value in block.items() if name != "json"} for block in draft.blocks]
    usage = {**tokens.input_usage(request), "output_tokens": draft.output_tokens, "service_tier": "standard", **answer.usage}
    return {**_envelope(draft, usage), "content": content, "stop_reason": draft.stop_reason, "stop_sequence": draft.stop_sequence}


def events(request: Json, answer: Answer) -> Iterator[Json]:
    """Every event of the stream in order; the event's name is its `type`."""
    draft = _draft(request, answer)
    usage: Json = {**tokens.input_usage(request), "output_tokens": min(1, draft.output_tokens), "service_tier": "standard", **answer.usage}
    yield {"type": "message_start", "message": _envelope(draft, usage)}
    for index, block in enumerate(draft.blocks):
        yield {"type": "content_block_start", "index": index, "content_block": _opening(block)}
        if index == 0:
            yield {"type": "ping"}
        for delta in _deltas(block, answer.chunk):
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    final = {**{name: usage[name] for name in names}, "output_tokens": answer.usage.get("output_tokens", draft.output_tokens)}
    ending = {"stop_reason": draft.stop_reason, "stop_sequence": draft.stop_sequence}
    yield {"type": "message_delta", "delta": ending, "usage": final}
    yield {"type": "message_stop"}


def _envelope(draft: _Draft, usage: Json) -> Json:
    return {
        "id": _id("msg_", draft.seed),
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage,
    }


def _draft(request: Json, answer: Answer) -> _Draft:
    seed = fingerprint(request)
    shows_thinking = (request.get("thinking") or {}).get("display") != "omitted"
    finished, stop = _stop_at(answer.blocks, request.get("stop_sequences") or [])
    whole = [_complete(block, f"{seed}{index}", shows_thinking) for index, block in enumerate(finished)]
    kept, output_tokens, is_cut = _fit(whole, request["max_tokens"])
    natural = "tool_use" if any(block["type"] == "tool_use" for block in kept) else "end_turn"
    if is_cut or stop is not None:
        return _Draft(kept, "max_tokens" if is_cut else "stop_sequence", None if is_cut else stop, output_tokens, seed)
    return _Draft(kept, answer.stop_reason or natural, None, output_tokens, seed)


def _complete(block: Json, seed: str, shows_thinking: bool) -> Json:
    """The block as the API words it. `json` is a tool call's input as it is streamed."""
    if block["type"] == "tool_use":
        call_id = block.get("id") or _id("toolu_", seed)
        text = json.dumps(block["input"])
        return {"type": "tool_use", "id": call_id, "name": block["name"], "input": block["input"], "json": text}
    if block["type"] == "thinking":
        return {"type": "thinking", "thinking": block["thinking"] if shows_thinking else "", "signature": _id("offline-", seed)}
    return {"type": "text", "text": block["text"]}


def _stop_at(blocks: list[Json], stops: list[str]) -> tuple[list[Json], str | None]:
    """The blocks up to the first stop sequence in a text, and that sequence."""
    for index, block in enumerate(blocks):
        found = [(block["text"].find(stop), stop) for stop in stops if stop in block["text"]] if block["type"] == "text" else []
        if found:
            position, stop = min(found)
            rest = [{**block, "text": block["text"][:position]}] if position else []
            return blocks[:index] + rest, stop
    return blocks, None


_TEXT_OF = {"text": "text", "thinking": "thinking", "tool_use": "json"}


def _fit(blocks: list[Json], limit: int) -> tuple[list[Json], int, bool]:
    """The blocks that `limit` tokens allow, the tokens they take, and whether something was cut off."""
    kept: list[Json] = []
    used = 0
    for block in blocks:
        field = _TEXT_OF[block["type"]]
        parts = tokens.pieces(block[field])
        room = limit - used
        if len(parts) > room:
            short = {**block, field: "".join(parts[:room])}
            if block["type"] == "tool_use":
                short["input"] = {}
            return ([*kept, short] if room else kept), limit, True
        kept.append(block)
        used += len(parts)
    return kept, used, False


def _opening(block: Json) -> Json:
    if block["type"] == "tool_use":
        return {"type": "tool_use", "id": block["id"], "name": block["name"], "input": {}}
    if block["type"] == "thinking":
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _deltas(block: Json, chunk: int | None) -> Iterator[Json]:
    if block["type"] == "tool_use":
        yield {"type": "input_json_delta", "partial_json": ""}
        for part in _slices(block["json"], chunk):
            yield {"type": "input_json_delta", "partial_json": part}
    elif block["type"] == "thinking":
        for part in _slices(block["thinking"], chunk):
            yield {"type": "thinking_delta", "thinking": part}
        yield {"type": "signature_delta", "signature": block["signature"]}
    else:
        for part in _slices(block["text"], chunk):
            yield {"type": "text_delta", "text": part}


def _slices(text: str, chunk: int | None) -> Iterator[str]:
    """The text in runs of `chunk` characters, or of a few whole words."""
    if chunk:
        yield from (text[start : start + chunk] for start in range(0, len(text), chunk))
        return
    run = ""
    for piece in tokens.pieces(text):
        if len(run) >= _MIN_DELTA_CHARS and (piece[0].isspace() or len(run) >= _MAX_DELTA_CHARS):
            yield run
            run = ""
        run += piece
    if run:
        yield run


def error_body(refusal: ModelRefused) -> dict[str, Any]:
    return {"type": "error", "error": {"type": refusal.kind, "message": refusal.message}}
