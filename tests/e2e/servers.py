"""Starts real servers from the built file, each on a free port and a data folder of its own, and ends them again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

KEPT = ("PATH", "HOME", "LANG", "ASH_CACHE_DIR")


class Server(NamedTuple):
    url: str
    port: int
    process: subprocess.Popen[bytes]
    data_dir: Path
    log: Path

    def key(self) -> str:
        return (self.data_dir / "initial-api-key").read_text().strip()


def environment(**extra: str) -> dict[str, str]:
    """What a child gets: no provider key and no Ash setting of the person who runs the tests."""
    return {**{name: os.environ[name] for name in KEPT if name in os.environ}, **extra}


def as_user(uid: int) -> list[str]:
    """A prefix that runs a command as another local user; for root only."""
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--"]


@contextmanager
def running(
    ash_pyz: Path, data_dir: Path, *arguments: str, env: dict[str, str] | None = None, prefix: list[str] | None = None
) -> Iterator[Server]:
    """A server that answers /health, stopped by SIGTERM at the end."""
    log = data_dir.parent / f"{data_dir.name}.log"
    command = [*(prefix or []), sys.executable if not prefix else "/usr/bin/python3", str(ash_pyz), "start", "--port", "0"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--data-dir", str(data_dir), *arguments],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env or environment(), cwd=data_dir.parent,
        )  # fmt: skip
    try:
        info = wait_for_server(process, data_dir, log)
        yield Server(info["url"], info["port"], process, data_dir, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)
            raise


def wait_for_server(process: subprocess.Popen[bytes], data_dir: Path, log: Path, seconds: float = 60.0) -> dict[str, Any]:
    """The contents of server.json; generous, because the first start unpacks."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            info: dict[str, Any] = json.loads((data_dir / "server.json").read_text())
            if info["pid"] == process.pid:  # a server that was killed before this one leaves its card
                return info
        except (OSError, ValueError):
            pass
        time.sleep(0.02)
    raise AssertionError(f"the server did not start: {log.read_text(errors='replace')[-2000:]}")


def ash(ash_pyz: Path, *arguments: str, env: dict[str, str], cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """One run of the command line, to its end."""
    return subprocess.run(
        [sys.executable, str(ash_pyz), *arguments], env=env, cwd=cwd, input=stdin, capture_output=True, text=True, timeout=60, check=False
    )
