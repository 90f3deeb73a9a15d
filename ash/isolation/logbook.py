"""The log of one sandbox: what its bridge printed or reported, and what happened to it. Bounded; never blocks on the sandbox."""

from __future__ import annotations

import os
from collections import deque
from typing import Any

from ash import models

MAX_LINES = 10_000
MAX_TEXT = 8_192
MAX_BYTES = 4 * 1024 * 1024
"""Of all texts together: ten thousand long lines from each of a thousand sandboxes would not fit."""
_READ_BYTES = 256 * 1024
_QUIET_LEVELS = ("stdout", "debug", "info")


class Logbook:
    """A ring of the last lines, each with an index that counts on. `path` is the file that takes the bridge's own output."""

    def __init__(self, path: str) -> None:
        self._lines: deque[dict[str, Any]] = deque()
        self._bytes = 0
        self._next = 0
        self._rest = b""
        flags = os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self.output = os.open(path, os.O_WRONLY | flags, 0o600)
        """For the child to write to; it gets no descriptor to read with."""
        try:
            self._input = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            os.close(self.output)
            raise
        self._offset = os.fstat(self._input).st_size

    def system(self, text: str) -> None:
        """A line of our own."""
        self._add("system", text)

    def report(self, level: str, text: str) -> None:
        """A line that the bridge sent as an event. It cannot claim to be ours."""
        self._add("stdout" if level in _QUIET_LEVELS else "stderr", text)

    def read(self, after: int = -1) -> list[dict[str, Any]]:
        self._pull()
        return [line for line in self._lines if line["index"] > after]

    def tail(self, lines: int = 3) -> str:
        """The last words that the bridge printed."""
        self._pull()
        return "\n".join(line["text"] for line in list(self._lines)[-20:] if line["level"] == "stderr" and line["text"])[-600:].strip()

    def _pull(self) -> None:
        """Take in what was printed since the last look; of a flood, only its end."""
        if self._input < 0:
            return
        end = os.fstat(self._input).st_size
        start = max(self._offset, end - _READ_BYTES)
        chunk = os.pread(self._input, end - start, start) if end > start else b""
        self._offset = end
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        self._rest = self._rest[-MAX_TEXT:]
        for line in lines:
            self._add("stderr", line.decode("utf-8", "replace"))

    def _add(self, level: str, text: str) -> None:
        text = text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " […]"
        self._lines.append({"index": self._next, "level": level, "text": text, "ts": models.now()})
        self._next += 1
        self._bytes += len(text)
        while len(self._lines) > MAX_LINES or self._bytes > MAX_BYTES:
            self._bytes -= len(self._lines.popleft()["text"])

    def close(self) -> None:
        """Take in the last output and give the file back; the lines stay readable."""
        if self._input >= 0:
            self._pull()
            os.close(self.output)
            os.close(self._input)
            self.output = self._input = -1
