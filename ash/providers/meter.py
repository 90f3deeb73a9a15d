"""Reads the token counts off a model's reply while it passes by. Pure; changes nothing and keeps no text of a stream."""

from __future__ import annotations

import json
from typing import Any

from ash import sse

_COUNTS = ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


class Meter:
    """Reads the usage off a reply as it passes by, streamed or whole."""

    def __init__(self, model: str, *, streams: bool) -> None:
        self.usage: dict[str, Any] = {"model": model}
        self.is_complete = False
        self._has_given_up = False
        self._streams = streams
        self._decoder = sse.Decoder()
        self._body = bytearray()
        self._tail = b"\n\n"

    @property
    def has_usage(self) -> bool:
        return len(self.usage) > 1

    @property
    def is_between_events(self) -> bool:
        return self._tail.endswith((b"\n\n", b"\r\n\r\n"))

    def feed(self, chunk: bytes) -> None:
        if not self._streams:
            self._body += chunk
            return
        if self._has_given_up:
            return
        self._tail = (self._tail + chunk)[-4:]
        try:
            for frame in self._decoder.feed(chunk):
                self._see(frame.data)
        except ValueError:
            self._has_given_up = self.is_complete = True  # an event beyond all bounds: passed on, not read

    def finish(self) -> None:
        """The reply has ended; a whole one is read now."""
        if self._body:
            try:
                self._merge(json.loads(self._body))
            except (ValueError, RecursionError):
                return

    def _see(self, data: Any) -> None:
        if not isinstance(data, dict):
            return
        kind = data.get("type")
        if kind == "message_start":
            self._merge(data.get("message"))
        elif kind == "message_delta":
            self._merge({"usage": data.get("usage")})
        self.is_complete = self.is_complete or kind in ("message_stop", "error")

    def _merge(self, message: Any) -> None:
        if not isinstance(message, dict):
            return
        if isinstance(message.get("model"), str):
            self.usage["model"] = message["model"]
        seen = message.get("usage")
        counts = seen if isinstance(seen, dict) else {}
        self.usage.update({name: counts[name] for name in _COUNTS if isinstance(counts.get(name), int)})
