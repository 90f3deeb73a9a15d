"""The built-in demo model: deterministic, needs no network and no key, speaks the Messages API, really asks for tools.

The front door of the package. Knows nothing of sessions or sandboxes; `ash.gateway` and `ash offline-model` send its answers.
"""

from __future__ import annotations

from ash.offline.player import play, wait
from ash.offline.requests import check
from ash.offline.script import Player, load
from ash.offline.stream import MODEL, Answer, error_body, events, fingerprint, message
from ash.offline.tokens import count_request

__all__ = [
    "MODEL", "Answer", "Player", "check", "count_request", "error_body", "events", "fingerprint", "load", "message", "play", "run", "wait",
]  # fmt: skip


def run(host: str, port: int, script: str | None = None) -> None:
    """Serve the offline model on an address of its own until SIGINT or SIGTERM."""
    from ash.offline import app

    app.run(host, port, script)
