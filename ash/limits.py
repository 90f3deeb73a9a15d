"""What one session may use: the limits by name, how an agent's and a session's own are checked, and which are in force.

Pure. Names are those of the settings (`memory_mb`), on the wire in camel case (`memoryMb`). It enforces nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ash.config import SETTINGS, Config
from ash.errors import InvalidRequest
from ash.models import Json
from ash.sandbox import Limits

NAMES = (*Limits._fields, "tool_timeout", "turn_timeout", "idle_timeout")
UNLIMITED = ("disk_mb", "max_files", "io_mb_per_second")
"""Of these 0 means no limit."""
Values = Mapping[str, float]


class LimitRow(NamedTuple):
    """One limit, with the range that its setting has."""

    name: str
    wire: str
    kind: type[int] | type[float]
    minimum: float
    maximum: float | None
    help: str

    def check(self, value: Any) -> float:
        """Raises ValueError that says what to write."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or (self.kind is int and value != int(value)):
            raise ValueError(f"must be {'a whole number' if self.kind is int else 'a number'}")
        if value < self.minimum or (self.maximum is not None and value > self.maximum):
            upper = f" to {self.maximum:g}" if self.maximum is not None else " up"
            raise ValueError(f"must be from {self.minimum:g}{upper}, got {value:g}")
        return self.kind(value)


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def _rows() -> Mapping[str, LimitRow]:
    settings = {setting.name: setting for setting in SETTINGS}
    found = {name: settings[name] for name in NAMES}
    return MappingProxyType({
        name: LimitRow(name, _camel(name), row.kind, row.minimum or 0, row.maximum, row.help) for name, row in found.items()
    })  # fmt: skip


ROWS = _rows()
WIRE = MappingProxyType({row.wire: name for name, row in ROWS.items()})


class SessionLimits(NamedTuple):
    """The limits in force for one session, all of them."""

    values: Values

    @property
    def sandbox(self) -> Limits:
        """Those that its sandbox is started with."""
        return Limits(**{name: int(self.values[name]) for name in Limits._fields})

    @property
    def tool_timeout(self) -> float:
        return self.values["tool_timeout"]

    @property
    def turn_timeout(self) -> float:
        return self.values["turn_timeout"]

    @property
    def idle_timeout(self) -> float:
        return self.values["idle_timeout"]

    def wire(self) -> Json:
        return wire(self.values)


def parse(given: Any, where: str = "limits") -> dict[str, float]:
    """Limits as they come over the wire, by name. Raises InvalidRequest that names the limit."""
    if not isinstance(given, dict):
        raise InvalidRequest(f'{where} must be an object, such as {{"memoryMb": 512}}')
    found: dict[str, float] = {}
    for wire, value in given.items():
        if wire not in WIRE:
            raise InvalidRequest(f"{where}: there is no limit {wire!r:.80}; there are {', '.join(WIRE)}")
        if value is None:
            continue
        try:
            found[WIRE[wire]] = ROWS[WIRE[wire]].check(value)
        except ValueError as error:
            raise InvalidRequest(f"{where}.{wire} {error}") from error
    return found


def wire(values: Values) -> Json:
    return {ROWS[name].wire: value for name, value in values.items()}


def of_server(config: Config) -> dict[str, float]:
    """What a session has that asks for nothing."""
    return {name: getattr(config, name) for name in NAMES}


def check(asked: Values, server: Values, maximum: Values, where: str = "limits") -> None:
    """Raise InvalidRequest for the first limit beyond its maximum: the policy's, or where that says nothing the server's own."""
    for name, value in asked.items():
        highest = maximum.get(name, server[name])
        if exceeds(name, value, highest):
            raise InvalidRequest(
                f"{where}.{ROWS[name].wire}: {_shown(name, value)} is more than this server allows ({highest:g}); ask for less, "
                f"or raise {name} under [limits] in the operator's policy"
            )


def resolve(asked: Values, server: Values, maximum: Values) -> SessionLimits:
    """The limits in force: what was asked for, else the server's, each at most its maximum."""
    values = {name: asked.get(name, server[name]) for name in NAMES}
    for name, value in values.items():
        highest = maximum.get(name, server[name])
        if exceeds(name, value, highest):
            values[name] = ROWS[name].kind(highest)
    return SessionLimits(MappingProxyType(values))


def exceeds(name: str, value: float, highest: float) -> bool:
    """Whether a limit is laxer than it may be; 0 is the laxest where it means none."""
    if name in UNLIMITED:
        return highest != 0 and (value == 0 or value > highest)
    return value > highest


def _shown(name: str, value: float) -> str:
    return "0, no limit," if name in UNLIMITED and not value else f"{value:g}"
