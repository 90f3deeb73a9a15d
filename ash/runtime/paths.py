"""Where the agent's files, the workspace and the gateway are, and the environment that commands get. Starts nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from ash import protocol

_INHERITED = ("PATH", "LANG", "LC_ALL", "TZ", "USER", "LOGNAME", "TMPDIR")
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SHELLS = ("/bin/bash", "/usr/bin/bash", "/bin/sh")
_RESERVED = ("ANTHROPIC_", "CLAUDE_CODE_")
_PROXIED = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
_NOT_PROXIED = "localhost,127.0.0.1,::1"


class Paths(NamedTuple):
    """The folders and the socket of one sandbox."""

    agent: str = protocol.AGENT_DIR
    workspace: str = protocol.WORKSPACE_DIR
    home: str = protocol.HOME_DIR
    gateway: str = protocol.GATEWAY_SOCKET
    proxy: str = ""
    """The URL of the egress relay; empty without one."""

    def resolve(self, path: str) -> str:
        """An absolute path without `.` and `..`; what is relative starts at the workspace, `~` is the agent's home."""
        if path == "~" or path.startswith("~/"):
            path = self.home + path[1:]
        return os.path.normpath(os.path.join(self.workspace, path))


def find_shell() -> str:
    return next((shell for shell in _SHELLS if os.access(shell, os.X_OK)), "/bin/sh")


def tool_environ(paths: Paths, agent_env: Mapping[str, str], session_env: Mapping[str, str]) -> dict[str, str]:
    """The environment of tools and commands, built from nothing.

    What an uploaded folder sets for a model client is left out: it must not redirect model traffic. (The one place
    below `config` that reads the process's environment: `config` does not exist inside a sandbox.)
    """
    env = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    env.setdefault("PATH", _DEFAULT_PATH)
    env.setdefault("LANG", "C.UTF-8")
    env.update(HOME=paths.home, SHELL=find_shell(), PWD=paths.workspace, TERM="dumb")
    env.update(_proxy_environ(paths.proxy))
    env.update({name: value for name, value in agent_env.items() if not name.startswith(_RESERVED)})
    env.update(session_env)
    return env


def _proxy_environ(url: str) -> dict[str, str]:
    """Programs look for either spelling. Node heeds none of them unless it is told to, and only from version 22 on."""
    if not url:
        return {}
    names = {**dict.fromkeys(_PROXIED, url), "NO_PROXY": _NOT_PROXIED}
    return {**names, **{name.lower(): value for name, value in names.items()}, "NODE_USE_ENV_PROXY": "1"}
