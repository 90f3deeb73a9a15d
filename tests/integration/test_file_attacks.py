"""An agent in a real sandbox lays traps in its workspace; the server's own file code follows none, waits for none, reads none to no end."""

from __future__ import annotations

import asyncio
import io
import shutil
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ash.errors import AshError, PayloadTooLarge
from ash.sandbox import Budget, Sandbox, list_files, open_workspace_file, pack, unpack
from tests.sandboxes import Pool, open_pool

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
SECRET = "the server's own"
BUDGET = Budget(64 << 20)
TRAPS = """
set -e
ln -s {secret} link; ln -s ../../.. up; ln -s /proc/self/root proc; ln -s /dev/zero zero; ln -s loop loop
mkfifo fifo; mkdir folder; ln -s {secret} folder/link; mkdir -p .git; ln -s {folder} .git/out
python3 -c "import socket; socket.socket(socket.AF_UNIX).bind('socket')"
python3 -c "import os; os.chmod(os.open('shut', os.O_CREAT | os.O_WRONLY), 0)"
echo good > good; ulimit -f unlimited 2>/dev/null || true; truncate -s 9M sparse
"""


@pytest.fixture
async def pool(data_dir: str) -> AsyncIterator[Pool]:
    async with open_pool(data_dir) as found:
        if found.status().isolation == "unavailable":
            pytest.skip(f"this host cannot isolate: {found.status().warnings[0]}")
        yield found


@pytest.fixture
async def session(pool: Pool) -> tuple[Sandbox, Path]:
    sandbox = await pool.take("s1")
    secret = Path(pool.data_dir, "secret")
    secret.write_text(SECRET)
    done = await sandbox.exec(TRAPS.format(secret=secret, folder=pool.data_dir))
    assert done.exit_code == 0, done
    return sandbox, pool.session_dir("s1")


async def in_time(call: object, *arguments: object) -> object:
    """In a thread, as the server does it. A server that waits at a FIFO would wait for ever."""
    async with asyncio.timeout(20):
        return await asyncio.to_thread(call, *arguments)  # type: ignore[arg-type]


async def test_the_traps_would_catch_a_server_that_opened_them_plainly(session: tuple[Sandbox, Path]) -> None:
    assert (session[1] / "workspace/link").read_text() == SECRET


@pytest.mark.parametrize(
    "path", ["link", "folder/link", "up/secret", "proc/etc/passwd", "zero", "loop", "fifo", "socket", "folder", ".git/out/secret"]
)
async def test_no_trap_is_read(session: tuple[Sandbox, Path], path: str) -> None:
    with pytest.raises(AshError) as caught:
        await in_time(open_workspace_file, str(session[1]), path)
    assert SECRET not in str(caught.value)


async def test_the_list_and_the_archive_hold_files_alone(session: tuple[Sandbox, Path]) -> None:
    found, _ = await asyncio.wait_for(asyncio.to_thread(list_files, str(session[1])), 20)
    assert {file.path for file in found} >= {"good", "sparse"}
    assert not {file.path for file in found} & {"link", "fifo", "socket", "zero", "folder/link"}
    content = io.BytesIO()
    await in_time(pack, str(session[1]), content, BUDGET)
    content.seek(0)
    with tarfile.open(fileobj=content) as archive:
        members = archive.getmembers()
        assert all(member.isreg() or member.isdir() for member in members)
        assert SECRET.encode() not in b"".join(archive.extractfile(member).read() for member in members if member.isreg())  # type: ignore[union-attr]


async def test_a_file_larger_than_any_disk_is_refused_unread(session: tuple[Sandbox, Path]) -> None:
    with pytest.raises(PayloadTooLarge):
        await in_time(pack, str(session[1]), io.BytesIO(), Budget(4 << 20))


async def test_an_upload_goes_nowhere_by_a_link_and_belongs_to_the_agent(session: tuple[Sandbox, Path], pool: Pool) -> None:
    def archive(name: str) -> io.BytesIO:
        target = io.BytesIO()
        with tarfile.open(fileobj=target, mode="w") as tar:
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"new"))
        target.seek(0)
        return target

    sandbox, folder = session
    for name in ("up/planted", ".git/out/planted", "fifo/x", "link/x"):
        with pytest.raises(AshError, match="leads through"):
            await in_time(unpack, str(folder), archive(name), BUDGET)
    assert not Path(pool.data_dir, "planted").exists()
    for name in ("link", "made/here"):
        await in_time(unpack, str(folder), archive(name), BUDGET)
    assert Path(pool.data_dir, "secret").read_text() == SECRET
    done = await sandbox.exec("cat link made/here && echo more >> made/here && rm -r made link")
    assert (done.exit_code, done.stdout) == (0, "newnew"), done


async def test_an_agent_that_swaps_files_for_links_all_the_time_gains_nothing(session: tuple[Sandbox, Path]) -> None:
    sandbox, folder = session
    swap = "import os\nwhile True:\n os.symlink('../../../../secret', 'new'); os.rename('new', 'swapped')\n"
    swap += " open('new', 'w').write('plain'); os.rename('new', 'swapped')\n os.rename('folder', 'moved'); os.symlink('..', 'folder')\n"
    swap += " os.unlink('folder'); os.rename('moved', 'folder')\n"
    swapping = asyncio.create_task(sandbox.exec(f'timeout 5 python3 -c "{swap}"'))
    read = refused = 0
    while not swapping.done():
        for path in ("swapped", "folder/link"):
            try:
                file, state = open_workspace_file(str(folder), path)
            except AshError:
                refused += 1
            else:
                with file:
                    assert SECRET.encode() not in file.read(state.st_size + 1)
                read += 1
        content = io.BytesIO()
        await in_time(pack, str(folder), content, BUDGET)
        with tarfile.open(fileobj=io.BytesIO(content.getvalue())) as archive:
            assert all(member.isreg() or member.isdir() for member in archive.getmembers())
    assert refused
    assert (await swapping).exit_code in (124, 137, 143)
