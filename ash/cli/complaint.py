"""Errors in the words of the command line: what was typed instead of what the API calls it, and which command helps. Prints nothing."""

from __future__ import annotations

import argparse
import os

from ash.cli import profile
from ash.errors import AgentNotFound, AshError, ConnectionFailed, Timeout, Unauthorized


def reworded(error: AshError, args: argparse.Namespace) -> tuple[str, str]:
    """The message and the hint for an error of a command that was called with `args`."""
    message = str(error)
    if isinstance(error, Unauthorized) and hasattr(args, "api_key"):
        return message, _about_key(args)
    if isinstance(error, (ConnectionFailed, Timeout)) and hasattr(args, "server"):
        return message, error.hint or _about_link(args)
    session, agent = (_given(args, *names) for names in (("id", "session"), ("name", "agent")))
    if session and message.startswith("params/id must match format"):
        return f"{session!r} is not a session id", "see: ash session list"
    if session and message == "Session not found":
        return f"no session {session}", "see: ash session list"
    if agent and isinstance(error, AgentNotFound):
        return f'no agent "{agent}"', error.hint or "see: ash agent list"
    return message, error.hint


def _given(args: argparse.Namespace, *names: str) -> str:
    return next((str(value) for name in names if (value := getattr(args, name, None))), "")


def _about_key(args: argparse.Namespace) -> str:
    where = profile.address(args)
    if where.key:
        source = {"flag": "--api-key", "config": profile.path()}.get(where.key_source, where.key_source)
        return f"the key from {source} is not accepted; give the right one with --api-key or ASH_API_KEY"
    file = os.path.join(profile.home(), profile.INITIAL_KEY_FILE)
    return (
        "give a key with --api-key or ASH_API_KEY, or keep it with `ash link URL --api-key KEY`; "
        f"a server's first one is in its data folder: {file}"
    )


def _about_link(args: argparse.Namespace) -> str:
    if profile.address(args).source != "config":
        return ""
    return "commands are linked to that server; `ash unlink` goes back to the one of this machine"
