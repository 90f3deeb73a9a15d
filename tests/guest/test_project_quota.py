"""The kernel's own disk quota, on a file system that has one: what goes beyond it fails inside, without any watching."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator

import pytest

from ash.isolation import launch, quota
from ash.isolation.quota import QuotaUnavailable
from ash.sandbox import Sandbox
from tests.sandboxes import LIMITS, Pool, limits_met, open_pool

PLACE = "/srv/quota"
LIMITED = LIMITS._replace(disk_mb=40, max_files=300, max_file_mb=1024)


def find_reason() -> str:
    try:
        quota.find_project_quota(PLACE)
    except (QuotaUnavailable, OSError) as error:
        return f"no project quota here: {error}; `make test-vm` runs this"
    return ""


pytestmark = pytest.mark.skipif(bool(reason := find_reason()), reason=reason)


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    data_dir = tempfile.mkdtemp(prefix="ash-", dir=PLACE)
    async with open_pool(data_dir, limits=LIMITED, start_timeout=120.0) as found:
        assert "project quota" in found.status().limits["disk"]
        yield found
    shutil.rmtree(data_dir)


@pytest.fixture
async def sandbox(pool: Pool) -> Sandbox:
    sandbox = await pool.take("s1")
    await sandbox.init({}, {}, [])
    return sandbox


async def test_a_write_beyond_the_quota_fails_and_what_is_removed_is_free_again(sandbox: Sandbox) -> None:
    result = await sandbox.exec("head -c 100000000 /dev/zero > /workspace/big; s=$?; wc -c < /workspace/big; exit $s", timeout=120)
    assert "Disk quota exceeded" in result.stderr
    assert 20_000_000 < int(result.stdout) <= 40 << 20
    again = await sandbox.exec("rm /workspace/big && head -c 10000000 /dev/zero > /workspace/small", timeout=120)
    assert again.exit_code == 0, again


async def test_the_number_of_files_is_held(sandbox: Sandbox) -> None:
    result = await sandbox.exec("i=0; while [ $i -lt 2000 ]; do i=$((i+1)); : > /workspace/$i || break; done; echo $i", timeout=120)
    assert "Disk quota exceeded" in result.stderr
    assert 200 < int(result.stdout) <= 300


async def test_a_file_without_a_name_counts(sandbox: Sandbox) -> None:
    code = 'import os; f = open("/workspace/x", "wb", 0); os.unlink("/workspace/x")\nwhile True: f.write(bytes(1 << 20))'
    result = await sandbox.exec(f"/usr/bin/python3 -I -S -c '{code}'", timeout=120)
    assert "Disk quota exceeded" in result.stderr


async def test_from_inside_the_project_cannot_be_changed(sandbox: Sandbox) -> None:
    """The same request succeeds on the host: what refuses it is that the sandbox is no part of the host's user namespace."""
    code = """
import fcntl, os, struct, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
flags, a, b, project, c = struct.unpack("=5I8x", fcntl.ioctl(fd, 0x801C581F, bytes(28)))
fcntl.ioctl(fd, 0x401C5820, struct.pack("=5I8x", flags & ~0x200, a, b, 7, c))
"""
    inside = await sandbox.exec(f"/usr/bin/python3 -I -S -c '{code}' /workspace", timeout=120)
    assert inside.exit_code != 0
    folder = tempfile.mkdtemp(dir=PLACE)
    status, _, errors = await launch.run(["/usr/bin/python3", "-I", "-S", "-c", code, folder], {}, 60)
    os.rmdir(folder)
    assert status == 0, errors


async def test_usage_and_the_event_come_from_the_kernel(sandbox: Sandbox) -> None:
    await sandbox.exec("head -c 100000000 /dev/zero > /workspace/big", timeout=120)
    assert (await sandbox.usage())["diskBytes"] > 35 << 20
    assert await limits_met(sandbox, timeout=30) == ["disk"]


async def test_a_session_that_wakes_is_held_again(pool: Pool) -> None:
    first = await pool.take("s2")
    await first.init({}, {}, [])
    await first.exec("head -c 30000000 /dev/zero > /workspace/kept", timeout=120)
    await first.stop()
    second = await pool.take("s2", fresh=False)
    await second.init({}, {}, [])
    result = await second.exec("head -c 30000000 /dev/zero > /workspace/more", timeout=120)
    assert "Disk quota exceeded" in result.stderr
