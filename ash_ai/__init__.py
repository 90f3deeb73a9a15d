"""`from ash_ai import AshClient`: the client library under its published name. It adds nothing to `ash.client`."""

from ash.client import *  # noqa: F403
from ash.client import __all__ as _names
from ash.errors import (
    AgentNotFound,
    AgentUnusable,
    AshError,
    CapacityReached,
    Conflict,
    Forbidden,
    InvalidRequest,
    IsolationUnavailable,
    NotFound,
    PayloadTooLarge,
    RateLimited,
    SandboxFailed,
    SessionEnded,
    SessionNotFound,
    Timeout,
    TurnRunning,
    Unauthorized,
    UpstreamError,
)

AshApiError = AshError
"""The name under which earlier clients of this API know the base of its errors."""

__all__ = [
    *_names, "AgentNotFound", "AgentUnusable", "AshApiError", "CapacityReached", "Conflict", "Forbidden", "InvalidRequest",
    "IsolationUnavailable", "NotFound", "PayloadTooLarge", "RateLimited", "SandboxFailed", "SessionEnded", "SessionNotFound",
    "Timeout", "TurnRunning", "Unauthorized", "UpstreamError",
]  # fmt: skip
