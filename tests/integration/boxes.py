"""Programs in bubblewrap with all options of a sandbox, but no session, prepared by the server's own code.

Run as a program it prints what comes of the calls that a filter refuses; a test does so as an ordinary user.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ash.isolation import bwrap
from ash.isolation.folders import Folders
from ash.isolation.prepare import Choices, Isolation, prepare
from ash.isolation.records import Limits
from ash.isolation.syscalls import NUMBERS

LIMITS = Limits(memory_mb=256, cpu_percent=100, max_processes=40, max_file_mb=10)
MACHINE = os.uname().machine
_CALLS = Path(__file__).with_name("refused_calls.py")


@asynccontextmanager
async def isolating(data_dir: str, **choices: Any) -> AsyncIterator[Isolation]:
    """Raises IsolationUnavailable where this host cannot."""
    folders = Folders(data_dir)
    folders.open()
    try:
        isolation = await prepare("bwrap", folders, LIMITS, Choices(**choices))
        try:
            yield isolation
        finally:
            isolation.close()
    finally:
        folders.close()


def run_boxed(isolation: Isolation, *command: str, text: str = "", filtered: bool = True) -> subprocess.CompletedProcess[str]:
    """As a sandbox's uid; without the filter to see what the kernel alone would say."""
    with isolation.boxed(command) as (argv, fds):
        at = argv.index("--seccomp")
        argv = argv if filtered else [*argv[:at], *argv[at + 2 :]]
        return subprocess.run(
            argv, input=text, capture_output=True, text=True, timeout=120, pass_fds=fds, check=False, env=bwrap.OUTER_ENVIRONMENT, cwd="/"
        )  # fmt: skip


def try_calls(isolation: Isolation, *, filtered: bool = True) -> dict[str, Any]:
    """What came of every refused call. The program comes in as text: nothing is mounted for it."""
    numbers = json.dumps(NUMBERS[MACHINE])
    program = f"import sys; source = sys.stdin.read(); sys.argv = ['calls', {numbers!r}]; exec(source)"
    done = run_boxed(isolation, isolation.python.path, "-I", "-S", "-B", "-c", program, text=_CALLS.read_text(), filtered=filtered)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="ash-") as data_dir:
        async with isolating(data_dir) as isolation:
            sys.stdout.write(json.dumps(try_calls(isolation)))


if __name__ == "__main__":
    asyncio.run(main())
