"""Fixtures of the bridge's tests: a real bridge process, and the bench that tools work at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ash.runtime.paths import Paths, tool_environ
from ash.runtime.tools import Workbench
from tests.runtime.fakes import Driver, driver


@pytest.fixture
def bridge(data_dir: str) -> Iterator[Driver]:
    """A connected bridge whose session is initialized."""
    with driver(Path(data_dir)) as started:
        started.init()
        yield started


@pytest.fixture
def paths(data_dir: str) -> Paths:
    for name in ("agent", "workspace", "home"):
        (Path(data_dir) / name).mkdir()
    return Paths(f"{data_dir}/agent", f"{data_dir}/workspace", f"{data_dir}/home", f"{data_dir}/gw.sock")


@pytest.fixture
def bench(paths: Paths) -> Workbench:
    return Workbench(paths, tool_environ(paths, {}, {}))
