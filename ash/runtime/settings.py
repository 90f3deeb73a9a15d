"""Reads what the agent's folder says: its prompt and its `.claude/settings.json`. Never writes, and obeys no folder against its session.

A settings file that cannot be understood must not lose its deny rules silently: `problem` then says what is wrong and
where, and no tool runs.
"""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

from ash.runtime.paths import Paths

FILES = (".claude/settings.json", ".claude/settings.local.json")
DEFAULT_PROMPT = "You are a helpful assistant that can use tools to work with files and run commands."
_LISTS = ("allow", "deny", "ask")


class Settings(NamedTuple):
    """The permissions and environment of an agent's folder."""

    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    ask: tuple[str, ...] = ()
    default_mode: str | None = None
    forbids_bypass: bool = False
    env: dict[str, str] = {}  # noqa: RUF012 - never changed
    problem: str | None = None


class _Broken(Exception):
    pass


def read_settings(agent_dir: str) -> Settings:
    """Both settings files together; the local one adds to the shared one."""
    settings = Settings()
    for name in FILES:
        try:
            settings = _merge(settings, _load(agent_dir, name), name)
        except _Broken as broken:
            return Settings(problem=f"{name}{broken}")
    return settings


def _load(agent_dir: str, name: str) -> dict[str, Any]:
    try:
        with open(os.path.join(agent_dir, name), "rb") as file:
            text = file.read().decode("utf-8-sig")
        value = json.loads(text) if text.strip() else {}
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise _Broken(f" line {error.lineno} column {error.colno}: {error.msg}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise _Broken(f": {error}") from error
    if not isinstance(value, dict):
        raise _Broken(": must be a JSON object")
    return value


def _merge(settings: Settings, value: dict[str, Any], name: str) -> Settings:
    permissions = _expect(value.get("permissions", {}), dict, "permissions")
    rules = {key: getattr(settings, key) + _strings(permissions.get(key, []), f"permissions.{key}") for key in _LISTS}
    env = _expect(value.get("env", {}), dict, "env")
    mode = permissions.get("defaultMode")
    return settings._replace(
        **rules,
        default_mode=settings.default_mode if mode is None else _expect(mode, str, "permissions.defaultMode"),
        forbids_bypass=settings.forbids_bypass or permissions.get("disableBypassPermissionsMode") == "disable",
        env={**settings.env, **{str(key): _env_value(item, key) for key, item in env.items()}},
    )


def _expect(value: Any, kind: type, key: str) -> Any:
    if not isinstance(value, kind):
        raise _Broken(f": {key} must be {'an object' if kind is dict else 'a string'}")
    return value


def _strings(value: Any, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _Broken(f": {key} must be a list of strings")
    return tuple(value)


def _env_value(value: Any, key: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise _Broken(f": env.{key} must be a string")
    if "\0" in str(value) or "=" in key or not key or "\0" in key:
        raise _Broken(f": env.{key!r} is no name and value of an environment variable")
    return str(value)


def system_prompt(option: str | None, paths: Paths, today: str) -> list[str]:
    """The prompt of the session, else the agent's CLAUDE.md, followed by where the agent is.

    `today` is fixed at `init`: a date taken anew each turn would change the cached prefix of a long conversation.
    """
    prompt = option if option is not None else _read_prompt(paths.agent)
    place = (
        "<env>\n"
        f"Working directory: {paths.workspace}\n"
        f"Agent files (read-only): {paths.agent}\n"
        "Platform: linux, in a sandbox of its own\n"
        f"Today's date: {today}\n"
        "</env>"
    )
    return [prompt if prompt.strip() else DEFAULT_PROMPT, place]


def _read_prompt(agent_dir: str) -> str:
    try:
        with open(os.path.join(agent_dir, "CLAUDE.md"), "rb") as file:
            return file.read().decode("utf-8-sig", "replace")
    except OSError:
        return ""
