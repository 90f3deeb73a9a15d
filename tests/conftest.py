"""Fixtures shared by the tests: a data folder, settings, and servers in this process with fake sandboxes."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from ash.config import Config, load_config
from tests import fakes
from tests.harness import Server, serving


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """After the last test no process, folder or mount of Ash is there that was not there before the first."""
    before = remains()
    yield
    deadline = time.monotonic() + 10
    while (left := remains() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, f"the suite left behind: {sorted(left)}"


def remains() -> set[str]:
    """What could be left of a server: its processes and those of its sandboxes without a living owner, its folders, its mounts."""
    folders = {f"folder {entry.path}" for entry in os.scandir(tempfile.gettempdir()) if re.fullmatch(r"ash-\w{8}", entry.name)}
    mounts = {f"mount {line.split()[4]}" for line in Path("/proc/self/mountinfo").read_text().splitlines() if "ash" in line.split()[4]}
    return folders | mounts | {f"process {pid} {command}" for pid, command in ash_processes()}


def ash_processes() -> Iterator[tuple[int, str]]:
    """Sandboxes without a living owner, and servers and commands of these tests. What somebody else runs here is not meant."""
    for process in psutil.process_iter(["pid", "ppid", "cmdline", "status"]):
        command = " ".join(process.info["cmdline"] or [])
        is_server = ("ash.pyz" in command or "-m ash" in command) and re.search(rf"{tempfile.gettempdir()}/(ash-\w{{8}}|pytest-)", command)
        is_ours = "--listen-fd" in command or is_server
        if is_ours and process.info["ppid"] in (1, os.getpid()) and process.info["status"] != psutil.STATUS_ZOMBIE:
            yield process.info["pid"], command[:120]


@pytest.fixture
def data_dir() -> Iterator[str]:
    """A folder with a short path: that of a Unix socket ends at 107 bytes."""
    path = tempfile.mkdtemp(prefix="ash-")
    yield path
    shutil.rmtree(path)


@pytest.fixture
def make_config(data_dir: str) -> Callable[..., Config]:
    """Settings for a test, from nothing but `data_dir` and what the test gives."""

    def make(**settings: Any) -> Config:
        return load_config({"data_dir": data_dir, "model": "offline", "shutdown_timeout": 0.2, **settings}, environ={})

    return make


@pytest.fixture
async def start_server(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[..., Awaitable[Server]]]:
    """Starts servers with fake sandboxes, with the settings given; all are stopped after the test."""
    monkeypatch.setattr("ash.web.Sandboxes", fakes.FakeSandboxes)
    async with AsyncExitStack() as stack:

        async def start(**settings: Any) -> Server:
            return await stack.enter_async_context(serving(make_config(**settings)))

        yield start


@pytest.fixture
async def server(start_server: Callable[..., Awaitable[Server]]) -> Server:
    return await start_server()
