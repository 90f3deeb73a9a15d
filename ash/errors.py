"""Every error that Ash raises on purpose, with the one table of codes and HTTP statuses. Imports nothing.

AshError
├── InvalidRequest          400  the caller sent something wrong
├── Unauthorized            401
├── Forbidden               403
│   └── EgressRefused            a connection out of a sandbox that is not allowed
├── NotFound                404
│   ├── AgentNotFound
│   ├── CredentialNotFound
│   └── SessionNotFound
├── Conflict                409  right request, wrong moment
│   └── TurnRunning              one turn at a time per session
├── SessionEnded            410
├── PayloadTooLarge         413
├── RangeNotSatisfiable     416
├── AgentUnusable           422  the agent folder is missing or broken
├── CredentialUnusable      422  a stored credential cannot be opened, or not be used for this
├── RateLimited             429
│   └── Overloaded               right request, the server has too much to do: `retry_after` says when to come again
├── SandboxFailed           500  a sandbox did not start, died or broke the protocol
│   └── SandboxUnresponsive      it was gone, or gave no answer, before it had anything to lose
├── StoreFailed             500  the database cannot be used: disk full, locked, damaged, too new
├── UpstreamError           502  the model provider refused or failed
│   ├── ModelRefused             its error as the Messages API words it: status, kind, headers
│   └── StreamBroken             its answer ended in the middle
├── CapacityReached         503
│   └── IsolationUnavailable     this host cannot isolate agents
├── Timeout                 504
├── ConfigError                  a setting is unknown or malformed; the start stops
├── ProtocolError                a bridge line that breaks the rules; ends that sandbox only
├── TurnFailed                   the client's: a turn ended in an error
└── ConnectionFailed             the client could not reach the server
"""

from __future__ import annotations


class AshError(Exception):
    """Base of all errors. `code` is stable and machine-readable; `status` is the HTTP status it is answered with."""

    code = "internal_error"
    status = 500
    hint = ""
    """What to do about it, where the message has fixed words."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(AshError):
    code, status = "invalid_request", 400


class Unauthorized(AshError):
    code, status = "unauthorized", 401


class Forbidden(AshError):
    code, status = "forbidden", 403


class EgressRefused(Forbidden):
    """`reason` is a fixed word; `hint` says who could allow it, and where."""

    code = "egress_refused"

    def __init__(self, message: str, *, reason: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.reason, self.hint = reason, hint


class NotFound(AshError):
    code, status = "not_found", 404


class AgentNotFound(NotFound):
    code = "agent_not_found"


class CredentialNotFound(NotFound):
    code = "credential_not_found"


class SessionNotFound(NotFound):
    code = "session_not_found"


class Conflict(AshError):
    code, status = "conflict", 409


class TurnRunning(Conflict):
    code = "turn_running"


class SessionEnded(AshError):
    code, status = "session_ended", 410


class PayloadTooLarge(AshError):
    code, status = "payload_too_large", 413


class RangeNotSatisfiable(AshError):
    code, status = "range_not_satisfiable", 416


class AgentUnusable(AshError):
    code, status = "agent_unusable", 422


class CredentialUnusable(AshError):
    code, status = "credential_unusable", 422


class RateLimited(AshError):
    code, status = "rate_limited", 429


class Overloaded(RateLimited):
    """`retry_after` is in seconds; it goes out as the header Retry-After."""

    code = "overloaded"

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class SandboxFailed(AshError):
    code, status = "sandbox_failed", 500


class SandboxUnresponsive(SandboxFailed):
    code = "sandbox_unresponsive"


class StoreFailed(AshError):
    code, status = "store_failed", 500


class UpstreamError(AshError):
    code, status = "upstream_error", 502


class ModelRefused(UpstreamError):
    """An error of the model API. `kind` is its `error.type`; `headers` are those that the caller of the API needs."""

    code = "model_refused"

    def __init__(self, message: str, *, status: int = 502, kind: str = "api_error", headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.headers = status, kind, headers or {}


class StreamBroken(UpstreamError):
    code = "stream_broken"


class CapacityReached(AshError):
    code, status = "capacity_reached", 503


class IsolationUnavailable(CapacityReached):
    code = "isolation_unavailable"


class Timeout(AshError):
    code, status = "timeout", 504


class ConfigError(AshError):
    code = "config_error"


class ProtocolError(AshError):
    code = "protocol_error"


class TurnFailed(AshError):
    code = "turn_failed"


class ConnectionFailed(AshError):
    code, status = "connection_failed", 503


def _tree(base: type[AshError]) -> dict[str, type[AshError]]:
    found = {base.code: base}
    for child in base.__subclasses__():
        found.update(_tree(child))
    return found


def error_for(status: int, code: str | None, message: str) -> AshError:
    """The error a client raises for an answer: by its `code`, else by its HTTP status, else a plain AshError."""
    classes = _tree(AshError)
    by_status = {cls.status: cls for cls in reversed(list(classes.values()))}
    cls = classes.get(code or "") or by_status.get(status) or AshError
    error = cls(message)
    error.status = status
    return error
