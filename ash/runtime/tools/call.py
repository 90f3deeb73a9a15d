"""What a tool is, what it gets and what it gives back; and the check of a call's input against the tool's schema."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ash.runtime.interrupt import Interrupt
from ash.runtime.paths import Paths
from ash.runtime.shell import Shell

Json = dict[str, Any]
TOOL_TIMEOUT = 600.0


class ToolError(Exception):
    """A call that cannot be done, in words for the model."""


class Outcome(NamedTuple):
    """What the model gets (`content`: text or blocks), and the same for programs (`detail`)."""

    content: str | list[Json]
    detail: Json
    is_error: bool = False


class Workbench:
    """What the tools of one session share. Calls that run at the same time only read."""

    def __init__(self, paths: Paths, env: dict[str, str], tool_timeout: float = TOOL_TIMEOUT) -> None:
        self.paths = paths
        self.tool_timeout = tool_timeout
        """Seconds that one call may take. The server does not rely on it: it ends turns that take too long itself."""
        self.base_env = env
        self.shell = Shell(paths, env)
        self.seen: dict[str, tuple[int, int]] = {}
        """Files whose content the model knows: modification time and size when it last saw them."""
        self.todos: list[Json] = []
        self.can_read: Callable[[str], bool] = lambda path: True
        """What the permission rules of the turn say; searches leave out what may not be read."""

    @property
    def env(self) -> dict[str, str]:
        """What the agent has exported by now."""
        return self.shell.env


class Tool(NamedTuple):
    name: str
    description: str
    schema: Json
    run: Callable[[Workbench, Json, Interrupt], Outcome]
    is_read_only: bool = False

    def offer(self) -> Json:
        """The tool as the model API describes it."""
        return {"name": self.name, "description": self.description, "input_schema": self.schema}


def schema(required: list[str], **properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def text(description: str, **more: Any) -> Json:
    return {"type": "string", "description": description, **more}


def number(description: str, **more: Any) -> Json:
    return {"type": "number", "description": description, **more}


def flag(description: str) -> Json:
    return {"type": "boolean", "description": description}


_TYPES: dict[str, tuple[type, ...]] = {"string": (str,), "number": (int, float), "boolean": (bool,), "array": (list,), "object": (dict,)}


def check(tool: Tool, given: Json) -> Json:
    """The input with numbers and booleans that came as text put right. Raises ToolError naming every wrong field."""
    problems: list[str] = []
    value = _check_object(given, tool.schema, "", problems)
    if problems:
        raise ToolError(f"InputValidationError: {tool.name} was called with wrong input: " + "; ".join(problems))
    return value


def _check_object(given: Json, schema: Json, prefix: str, problems: list[str]) -> Json:
    properties = schema["properties"]
    problems += [f"the required parameter `{prefix}{name}` is missing" for name in schema["required"] if given.get(name) is None]
    problems += [f"there is no parameter `{prefix}{name}`" for name in given if name not in properties]
    known = {name: value for name, value in given.items() if name in properties and value is not None}
    return {name: _check_value(value, properties[name], f"{prefix}{name}", problems) for name, value in known.items()}


def _check_value(value: Any, schema: Json, name: str, problems: list[str]) -> Any:
    kind: str = schema["type"]
    if isinstance(value, str) and kind in ("number", "boolean"):
        value = _from_text(value, kind)
    if not _is_a(value, kind):
        problems.append(f"`{name}` must be of type {kind}")
    elif "enum" in schema and value not in schema["enum"]:
        problems.append(f"`{name}` must be one of {', '.join(schema['enum'])}")
    elif kind == "number" and value < schema.get("minimum", value):
        problems.append(f"`{name}` must be at least {schema['minimum']}")
    elif kind == "array":
        return [_check_value(item, schema["items"], f"{name}[{index}]", problems) for index, item in enumerate(value)]
    elif kind == "object":
        return _check_object(value, schema, f"{name}.", problems)
    return value


def _is_a(value: Any, kind: str) -> bool:
    return isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _from_text(value: str, kind: str) -> Any:
    if kind == "boolean":
        return {"true": True, "false": False}.get(value.lower(), value)
    return int(value) if value.lstrip("-").isdigit() else value
