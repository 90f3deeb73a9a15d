"""A host with something to steal: canaries, sockets and a second session beside the sandbox that is attacked from inside."""

from __future__ import annotations

import ctypes
import os
import platform
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from ash.isolation.keyring import KEYCTL
from ash.sandbox import Sandbox
from tests.integration.attacks import commands
from tests.sandboxes import Pool

PROJECT = str(Path(__file__).parents[2])
FORK_BOMB = """
import os, sys, time
count = 0
try:
    while count < 2000:
        if os.fork() == 0:
            time.sleep(2)
            os._exit(0)
        count += 1
except OSError:
    pass
print(count)
"""


KEY_NAME = "ash-canary"
_ADD_KEY = {"x86_64": 248, "aarch64": 217}


def plant_key() -> bool:
    """Put a key into this thread's session keyring, as a login does. Before a pool is opened, which leaves that keyring."""
    number = _ADD_KEY.get(platform.machine())
    libc = ctypes.CDLL(None)
    return number is not None and libc.syscall(number, b"user", KEY_NAME.encode(), b"canary", 6, -3) > 0


@asynccontextmanager
async def prepared(pool: Pool) -> AsyncIterator[dict[str, Any]]:
    """The facts that `attacks.commands` takes; each is real."""
    other = await pool.take("other")
    Path(pool.data_dir, "canary").write_text("secret")
    await other.exec("echo secret > /workspace/secret; echo secret > /home/agent/secret")
    with ExitStack() as stack:
        port = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        host_socket, abstract = os.path.join(pool.data_dir, "host.sock"), f"ash-test-{os.getpid()}"
        for path in (host_socket, "\0" + abstract, pool.opened[other.id]):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(path)
            listener.listen()
        os.chmod(host_socket, 0o777)
        os.chmod(pool.opened[other.id], 0o777)
        yield {
            "data_dir": pool.data_dir, "other": pool.session_dir("other"), "project": PROJECT, "server_pid": os.getpid(),
            "port": port.getsockname()[1], "host_socket": host_socket, "abstract": abstract, "other_gateway": pool.opened[other.id],
            "keyctl": KEYCTL.get(platform.machine(), -1), "key_name": KEY_NAME,
        }  # fmt: skip


async def attack(pool: Pool, facts: dict[str, Any]) -> dict[str, str]:
    """The output of each attack that worked; none should."""
    os.environ["ASH_TEST_SECRET"] = "canary"
    sandbox = await pool.take("attacker")
    worked = {}
    for name, command in commands(**facts).items():
        result = await sandbox.exec(command, timeout=20)
        if result.exit_code == 0:
            worked[name] = result.stdout[:500] or "exit code 0"
    del os.environ["ASH_TEST_SECRET"]
    return worked


async def fork_bomb(sandbox: Sandbox) -> dict[str, Any]:
    """How many processes it got, and whether the sandbox works afterwards."""
    result = await sandbox.exec(f"/usr/bin/python3 -I -c '{FORK_BOMB}'", timeout=30)
    after = await sandbox.exec("sleep 2.5; echo alive", timeout=30)
    return {"forks": int(result.stdout or -1), "after": after.stdout}
