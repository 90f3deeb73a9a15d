"""SIGHUP to a server process: the policy is read again, unless it was the terminal that went."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.harness import eventually
from tests.test_web import PROGRAM

ON_TERMINAL = "import os, sys; os.setsid(); os.open(sys.argv.pop(1), os.O_RDWR)"
"""A process group leader without a terminal that opens one gets it as its own."""


@contextmanager
def started(data_dir: str, program: list[str], **options: Any) -> Iterator[int]:
    """The pid of a server that listens; it is gone afterwards."""
    settings = [f"data_dir={data_dir}", "port=0", "model=offline", "shutdown_timeout=0.2"]
    card, log = Path(data_dir, "server.json"), Path(data_dir, "log")
    with log.open("wb") as output, subprocess.Popen([*program, *settings], stdout=output, stderr=output, **options) as child:
        try:
            deadline = time.monotonic() + 30
            while not card.exists() and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            assert card.exists(), log.read_text()
            yield json.loads(card.read_text())["pid"]
        finally:
            with suppress(FileNotFoundError, ProcessLookupError):
                os.kill(json.loads(card.read_text())["pid"], signal.SIGKILL)
            child.kill()


def put(data_dir: str, text: str) -> None:
    path = Path(data_dir, "policy.toml")
    path.write_text(text)
    path.chmod(0o600)


def ask(data_dir: str, path: str) -> Any:
    url = json.loads(Path(data_dir, "server.json").read_text())["url"]
    with urllib.request.urlopen(url + path, timeout=5) as answer:
        return json.load(answer)


async def allowed(data_dir: str) -> Any:
    return (await asyncio.to_thread(ask, data_dir, "/api/policy"))["policy"]["egress"]["allow"]


async def test_a_hangup_has_the_policy_read_again_and_a_bad_one_changes_nothing(data_dir: str) -> None:
    with started(data_dir, [sys.executable, "-c", PROGRAM], start_new_session=True) as pid:
        assert await allowed(data_dir) == []
        put(data_dir, '[egress]\nallow = ["a.example.com"]\n')
        os.kill(pid, signal.SIGHUP)

        async def is_new() -> Any:
            return await allowed(data_dir) == ["a.example.com"]

        await eventually(is_new)
        put(data_dir, "[egress]\nallow = 5\n")
        os.kill(pid, signal.SIGHUP)

        async def is_warned() -> bool:
            return any("policy file was refused" in warning for warning in (await asyncio.to_thread(ask, data_dir, "/health"))["warnings"])

        await eventually(is_warned)
        assert await allowed(data_dir) == ["a.example.com"]
    log = Path(data_dir, "log").read_text()
    assert "policy reloaded from" in log
    assert "policy.toml line 2: egress.allow: must be a list" in log


@pytest.mark.parametrize("program", [
    [sys.executable, "-c", f"{ON_TERMINAL}\n{PROGRAM}"],
    [sys.executable, "-c", f"{ON_TERMINAL}\nimport subprocess; subprocess.run([sys.executable, '-c', {PROGRAM!r}, *sys.argv[1:]])"],
], ids=["itself", "below a shell"])  # fmt: skip
async def test_a_server_in_a_terminal_reloads_while_that_is_there_and_stops_with_it(data_dir: str, program: list[str]) -> None:
    terminal, other_end = os.openpty()
    try:
        with started(data_dir, [*program, os.ttyname(other_end)]) as pid:
            put(data_dir, '[egress]\nallow = ["a.example.com"]\n')
            os.kill(pid, signal.SIGHUP)

            async def is_new() -> Any:
                return await allowed(data_dir) == ["a.example.com"]

            await eventually(is_new)
            os.close(other_end)
            os.close(terminal)
            terminal = other_end = -1
            await eventually(lambda: not Path(data_dir, "server.json").exists(), 10)
        assert "stopping: SIGHUP, the terminal was closed" in Path(data_dir, "log").read_text()
    finally:
        for descriptor in {terminal, other_end} - {-1}:
            os.close(descriptor)


async def test_a_server_that_was_told_to_ignore_hangups_does(data_dir: str) -> None:
    ignoring = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{PROGRAM}"
    with started(data_dir, [sys.executable, "-c", ignoring], start_new_session=True) as pid:
        put(data_dir, '[egress]\nallow = ["a.example.com"]\n')
        os.kill(pid, signal.SIGHUP)
        for _ in range(5):
            assert await allowed(data_dir) == []
