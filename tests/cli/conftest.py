"""A stub server, and the command line run against it: in this process for speed, or as a child where processes and terminals count."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from ash.__main__ import main
from tests.cli.stub_server import StubServer, stub_server

ROOT = Path(__file__).parents[2]
_KEPT = ("PATH", "LANG", "TERM", "TMPDIR")


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Ash = Callable[..., Done]


def environment(**extra: str) -> dict[str, str]:
    """What a child process gets: no setting and no key of the person who runs the tests."""
    return {**{name: os.environ[name] for name in _KEPT if name in os.environ}, "PYTHONPATH": str(ROOT), **extra}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ash", *arguments]


def run(*arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None, stdin: str = "") -> Done:
    """The command line as a child process, to its end."""
    done = subprocess.run(
        command(*arguments), env=environment(**(env or {})), cwd=cwd, input=stdin, capture_output=True, text=True, timeout=60, check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def stub() -> Iterator[StubServer]:
    with stub_server() as server:
        server.agents["my-agent"] = {"id": "1", "name": "my-agent", "version": 1, "updatedAt": "2026-01-01T00:00:00.000Z"}
        yield server


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ASH_HOME of its own, and no other variable of Ash."""
    for name in [name for name in os.environ if name.startswith(("ASH_", "ANTHROPIC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ASH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TERM", "xterm")
    return tmp_path / "home"


@pytest.fixture
def call(home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Ash:
    """Runs a command in this process."""

    def call_main(*arguments: str, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8"))
        capfd.readouterr()
        code = main(list(arguments))
        return Done(code, *capfd.readouterr())

    return call_main


@pytest.fixture
def ash(stub: StubServer, call: Ash, monkeypatch: pytest.MonkeyPatch) -> Ash:
    """Runs a command in this process, against the stub server."""
    monkeypatch.setenv("ASH_SERVER_URL", stub.url)
    return call


@pytest.fixture
def agent_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "my-folder"
    folder.mkdir()
    (folder / "CLAUDE.md").write_text("You are a helpful assistant.")
    return folder
