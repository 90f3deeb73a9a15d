"""A host with something to steal: canaries, sockets and a second session beside the sandbox that is attacked from inside."""

from __future__ import annotations

import asyncio
import ctypes
import os
import platform
import re
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from ash.attack import decoys
from ash.attack.probes import LIMITED, PROBES
from ash.attack.report import FAIL, NOT_APPLICABLE, PASS, judge
from ash.errors import SandboxFailed
from ash.sandbox import Sandbox
from tests.sandboxes import LIMITS, Pool

PROJECT = str(Path(__file__).parents[2])
ATTACKS = {probe.name: probe for probe in PROBES}
KEY_NAME = "ash-canary"
_ADD_KEY = {"x86_64": 248, "aarch64": 217}


def plant_key() -> bool:
    """Put a key into this thread's session keyring, as a login does. Before a pool is opened, which leaves that keyring."""
    number = _ADD_KEY.get(platform.machine())
    libc = ctypes.CDLL(None)
    return number is not None and libc.syscall(number, b"user", KEY_NAME.encode(), b"canary", 6, -3) > 0


def _limits(pool: Pool) -> dict[str, int]:
    """The limits in force; those that only a cgroup or a quota can hold, where there is one."""
    isolation = pool._isolation
    assert isolation is not None
    facts = {
        "file_bytes": LIMITS.max_file_mb << 20, "memory_bytes": LIMITS.memory_mb << 20, "tmp_bytes": isolation.tmp_mb << 20,
        "processes": LIMITS.max_processes,
    }  # fmt: skip
    by = {name for name, text in pool.status().limits.items() if text.endswith("(cgroup v2)")}
    held = {"memory": ("group_memory_bytes", LIMITS.memory_mb << 20), "cpu": ("cpu_percent", LIMITS.cpu_percent)}
    return facts | dict(fact for name, fact in held.items() if name in by)


@asynccontextmanager
async def prepared(pool: Pool) -> AsyncIterator[dict[str, Any]]:
    """The facts that probes take; each is real. This process is the server."""
    other = await pool.take("other")
    await other.exec("echo secret > /workspace/secret; echo secret > /home/agent/secret")
    key = f"ash_{secrets.token_urlsafe(24)}"
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(pool.opened[other.id])
        listener.listen()
        os.chmod(pool.opened[other.id], 0o777)
        facts = stack.enter_context(decoys.planted(pool.data_dir))
        os.environ["ASH_TEST_SECRET"] = f"{facts['marker']} {key}"
        stack.callback(os.environ.pop, "ASH_TEST_SECRET")
        yield facts | _limits(pool) | {
            "python": "/usr/bin/python3", "other": pool.session_dir("other"), "project": PROJECT, "server_pid": os.getpid(),
            "server_start": decoys.start_time(os.getpid()), "other_gateway": pool.opened[other.id], "key_name": KEY_NAME,
            "key_head": key[:12], "key_tail": key[12:], "no_ptrace": "yes",
        }  # fmt: skip


async def attack(pool: Pool, facts: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Verdict and reason of each probe."""
    sandbox = await pool.take("attacker")
    found = {}
    for name, probe in ATTACKS.items():
        if missing := [fact for fact in probe.facts if fact not in facts]:
            found[name] = (NOT_APPLICABLE, f"there is no {missing[0]} here")
            continue
        try:
            result = await sandbox.exec(probe.fill(facts), timeout=20)
        except SandboxFailed as error:  # one that took too much was ended; any other end shows nothing
            found[name] = (PASS if probe.session == LIMITED else FAIL, str(error))
            sandbox = await pool.take()
        else:
            found[name] = judge(result.exit_code, result.stdout, result.stderr)
    return found


async def run_on_host(facts: dict[str, Any], folder: str) -> dict[str, tuple[str, str]]:
    """The same for every harmless probe, run by this user without any sandbox."""
    found = {}
    for name, probe in ATTACKS.items():
        if probe.is_harmless and all(fact in facts for fact in probe.facts):
            process = await asyncio.create_subprocess_exec(
                "/bin/bash", "-c", probe.fill(facts), cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
            )
            output, errors = await asyncio.wait_for(process.communicate(), 30)
            found[name] = judge(process.returncode or 0, output.decode(errors="replace"), errors.decode(errors="replace"))
    return found


async def fork_bomb(sandbox: Sandbox) -> dict[str, Any]:
    """How many processes it got, and whether the sandbox works afterwards."""
    facts = {"python": "/usr/bin/python3", "processes": 1000}
    result = await sandbox.exec(ATTACKS["start processes beyond the limit"].fill(facts), timeout=30)
    after = await sandbox.exec("echo alive", timeout=30)
    return {"forks": int((re.findall(r"\d+", result.stdout) or ["-1"])[0]), "after": after.stdout}
