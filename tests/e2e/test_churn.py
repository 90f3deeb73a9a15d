"""Sessions come and go on the built file, and the server is as it was."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


async def test_thirty_sessions_leave_nothing_on_the_host(ash_pyz: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.churn", "--pyz", str(ash_pyz), "--count", "30"]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    done = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| zombies | 0 | 0 |" in done.stdout
