"""The bridge protocol: newline-delimited JSON between the server and the bridge in its sandbox. Pure; no I/O.

The server is the peer that connects, so that a later server process can connect again. Each command carries an `id`
(int, chosen by the server, rising). Each event carries `n` (int, from 1 per bridge process, no gaps), which the server
acknowledges with `ack`; the bridge keeps what is not acknowledged and sends it again to the next connection. The server
treats every event as hostile: `decode_event` checks size and shape, and a ProtocolError ends that sandbox only.

Commands (server to bridge)                     Events (bridge to server)
  init      agent, options, transcript            ready       pid, version          once per connection, n = 0
  query     turn_id, content, options             message     turn_id, data         one whole SDK message
  interrupt turn_id                               delta       turn_id, data         one SDK `stream_event` message
  permission request_id, behavior, message        permission_request turn_id, request_id, tool_name, input
  exec      command, timeout, cwd, env, stdin     exec_output command_id, stream, data
  cancel    command_id (a running exec)           exec_result command_id, exit_code, stdout, stderr, timed_out, truncated
  ack       n                                     log         level, text
  shutdown                                        error       command_id | turn_id, error
                                                  ok          command_id            answer to init
                                                  done        turn_id, status, error
"""

from __future__ import annotations

import json
from typing import Any

from ash.errors import ProtocolError

VERSION = 1
MAX_LINE_BYTES = 64 * 1024 * 1024
"""Longest line either side accepts; a user message of 50 MB fits."""

# Where things are inside every sandbox.
AGENT_DIR = "/agent"
WORKSPACE_DIR = "/workspace"
HOME_DIR = "/home/agent"
GATEWAY_SOCKET = "/run/ash/gateway.sock"
EGRESS_SOCKET = "/run/ash/egress.sock"
PROXY_PORT = 3128
"""On a sandbox's own loopback; what connects there reaches `EGRESS_SOCKET`."""

DONE_STATUSES = ("completed", "interrupted", "failed")

# Required fields and their types. bool is excluded from int on purpose.
COMMANDS: dict[str, dict[str, tuple[type, ...]]] = {
    "init": {"agent": (dict,), "options": (dict,), "transcript": (list,)},
    "query": {"turn_id": (str,), "content": (str, list), "options": (dict,)},
    "interrupt": {"turn_id": (str,)},
    "permission": {"request_id": (str,), "behavior": (str,)},
    "exec": {"command": (str,), "timeout": (int, float)},
    "cancel": {"command_id": (int,)},
    "ack": {"n": (int,)},
    "shutdown": {},
}
EVENTS: dict[str, dict[str, tuple[type, ...]]] = {
    "ready": {"pid": (int,), "version": (int,)},
    "ok": {"command_id": (int,)},
    "message": {"turn_id": (str,), "data": (dict,)},
    "delta": {"turn_id": (str,), "data": (dict,)},
    "permission_request": {"turn_id": (str,), "request_id": (str,), "tool_name": (str,), "input": (dict,)},
    "exec_output": {"command_id": (int,), "stream": (str,), "data": (str,)},
    "exec_result": {
        "command_id": (int,),
        "exit_code": (int,),
        "stdout": (str,),
        "stderr": (str,),
        "timed_out": (bool,),
        "truncated": (bool,),
    },
    "log": {"level": (str,), "text": (str,)},
    "error": {"error": (str,)},
    "done": {"turn_id": (str,), "status": (str,)},
}


def encode(message: dict[str, Any]) -> bytes:
    """One line. ASCII-escaped, so that no byte of a multi-byte character can be cut in two."""
    return json.dumps(message, separators=(",", ":")).encode("ascii") + b"\n"


def command(name: str, id: int, **fields: Any) -> bytes:
    """The line of a command; raises ProtocolError when a required field is missing or of the wrong type."""
    message = {"cmd": name, "id": id, **fields}
    _check("cmd", message, COMMANDS)
    return encode(message)


def event(name: str, n: int, **fields: Any) -> dict[str, Any]:
    """An event as the bridge sends it, not yet encoded."""
    return {"ev": name, "n": n, **fields}


def decode_command(line: bytes) -> dict[str, Any]:
    """A command as the bridge receives it. Raises ProtocolError."""
    message = _parse(line)
    _check("cmd", message, COMMANDS)
    _check_number(message, "id")
    return message


def decode_event(line: bytes) -> dict[str, Any]:
    """An event as the server receives it. Raises ProtocolError for anything that is not exactly a known event."""
    message = _parse(line)
    _check("ev", message, EVENTS)
    _check_number(message, "n")
    if message["ev"] == "done" and message["status"] not in DONE_STATUSES:
        raise ProtocolError(f"done with unknown status {message['status']!r:.60}")
    return message


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    return number if abs(number) != float("inf") else _refuse(text)


# Strict JSON: what Python would take beyond it (NaN, Infinity, 1e999) could not be sent on to others.
_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)


def _parse(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise ProtocolError(f"a line of {len(line)} bytes; the limit is {MAX_LINE_BYTES}")
    try:
        message = _DECODER.decode(line.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a line that is not JSON: {line[:80]!r}") from error
    if not isinstance(message, dict):
        raise ProtocolError(f"a line that is not a JSON object: {line[:80]!r}")
    return message


def _check(kind: str, message: dict[str, Any], table: dict[str, dict[str, tuple[type, ...]]]) -> None:
    name = message.get(kind)
    if not isinstance(name, str) or name not in table:
        raise ProtocolError(f"unknown {kind} {name!r:.60}")
    for field, types in table[name].items():
        value = message.get(field)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise ProtocolError(f"{name}: {field} must be {' or '.join(t.__name__ for t in types)}")


def _check_number(message: dict[str, Any], field: str) -> None:
    value = message.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ProtocolError(f"{field} must be a whole number, got {value!r:.60}")
