"""Takes a secret out of what a host answers, byte stream or text, and leaves the length as it is. Pure.

It stops a host that repeats what it was sent: plain, or as base64, URL, JSON or HTML write it. It cannot stop one that
transforms the secret in any other way.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable
from urllib.parse import quote

FILL = b"*"
"""What stands in a secret's place. Not a letter of base64: what was a secret must not pass for one."""


def needles(secret: str) -> set[bytes]:
    """The forms in which a secret is looked for."""
    plain = secret.encode()
    escaped, urls = json.dumps(secret)[1:-1], (quote(secret, safe=""), quote(secret))
    texts = {secret, html.escape(secret), html.escape(secret, quote=False), escaped, escaped.replace("/", "\\/")}
    texts |= {*urls, *map(_in_lower_case, urls)}
    forms = {text.encode() for text in texts}
    forms |= {core for before in range(3) for core in _base64_cores(plain, before)}
    return {form for form in forms if form}


def _in_lower_case(url: str) -> str:
    """`%2f` for `%2F`: both are in use."""
    return re.sub("%..", lambda match: match.group().lower(), url)


def _base64_cores(secret: bytes, before: int) -> Iterable[bytes]:
    """What is the same in every base64 text that holds the secret with `before` bytes (modulo 3) in front of it."""
    encoded = base64.b64encode(bytes(before) + secret)
    first = (before * 8 + 5) // 6
    last = (before + len(secret)) * 8 // 6
    core = encoded[first:last]
    yield core
    yield core.replace(b"+", b"-").replace(b"/", b"_")


class Redactor:
    """One stream. As many bytes are held back as a secret's beginning could be.

    Always as many, whatever they are: otherwise what comes late would tell, character by character, how a secret begins.
    """

    def __init__(self, forms: Iterable[bytes]) -> None:
        self._forms = sorted(forms, key=len, reverse=True)
        self._kept = len(self._forms[0]) - 1 if self._forms else 0
        self._held = b""

    @property
    def holds(self) -> bool:
        return bool(self._held)

    def feed(self, data: bytes) -> bytes:
        text = self.redact(self._held + data)
        cut = max(0, len(text) - self._kept)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> bytes:
        """What was held back, at the end or when nothing more comes for now."""
        held, self._held = self._held, b""
        return held

    def redact(self, data: bytes) -> bytes:
        """One whole text."""
        for form in self._forms:  # no pattern of them all: for a long secret it takes a second to make
            if form in data:
                data = data.replace(form, FILL * len(form))
        return data
