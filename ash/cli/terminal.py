"""Everything that is printed goes through here: answers on stdout, all else on stderr. Text from outside cannot steer the terminal."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from ash.config import client_environ

# An escape sequence in full: CSI, a string (OSC, DCS, PM, APC, SOS) up to its end, or two characters.
_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_].*?(?:\x07|\x1b\\)|[ -/]*[0-OQ-WYZ\\`-~])|\x9b[0-?]*[ -/]*[@-~]", re.DOTALL)
_UNFINISHED = re.compile(r"(?:\x1b(?:\[[0-?]*[ -/]*|[\]PX^_][^\x07\x1b]*\x1b?|[ -/]*)|\x9b[0-?]*[ -/]*)\Z")
# Control characters but newline and tab, C1 controls, and the marks that reorder text.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_MAX_HELD = 4096

BOLD, DIM, RED, GREEN, YELLOW, CYAN = "1", "2", "31", "32", "33", "36"


class Sanitizer:
    """Takes text in pieces and gives it back without escape sequences and control characters, also when one is cut in two."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> str:
        text = _SEQUENCE.sub("", self._held + text)
        unfinished = _UNFINISHED.search(text)
        self._held = ""
        if unfinished is not None and len(unfinished.group()) <= _MAX_HELD:
            self._held = unfinished.group()
            text = text[: unfinished.start()]
        return _CONTROL.sub("", text)


def clean(text: str) -> str:
    """One whole text, made harmless."""
    return _CONTROL.sub("", _SEQUENCE.sub("", text))


class Terminal:
    """The two output streams of a command. Colours and cleaning apply where a stream is a terminal."""

    def __init__(self, *, is_json: bool = False, no_color: bool = False, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.out, self.err = out or sys.stdout, err or sys.stderr
        self.is_json = is_json
        self.out_is_tty, self.err_is_tty = self.out.isatty(), self.err.isatty()
        is_plain = no_color or bool(client_environ("NO_COLOR")) or client_environ("TERM") == "dumb"
        self.has_colors = self.err_is_tty and not is_plain
        self._sanitizer = Sanitizer()
        self._is_mid_line = False
        self._is_paused = False
        self._has_progress = False

    def paint(self, text: str, *styles: str) -> str:
        """`text` in a style, for stderr."""
        return f"\x1b[{';'.join(styles)}m{text}\x1b[0m" if self.has_colors and text else text

    def answer(self, text: str) -> None:
        """Text of the model, on stdout, as it arrives."""
        self.clear_progress()
        text = self._sanitizer.feed(text) if self.out_is_tty else text
        if text and self._is_paused:
            self._is_paused = False
            text = text.removeprefix("\n")  # the pause has ended that line already
        self._write(self.out, text)
        if text:
            self._is_mid_line = not text.endswith("\n")

    def pause_answer(self) -> None:
        """Something is about to be noted amid the answer: it begins on a line of its own, wherever the two streams end up."""
        if self._is_mid_line:
            self.end_answer()
            self._is_paused = True

    def end_answer(self) -> None:
        """Close the last line of an answer."""
        if self._is_mid_line:
            self._write(self.out, "\n")
        self._is_mid_line = self._is_paused = False

    def line(self, text: str) -> None:
        """A line of the command's own output, on stdout."""
        self.clear_progress()
        self._write(self.out, (clean(text) if self.out_is_tty else text) + "\n")

    def data(self, value: Any) -> None:
        """A JSON value on stdout, readable."""
        self._write(self.out, json.dumps(value, indent=2) + "\n")

    def json_line(self, value: Any) -> None:
        self._write(self.out, json.dumps(value) + "\n")

    def note(self, text: str, *styles: str) -> None:
        """A line for the person who watches, on stderr."""
        self.clear_progress()
        if self._is_mid_line and self.out_is_tty:
            self._write(self.out, "\n")
            self._is_mid_line = False
        self._write(self.err, self.paint(clean(text), *styles) + "\n")

    def error(self, text: str, hint: str = "") -> None:
        self.clear_progress()
        if self._is_mid_line and self.out_is_tty:
            self.end_answer()
        self._write(self.err, self.paint("error: ", RED, BOLD) + clean(text) + (f" ({clean(hint)})" if hint else "") + "\n")

    def progress(self, label: str, done: int, total: int) -> None:
        """A line that is drawn over itself; nothing when nobody watches."""
        if self.err_is_tty:
            self._write(self.err, f"\r{label} {100 * done // max(total, 1):3d} % of {size(total)}")
            self._has_progress = True

    def clear_progress(self) -> None:
        """Take the progress line away."""
        if self._has_progress:
            self._write(self.err, "\r\x1b[K" if self.has_colors else "\n")
            self._has_progress = False

    def table(self, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
        """Columns on stdout."""
        widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
        for row in [header, *rows]:
            self.line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

    def width(self) -> int:
        return shutil.get_terminal_size().columns if self.err_is_tty else 160

    def _write(self, stream: TextIO, text: str) -> None:
        stream.write(text)
        stream.flush()


def size(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1024**2:.1f} MiB" if count >= 1024**2 else f"{count / 1024:.1f} KiB"


def shorten(text: str, width: int) -> str:
    """The first line of `text`, cut to `width`, with a mark where something is left out."""
    first, _, rest = text.strip().partition("\n")
    cut = first if len(first) <= width else first[: max(width - 1, 1)]
    return cut + ("…" if rest or cut != first else "")
