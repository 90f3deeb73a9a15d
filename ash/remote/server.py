"""Which server, with which key: addresses, the head of each request, and errors in words. Opens no connection."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from ash import __version__
from ash.errors import AshError, ConnectionFailed, Forbidden, InvalidRequest, Overloaded, RateLimited, Timeout, Unauthorized, error_for
from ash.remote.calls import Call
from ash.remote.folder import Upload
from ash.remote.http1 import BrokenResponse, Head, request_head

if TYPE_CHECKING:
    import ssl

_RETRIES = 3
_LONGEST_PAUSE = 15.0


class Server(NamedTuple):
    """Where requests go, and how long one may take. `prefix` is the path that a proxy serves the API under.

    `stored_key` is sent only to a server that asked for a key, as `with_stored_key` has it.
    """

    url: str
    scheme: str
    host: str
    port: int
    prefix: str
    api_key: str | None
    timeout: float
    stream_timeout: float
    ssl_context: ssl.SSLContext | None = None
    stored_key: str | None = None

    def __repr__(self) -> str:
        return f"Server({self.url!r})"

    def head(self, call: Call[Any]) -> bytes:
        """The bytes that open `call`."""
        default = 443 if self.scheme == "https" else 80
        host = f"[{self.host}]" if ":" in self.host else self.host
        headers = {
            "Host": host if self.port == default else f"{host}:{self.port}",
            "User-Agent": f"ash/{__version__}",
            "Accept": "application/json",
            "Connection": "close",
            **call.headers,
        }
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        if call.body is not None:
            headers.setdefault("Content-Type", "application/json")
            headers["Content-Length"] = str(call.body.size if isinstance(call.body, Upload) else len(call.body))
        return request_head(call.method, self.prefix + call.path, headers)

    def tls(self) -> ssl.SSLContext | None:
        if self.scheme != "https":
            return None
        import ssl

        return self.ssl_context or ssl.create_default_context()


def parse_server(
    url: str,
    api_key: str | None,
    timeout: float,
    stream_timeout: float,
    ssl_context: ssl.SSLContext | None,
    stored_key: str | None = None,
) -> Server:
    """Raises InvalidRequest for an address that is not an http or https URL."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidRequest(f"the server address {url!r} is not a URL: {error}") from error
    if parts.scheme not in ("http", "https") or not host:
        raise InvalidRequest(f"the server address {url!r} must look like http://localhost:4100")
    if parts.username is not None or parts.query or parts.fragment:
        raise InvalidRequest("the server address must not hold a user, a query or a fragment; give the key as api_key")
    port = port or (443 if parts.scheme == "https" else 80)
    prefix = parts.path.rstrip("/")
    key, stored = (text.strip() if text else None for text in (api_key, stored_key))
    return Server(url.strip().rstrip("/"), parts.scheme, host, port, prefix, key, timeout, stream_timeout, ssl_context, stored)


def with_stored_key(server: Server, refused: Unauthorized) -> Server:
    """The same server, to be asked again with the stored key. On this machine anybody may listen, so the key goes only to a server of
    this user or root. A refused request has started nothing. Raises `refused`, or says why, where there is no key to send.
    """
    from ash.remote.owner import is_this_machine, is_trusted

    if server.api_key or not server.stored_key:
        raise refused
    if is_this_machine(server.host) and not is_trusted(server.port):
        error = Forbidden(f"{server.url} asks for a key, and that server belongs to another user: the stored key was not sent")
        error.hint = "use --server or --api-key"
        raise error from refused
    return server._replace(api_key=server.stored_key)


def pause_before_retry(refused: Overloaded, attempt: int) -> float:
    """How long to wait before the same request is sent again: the server refused it before it had done anything. Raises `refused` when
    it was sent often enough or the server asks for more patience than a caller has.
    """
    if attempt >= _RETRIES or refused.retry_after > _LONGEST_PAUSE:
        raise refused
    return refused.retry_after * (1 + os.urandom(1)[0] / 512)


def refusal(call: Call[Any], head: Head, body: bytes) -> AshError:
    """The error for an answer that is not a success."""
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    answer = answer if isinstance(answer, dict) else {}
    detail = answer.get("error") or answer.get("message")
    if isinstance(detail, dict):
        detail = detail.get("message")
    message = str(detail or _unexplained(head, body))
    code = answer.get("code")
    error = error_for(head.status, code if isinstance(code, str) else None, message)
    hint = answer.get("hint")
    after = head.headers.get("retry-after", "")
    if isinstance(error, RateLimited) and after:
        hint = f"try again in {after} s"
    if isinstance(error, Overloaded):
        error.retry_after = float(after) if after.isdecimal() else 1.0
    error.hint = hint if isinstance(hint, str) else ""
    return error


def _unexplained(head: Head, body: bytes) -> str:
    if 300 <= head.status < 400:
        return f"the server redirects to {head.headers.get('location', 'another address')}; use that address instead"
    text = body[:200].decode("utf-8", "replace").strip()
    return f"HTTP {head.status} {head.reason}".strip() + (f": {text}" if text and text.isprintable() else "")


def answer(call: Call[Any], head: Head, body: bytes) -> Any:
    """What `call` returns for this response; raises the error it stands for."""
    if not 200 <= head.status < 300:
        raise refusal(call, head, body)
    if call.is_raw:
        return call.parse(body)
    try:
        value = json.loads(body) if body.strip() else {}
    except ValueError as error:
        raise BrokenResponse(f"the answer to {call.method} {call.path} is not JSON; is this address an Ash server?") from error
    return call.parse(value)


def failure(server: Server, error: OSError) -> AshError:
    """A lost or impossible connection, in words that say what to do."""
    if isinstance(error.__cause__, ConnectionRefusedError):
        return ConnectionFailed(f"no server answers at {server.url}; start one with `ash start`, or give the address of another")
    if isinstance(error, TimeoutError):
        return Timeout(f"{server.url} did not answer in time")
    return ConnectionFailed(f"{server.url}: {error}")
