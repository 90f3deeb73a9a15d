"""Fixtures shared by the tests: a data folder, settings, and servers in this process with fake sandboxes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from ash.config import Config, load_config
from tests import fakes
from tests.harness import Server, serving


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
