"""What a session is inside its sandbox between turns: agent, options, transcript, tools with their state."""

from __future__ import annotations

import os
import time
from typing import Any

from ash.runtime.paths import Paths, tool_environ
from ash.runtime.permissions import PLAN, Permissions
from ash.runtime.prompt import system_prompt
from ash.runtime.settings import read_settings
from ash.runtime.tools import TOOLS, Workbench
from ash.runtime.tools.bash import bash_tool
from ash.runtime.tools.call import TOOL_TIMEOUT
from ash.runtime.transcript import repair

Json = dict[str, Any]
_PLAN_NOTE = "Plan mode is on: look at things and work out a plan, but change nothing. Tools that change something are denied."


class Conversation:
    """Made by `init`; a later `init` makes a new one. Options of a turn win over those of the session."""

    def __init__(self, paths: Paths, agent: Json, options: Json, transcript: list[Json]) -> None:
        self.paths = paths
        self.agent = agent
        self.options = options
        self.session_id = str(agent.get("sessionId") or "")
        self.settings = read_settings(paths.agent)
        env = tool_environ(paths, self.settings.env, _strings(options.get("env")))
        self.bench = Workbench(paths, env, _seconds(options.get("toolTimeout")))
        self.transcript = repair(transcript)
        self._system = system_prompt(options.get("systemPrompt"), paths, time.strftime("%Y-%m-%d"))

    def option(self, turn: Json, name: str) -> Any:
        value = turn.get(name)
        return self.options.get(name) if value is None else value

    def permissions(self, turn: Json) -> Permissions:
        permissions = Permissions(
            self.settings,
            self.paths,
            mode=self.option(turn, "permissionMode"),
            allowed=self.option(turn, "allowedTools") or (),
            disallowed=self.option(turn, "disallowedTools") or (),
        )
        self.bench.can_read = permissions.can_read
        return permissions

    def system(self, permissions: Permissions) -> list[str]:
        return [*self._system, _PLAN_NOTE] if permissions.mode == PLAN else self._system

    def tools(self, permissions: Permissions) -> list[Json]:
        tools = {**TOOLS, "Bash": bash_tool(self.bench.tool_timeout)}
        return [tool.offer() for tool in tools.values() if permissions.offers(tool.name)]


def _seconds(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else TOOL_TIMEOUT


def _strings(value: Any) -> dict[str, str]:
    return {str(name): str(item) for name, item in value.items()} if isinstance(value, dict) else {}


def new_uuid() -> str:
    """A UUIDv4. The uuid module costs 15 ms and platform look-ups."""
    data = bytearray(os.urandom(16))
    data[6] = data[6] & 0x0F | 0x40
    data[8] = data[8] & 0x3F | 0x80
    text = data.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
