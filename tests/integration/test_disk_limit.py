"""A session that wants the whole disk, in a real sandbox: it meets an error inside, and comes back when it has tidied up."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import AsyncIterator

import pytest

from ash.errors import SandboxFailed
from ash.isolation import disk
from ash.sandbox import Sandbox
from tests.sandboxes import LIMITS, Pool, leftovers, limits_met, open_pool, until

MIB = 1 << 20
QUOTA = LIMITS._replace(disk_mb=64, max_files=400, max_file_mb=32)
pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")

FILL = "for i in $(seq 200); do head -c 4000000 /dev/zero > /workspace/$i || exit 3; done"


@pytest.fixture
async def pool(data_dir: str) -> AsyncIterator[Pool]:
    async with open_pool(data_dir, limits=QUOTA) as found:
        if found.status().isolation == "unavailable":
            pytest.skip(f"this host cannot isolate: {found.status().warnings[0]}")
        yield found
    assert leftovers(data_dir) == []


@pytest.fixture
async def sandbox(pool: Pool) -> Sandbox:
    sandbox = await pool.take("s1")
    await sandbox.init({}, {}, [])
    return sandbox


async def test_a_disk_bomb_meets_an_error_and_the_session_lives(sandbox: Sandbox) -> None:
    result = await sandbox.exec(FILL)
    assert result.exit_code != 0
    assert disk.measure(sandbox.place.folder).bytes < 800 * MIB  # what it wanted
    assert await limits_met(sandbox) == ["disk"]
    assert (await sandbox.exec("head -c 1000000 /dev/zero > /workspace/more")).exit_code != 0
    assert (await sandbox.exec("echo alive; cat /workspace/1 | wc -c")).stdout == "alive\n4000000\n"


async def test_after_tidying_up_it_may_write_again(sandbox: Sandbox) -> None:
    assert (await sandbox.exec(FILL)).exit_code
    assert (await sandbox.exec("rm -rf /workspace/*")).exit_code == 0
    writes = "head -c 1000000 /dev/zero > /workspace/more"
    for _ in range(100):
        if (await sandbox.exec(writes + " || { sleep 0.05; false; }")).exit_code == 0:
            break
    assert (await sandbox.exec(writes)).exit_code == 0
    assert sandbox.failure is None


async def test_a_bomb_of_empty_files_is_ended(sandbox: Sandbox) -> None:
    result = await sandbox.exec("i=0; while [ $i -lt 100000 ]; do i=$((i+1)); : > /workspace/$i || exit 3; done", timeout=60)
    assert result.exit_code != 0
    assert disk.measure(sandbox.place.folder).files < 100000
    assert await limits_met(sandbox) == ["files"]
    assert (await sandbox.exec("echo alive")).stdout == "alive\n"


async def test_disk_cannot_be_taken_without_writing(sandbox: Sandbox) -> None:
    """Not by fallocate(2), which takes no time, nor beyond the largest file with FALLOC_FL_KEEP_SIZE."""
    for option in ("", "--keep-size"):
        result = await sandbox.exec(f"fallocate {option} --length 30MiB /workspace/big")
        assert "supported" in result.stderr
    assert disk.measure(sandbox.place.folder).bytes < 30 * MIB
    assert (await sandbox.exec("head -c 8192 /dev/zero > /workspace/a && fallocate -p -o 0 -l 4096 /workspace/a")).exit_code == 0


async def test_a_file_without_a_name_that_is_only_mapped_counts(sandbox: Sandbox) -> None:
    if os.geteuid():
        pytest.skip("only root can see what a mapping holds")
    code = """
import ctypes, os
libc = ctypes.CDLL(None)
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
for number in range(200):
    with open("/workspace/hidden", "w+b", 0) as file:
        os.unlink("/workspace/hidden")
        file.write(bytes(4_000_000))
        libc.mmap(None, 4096, 1, 1, file.fileno(), 0)
"""
    result = await sandbox.exec(f"/usr/bin/python3 -I -S -c '{code}'")
    assert result.exit_code != 0
    assert await limits_met(sandbox) == ["disk"]


async def test_a_file_without_a_name_counts(sandbox: Sandbox) -> None:
    code = """
import os
kept = []
for number in range(200):
    kept.append(open("/workspace/hidden", "wb", 0))
    os.unlink("/workspace/hidden")
    kept[-1].write(bytes(4_000_000))
"""
    result = await sandbox.exec(f"/usr/bin/python3 -I -S -c '{code}'")
    assert result.exit_code != 0
    assert await limits_met(sandbox) == ["disk"]


async def test_from_inside_nobody_lifts_what_was_set(sandbox: Sandbox) -> None:
    """An ordinary user's server can lower only the soft limit: who lifts that is ended at the next measurement."""
    lift = f"ulimit -S -f unlimited 2>/dev/null; {FILL}"
    code = f"while :; do {lift.replace('exit 3', 'break')}; done"
    with contextlib.suppress(SandboxFailed):
        await sandbox.exec(f"({code}) & ({code}) & wait", timeout=5)
    await until(lambda: disk.measure(sandbox.place.folder).bytes < 800 * MIB)


async def test_usage_tells_what_the_disk_holds(sandbox: Sandbox) -> None:
    await sandbox.exec("head -c 5000000 /dev/zero > /workspace/five")
    found = await sandbox.usage()
    for _ in range(100):
        if found["diskBytes"] >= 5_000_000:
            break
        await sandbox.exec("sleep 0.05; i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done")
        found = await sandbox.usage()
    assert found["diskBytes"] >= 5_000_000
    assert found["files"] >= 3
