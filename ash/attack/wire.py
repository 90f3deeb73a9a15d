"""Requests to the API as an attacker makes them: any method, path and header, and the answer whatever it is. Keeps no connection."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from ash.errors import ConnectionFailed, ProtocolError
from ash.remote.connection import Connection
from ash.remote.http1 import request_head
from ash.remote.server import Server


class Answer(NamedTuple):
    """Status and body. `is_given` says that the server did what it was asked."""

    status: int
    text: str

    @property
    def is_given(self) -> bool:
        return 200 <= self.status < 300

    def json(self) -> dict[str, Any]:
        """The object in the body. Raises ProtocolError for anything but an answer that was given."""
        found = json.loads(self.text) if self.is_given and self.text.startswith("{") else None
        if not isinstance(found, dict):
            raise ProtocolError(f"the server answered {self.status}: {self._explained()}")
        return found

    def _explained(self) -> str:
        """What an error answer says, in the shape of the API or as it is."""
        with suppress(ValueError, TypeError, KeyError):
            return str(json.loads(self.text)["error"])
        return self.text[:200]


class Caller:
    """Speaks to one server, with one key or none."""

    def __init__(self, server: Server, key: str = "") -> None:
        self._server, self._key = server, key

    def ask(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, *, timeout: float = 30.0) -> Answer:
        """Raises ConnectionFailed when there is no answer at all."""
        content = b"" if body is None else json.dumps(body).encode()
        host = f"[{self._server.host}]" if ":" in self._server.host else self._server.host
        wanted = {"Host": f"{host}:{self._server.port}", "Connection": "close", "Accept": "*/*"}
        if self._key:
            wanted["Authorization"] = f"Bearer {self._key}"
        if content:
            wanted |= {"Content-Type": "application/json", "Content-Length": str(len(content))}
        try:
            return self._exchange(request_head(method, self._server.prefix + path, {**wanted, **(headers or {})}) + content, timeout)
        except OSError as error:
            raise ConnectionFailed(f"{self._server.url}: {error}") from error

    def _exchange(self, request: bytes, timeout: float) -> Answer:
        connection = Connection(self._server, timeout)
        try:
            connection.send(request, None)
            status = connection.read_head().status
            return Answer(status, connection.read_all().decode("utf-8", "replace"))
        finally:
            connection.close()
