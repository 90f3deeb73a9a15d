"""What the fields of a request may hold: small checks that tables of them are made of. Pure; nothing here knows a request.

A check takes the field's name and its value and returns the value, or raises InvalidRequest that names the field. What a
table does not name is dropped, so that callers may send more than this version knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ash.errors import InvalidRequest

Check = Callable[[str, Any], Any]
Table = Mapping[str, Check]

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_WHOLE = re.compile(r"-?[0-9]{1,15}")


def parse(body: Any, table: Table, required: tuple[str, ...] = (), *, keep_null: bool = False) -> dict[str, Any]:
    """The fields of `table` that `body` gives, checked. Null counts as not given, or is kept as a wish to clear the field."""
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object")
    for name in required:
        if body.get(name) is None:
            raise InvalidRequest(f"{name} is required")
    given = {name: body[name] for name in table if name in body and (keep_null or body[name] is not None)}
    return {name: value if value is None else table[name](name, value) for name, value in given.items()}


def text(maximum: int, minimum: int = 0, pattern: str = "") -> Check:
    matches = re.compile(pattern).fullmatch if pattern else None

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, str):
            raise _wrong(name, "a string", value)
        if not minimum <= len(value) <= maximum:
            raise InvalidRequest(f"{name} must have {minimum:,} to {maximum:,} characters; it has {len(value):,}")
        if matches is not None and not matches(value):
            raise InvalidRequest(f"{name} must match {pattern}")
        return value

    return check


def integer(minimum: int, maximum: int | None = None) -> Check:
    wanted = f"a whole number from {minimum} to {maximum}" if maximum is not None else f"a whole number of at least {minimum}"

    def check(name: str, value: Any) -> Any:
        is_whole = value.is_integer() if isinstance(value, float) else isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or value < minimum or (maximum is not None and value > maximum):
            raise _wrong(name, wanted, value)
        return int(value)

    return check


def query_integer(minimum: int, maximum: int | None = None) -> Check:
    """An integer in a query string."""
    check = integer(minimum, maximum)
    return lambda name, value: check(name, int(value) if _WHOLE.fullmatch(value) else value)


def query_flag(name: str, value: str) -> bool:
    if value not in ("true", "false", "1", "0", ""):
        raise _wrong(name, "true or false", value)
    return value in ("true", "1")


def number(minimum: float) -> Check:
    def check(name: str, value: Any) -> Any:
        if not isinstance(value, int | float) or isinstance(value, bool) or value < minimum:
            raise _wrong(name, f"a number of at least {minimum:g}", value)
        return value

    return check


def boolean(name: str, value: Any) -> Any:
    if not isinstance(value, bool):
        raise _wrong(name, "true or false", value)
    return value


def choice(*words: str) -> Check:
    def check(name: str, value: Any) -> Any:
        if value not in words:
            raise _wrong(name, "one of " + ", ".join(words), value)
        return value

    return check


def mapping(name: str, value: Any) -> Any:
    """An object whose insides are the agent's business."""
    if not isinstance(value, dict):
        raise _wrong(name, "an object", value)
    return value


def list_of(check_item: Check, maximum: int) -> Check:
    def check(name: str, value: Any) -> Any:
        if not isinstance(value, list):
            raise _wrong(name, "a list", value)
        if len(value) > maximum:
            raise InvalidRequest(f"{name} must have at most {maximum:,} entries; it has {len(value):,}")
        return [check_item(f"{name}[{position}]", item) for position, item in enumerate(value)]

    return check


def mapping_of(check_value: Check) -> Check:
    def check(name: str, value: Any) -> Any:
        return {key: check_value(f"{name}.{key}", item) for key, item in mapping(name, value).items()}

    return check


def record(table: Table, required: tuple[str, ...] = ()) -> Check:
    """An object of which only the fields of `table` are kept."""

    def check(name: str, value: Any) -> Any:
        inner = {key: _prefixed(name, check_field) for key, check_field in table.items()}
        for key in required:
            if mapping(name, value).get(key) is None:
                raise InvalidRequest(f"{name}.{key} is required")
        return parse(mapping(name, value), inner)

    return check


def _prefixed(prefix: str, check: Check) -> Check:
    return lambda name, value: check(f"{prefix}.{name}", value)


def uuid(name: str, value: str) -> str:
    if not _UUID.fullmatch(value):
        raise InvalidRequest(f'{name} must match format "uuid", got {value!r:.60}')
    return value.lower()


def _wrong(name: str, wanted: str, value: Any) -> InvalidRequest:
    return InvalidRequest(f"{name} must be {wanted}, got {value!r:.60}")
