"""What a host has left: that the readings are real, and when one is too little."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest

from ash.isolation import headroom
from ash.isolation.headroom import CALM, OVERLOADED, Headroom
from tests.sandboxes import PLENTY, SaidHeadroom


def test_the_readings_are_those_of_this_host(tmp_path: Path) -> None:
    reading = Headroom(str(tmp_path)).measure()
    available = psutil.virtual_memory().available >> 20
    assert 0 < reading.memory_mb <= available * 1.2 + 200
    assert abs(reading.disk_mb - (psutil.disk_usage(str(tmp_path)).free >> 20)) < 2000
    assert 0 <= reading.cpu_pressure <= 100
    assert reading.processes > 0


def test_open_files_are_counted(tmp_path: Path) -> None:
    before = headroom._free_descriptors()
    held = [os.open(tmp_path, os.O_RDONLY) for _ in range(10)]
    try:
        assert before - headroom._free_descriptors() == 10
    finally:
        for fd in held:
            os.close(fd)


def test_a_container_that_is_bounded_counts_as_the_host(tmp_path: Path) -> None:
    for name, text in {"memory.max": 512 << 20, "memory.current": 500 << 20, "memory.stat": f"anon 1\ninactive_file {100 << 20}",
                       "pids.max": 100, "pids.current": 90}.items():  # fmt: skip
        (tmp_path / name).write_text(f"{text}\n")
    group = headroom._Group(str(tmp_path))
    assert (group.memory_left() >> 20, group.processes_left()) == (112, 10)
    (tmp_path / "memory.max").write_text("max\n")
    assert group.memory_left() > 1 << 39


@pytest.mark.parametrize(
    ("left", "is_new", "shortage"),
    [
        ({}, True, None),
        ({"memory_mb": 99}, True, "memory"),
        ({"memory_mb": 99}, False, None),
        ({"memory_mb": 49}, False, "memory"),
        ({"disk_mb": 199}, True, "disk"),
        ({"disk_mb": 199}, False, None),
        ({"descriptors": 10}, False, "descriptors"),
        ({"processes": 10}, False, "processes"),
    ],
)
def test_a_session_that_goes_on_may_use_what_a_new_one_may_not(left: dict[str, int], is_new: bool, shortage: str | None) -> None:
    host = SaidHeadroom(PLENTY._replace(**left), min_memory_mb=100, min_disk_mb=200)
    assert host.find_shortage(is_new=is_new) == shortage


def test_shortage_and_overload_end_later_than_they_begin() -> None:
    host = SaidHeadroom(min_memory_mb=100)
    seen = []
    for memory in (101, 99, 110, 126, 110):
        host.say(memory_mb=memory)
        seen.append(host.is_short)
    assert seen == [False, True, True, False, False]
    seen = []
    for pressure in (OVERLOADED - 1, OVERLOADED + 1, CALM + 1, CALM - 1, CALM + 1):
        host.say(cpu_pressure=pressure)
        seen.append(host.is_overloaded)
    assert seen == [False, True, True, False, False]


def test_the_operator_is_told_with_figures() -> None:
    host = SaidHeadroom(PLENTY._replace(memory_mb=7, disk_mb=8, descriptors=9, processes=10), min_memory_mb=100, min_disk_mb=200)
    memory, disk, descriptors, processes = host.warnings()
    assert "7 MiB are available and min_free_memory_mb is 100" in memory
    assert "8 MiB are free and min_free_disk_mb is 200" in disk
    assert "ulimit -n" in descriptors
    assert "pid_max" in processes


def test_a_reading_serves_a_burst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Headroom(str(tmp_path))
    first = host.read()
    assert host.read() is first
    later = time.monotonic() + headroom.MAX_AGE * 2
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert host.read() is not first
