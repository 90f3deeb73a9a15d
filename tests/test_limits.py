"""Limits of sessions: how they are checked, clamped and put on the wire. Pure."""

from __future__ import annotations

from typing import Any

import pytest

from ash import limits
from ash.config import SETTINGS, load_config
from ash.errors import InvalidRequest
from ash.sandbox import Limits

SERVER = limits.of_server(load_config({}, {}))


def test_every_limit_has_a_setting_and_every_limit_of_a_sandbox_is_one() -> None:
    assert set(limits.ROWS) <= {setting.name for setting in SETTINGS}
    assert set(Limits._fields) < set(limits.ROWS)
    assert len(limits.WIRE) == len(limits.ROWS) == 11


def test_limits_come_over_the_wire_in_camel_case_and_go_back_so() -> None:
    given = {"memoryMb": 512, "turnTimeout": 9.5, "maxProcesses": 32.0, "cpuPercent": None}
    asked = limits.parse(given)
    assert asked == {"memory_mb": 512, "turn_timeout": 9.5, "max_processes": 32}
    assert limits.wire(asked) == {"memoryMb": 512, "turnTimeout": 9.5, "maxProcesses": 32}


@pytest.mark.parametrize(("given", "words"), [
    ([], "limits must be an object"),
    ({"memory": 5}, "there is no limit 'memory'; there are memoryMb"),
    ({"memory_mb": 512}, "there is no limit 'memory_mb'"),
    ({"memoryMb": "512"}, "limits.memoryMb must be a whole number"),
    ({"memoryMb": True}, "limits.memoryMb must be a whole number"),
    ({"memoryMb": 512.5}, "limits.memoryMb must be a whole number"),
    ({"memoryMb": 5}, "limits.memoryMb must be from 32 up, got 5"),
    ({"memoryMb": -1}, "limits.memoryMb must be from 32 up"),
    ({"turnTimeout": float("nan")}, "limits.turnTimeout must be a number"),
    ({"turnTimeout": float("inf")}, "limits.turnTimeout must be a number"),
    ({"turnTimeout": [1]}, "limits.turnTimeout must be a number"),
    ({"cpuWeight": 10_001}, "limits.cpuWeight must be from 1 to 10000"),
])  # fmt: skip
def test_a_wrong_limit_is_refused_by_name(given: Any, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        limits.parse(given)
    assert words in caught.value.message


def test_what_is_not_asked_for_is_the_servers() -> None:
    found = limits.resolve({"memory_mb": 64}, SERVER, {})
    assert found.values["memory_mb"] == 64
    assert {name: value for name, value in found.values.items() if name != "memory_mb"} == {
        name: value for name, value in SERVER.items() if name != "memory_mb"
    }
    assert found.sandbox == Limits(**{name: int(SERVER[name]) for name in Limits._fields})._replace(memory_mb=64)
    assert found.sandbox._asdict().keys() == set(Limits._fields)


@pytest.mark.parametrize(("name", "value", "maximum", "exceeds"), [
    ("memory_mb", 4096, 4096, False), ("memory_mb", 4097, 4096, True), ("memory_mb", 32, 4096, False),
    ("disk_mb", 0, 100, True), ("disk_mb", 100, 100, False), ("disk_mb", 101, 100, True),
    ("disk_mb", 0, 0, False), ("disk_mb", 10**9, 0, False),
    ("max_files", 0, 5, True), ("io_mb_per_second", 0, 5, True), ("io_mb_per_second", 7, 0, False),
    ("turn_timeout", 60.5, 60, True), ("idle_timeout", 60, 60.0, False),
])  # fmt: skip
def test_a_limit_is_laxer_than_its_maximum_when_it_is_higher_or_none(name: str, value: float, maximum: float, exceeds: bool) -> None:
    assert limits.exceeds(name, value, maximum) is exceeds
    granted = limits.resolve({name: value}, SERVER, {name: maximum}).values[name]
    assert granted == (maximum if exceeds else value)
    if exceeds:
        with pytest.raises(InvalidRequest, match=f"limits.{limits.ROWS[name].wire}: .* is more than this server allows"):
            limits.check({name: value}, SERVER, {name: maximum})
    else:
        limits.check({name: value}, SERVER, {name: maximum})


def test_without_a_policy_the_servers_own_limit_is_the_maximum() -> None:
    limits.check({"memory_mb": SERVER["memory_mb"]}, SERVER, {})
    with pytest.raises(
        InvalidRequest, match=r"limits.memoryMb: 2049 is more than this server allows \(2048\).*raise memory_mb under \[limits\]"
    ):
        limits.check({"memory_mb": 2049}, SERVER, {})


def test_a_policy_may_allow_more_than_the_servers_default_and_does_not_give_it_unasked() -> None:
    maximum = {"memory_mb": 8192.0}
    limits.check({"memory_mb": 8000}, SERVER, maximum)
    assert limits.resolve({}, SERVER, maximum).values["memory_mb"] == SERVER["memory_mb"]
    assert limits.resolve({"memory_mb": 8000}, SERVER, maximum).values["memory_mb"] == 8000


def test_a_policy_below_the_servers_default_holds_for_those_who_ask_for_nothing() -> None:
    found = limits.resolve({}, SERVER, {"memory_mb": 1024, "tool_timeout": 30})
    assert (found.sandbox.memory_mb, found.tool_timeout) == (1024, 30)
