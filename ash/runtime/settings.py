"""Reads the `.claude/settings.json` of the agent's folder. Never writes, and obeys no folder against its session.

A settings file that cannot be understood must not lose its deny rules silently: `problem` then says what is wrong and
where, and no tool runs.
"""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

FILES = (".claude/settings.json", ".claude/settings.local.json")
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
