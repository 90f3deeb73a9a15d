"""Sandboxes with a root file system and mounts of the operator's, for a server run by whoever runs the tests and for an ordinary user."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ash.errors import ConfigError
from ash.sandbox import Mount
from tests.integration.boxes import isolating, run_boxed
from tests.sandboxes import Pool, open_pool

PYTHON = "/usr/bin/python3"
TOOLS = ("dash", "cat", "ls", "touch", "grep", "id", "prlimit", "true")
HEAVY = ("test", "idlelib", "tkinter", "lib2to3", "ensurepip", "__pycache__", "site-packages", "dist-packages", "turtledemo", "config-*")
pytestmark = [
    pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed"),
    pytest.mark.skipif(not os.access(PYTHON, os.X_OK), reason=f"{PYTHON} is not installed"),
]


def build_root(folder: Path) -> Path:
    """A small system of this machine's own programs: a shell, a few tools, Python, and the libraries that they load."""
    folder.chmod(0o755)
    for name in ("usr/bin", "etc/alternatives", "opt/extra", "var/lib/extra"):
        (folder / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        if os.path.islink(f"/{name}"):
            (folder / name).symlink_to(os.readlink(f"/{name}"))
    python = os.path.realpath(PYTHON)
    library = Path(
        subprocess.run([python, "-c", "import os; print(os.__file__)"], capture_output=True, text=True, check=True).stdout
    ).parent
    shutil.copytree(library, folder / str(library).lstrip("/"), ignore=shutil.ignore_patterns(*HEAVY), symlinks=True)
    programs = [python, *(found for tool in TOOLS if (found := shutil.which(tool, path="/usr/bin:/bin")))]
    extensions = [str(path) for path in (library / "lib-dynload").glob("*.so")]
    for path in {*programs, *_libraries(programs + extensions)}:
        _copy(path, folder)
    (folder / "usr/bin/sh").symlink_to("dash")
    if not (folder / PYTHON.lstrip("/")).exists():
        (folder / PYTHON.lstrip("/")).symlink_to(os.path.basename(python))
    (folder / "usr/bin/only-here").write_text("#!/bin/sh\necho only here\n")
    (folder / "usr/bin/only-here").chmod(0o755)
    (folder / "opt/extra/note").write_text("from opt")
    return folder


def _libraries(programs: list[str]) -> set[str]:
    said = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False).stdout
    return set(re.findall(r"(/\S+\.so[.\d]*)", said))


def _copy(path: str, folder: Path) -> None:
    """To the same place; the links to folders at the top lead it into usr/."""
    target = folder / path.lstrip("/")
    os.makedirs(os.path.realpath(target.parent), exist_ok=True)
    if not target.exists():
        shutil.copy2(os.path.realpath(path), target)


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    if sysconfig.get_platform().startswith("linux") and shutil.which("ldd") is None:
        pytest.skip("ldd is missing: libraries cannot be found")
    with tempfile.TemporaryDirectory(prefix="root-", dir="/var/tmp") as folder:
        yield build_root(Path(folder))


@asynccontextmanager
async def pool_with(data_dir: str, **settings: Any) -> AsyncIterator[Pool]:
    async with open_pool(data_dir, **settings) as pool:
        if pool.status().isolation == "unavailable":
            pytest.skip(pool.status().warnings[0])
        yield pool


async def test_agents_see_the_root_file_system_and_not_this_machines_programs(data_dir: str, root: Path) -> None:
    async with pool_with(data_dir, rootfs=str(root), warm=1) as pool:
        sandbox = await pool.take("s1")
        done = await sandbox.exec("only-here; cat /opt/extra/note; ls /var/lib; ls /usr/bin/bwrap /usr/bin/env /usr/share || echo gone")
        assert done.stdout == "only here\nfrom opt" + "extra\ngone\n"
        fine = await sandbox.exec("echo x > note; cat note; python3 -c 'import socket, json; print(json.dumps([1]))'; cat CLAUDE.md")
        assert fine.stdout == "x\n[1]\nbe kind"


async def test_nothing_in_the_root_file_system_can_be_changed(data_dir: str, root: Path) -> None:
    before = sorted(str(path) for path in root.rglob("*"))
    async with pool_with(data_dir, rootfs=str(root)) as pool:
        sandbox = await pool.take()
        for path in ("/usr/x", "/usr/bin/only-here", "/opt/extra/x", "/var/lib/x", "/etc/x", "/x"):
            assert (await sandbox.exec(f"echo x >> {path}")).exit_code != 0
        limits = (await sandbox.exec("cat /proc/self/limits /proc/self/status")).stdout
    assert re.search(r"Max file size +10485760 ", limits)
    assert "Seccomp:\t2" in limits
    assert sorted(str(path) for path in root.rglob("*")) == before


async def test_etc_is_still_made_up(data_dir: str, root: Path) -> None:
    (root / "etc/shadow").write_text("secret")
    async with pool_with(data_dir, rootfs=str(root)) as pool:
        done = await (await pool.take()).exec("id -un; cat /etc/shadow /root/x; ls /etc")
    assert done.stdout.startswith("agent\n")
    assert "secret" not in done.stdout


async def test_a_root_file_system_without_python_stops_the_start_and_says_so(data_dir: str, tmp_path: Path, root: Path) -> None:
    bare = Path(shutil.copytree(root, tmp_path / "bare", symlinks=True, ignore=shutil.ignore_patterns("python3*")))
    with pytest.raises(ConfigError, match=r"has no Python 3\.10 or newer \(none was found\); install python3 in it"):
        async with pool_with(data_dir, rootfs=str(bare)):
            pass


async def test_a_root_file_system_without_prlimit_stops_the_start(data_dir: str, tmp_path: Path, root: Path) -> None:
    bare = Path(shutil.copytree(root, tmp_path / "bare", symlinks=True, ignore=shutil.ignore_patterns("prlimit")))
    with pytest.raises(ConfigError, match="no program prlimit"):
        async with pool_with(data_dir, rootfs=str(bare)):
            pass


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sandboxes of an ordinary user's server are that user")
async def test_a_root_file_system_that_is_closed_to_sandboxes_stops_the_start(data_dir: str, root: Path) -> None:
    root.chmod(0o700)
    try:
        with pytest.raises(ConfigError, match=r"cannot be shown to sandboxes .*open to every user"):
            async with pool_with(data_dir, rootfs=str(root)):
                pass
    finally:
        root.chmod(0o755)


async def test_without_isolation_a_root_file_system_is_refused(data_dir: str, root: Path) -> None:
    with pytest.raises(ConfigError, match="need `--sandbox bwrap`"):
        async with open_pool(data_dir, rootfs=str(root), isolation="none"):
            pass


async def test_the_interpreter_of_a_root_file_system_never_runs_outside(data_dir: str, tmp_path: Path, root: Path) -> None:
    """One that would tell: it writes a mark beside itself."""
    trap = Path(shutil.copytree(root, tmp_path / "trap", symlinks=True))
    python = trap / "usr/bin/python3"
    real = python.resolve().name
    python.unlink()
    python.write_text(f'#!/bin/sh\necho x > {tmp_path}/mark; exec /usr/bin/{real} "$@"\n')
    python.chmod(0o755)
    async with isolating(data_dir, rootfs=str(trap)) as isolation:
        assert run_boxed(isolation, "/usr/bin/python3", "-c", "print(1)").stdout == "1\n"
    assert not (tmp_path / "mark").exists()


# Mounts


@pytest.fixture
def tools() -> Iterator[Path]:
    """In a folder that sandboxes could not walk to: a root server's stage makes it reachable."""
    with tempfile.TemporaryDirectory(prefix="tools-", dir="/var/tmp") as folder:
        inner = Path(folder, "tools")
        inner.mkdir(mode=0o755)
        (inner / "note").write_text("a note")
        (inner / "run").write_text("#!/bin/sh\necho ran\n")
        (inner / "run").chmod(0o755)
        yield inner


async def test_what_the_operator_mounts_is_there_and_read_only(data_dir: str, tools: Path) -> None:
    mounts = (Mount(str(tools), "/opt/tools"), Mount(str(tools / "note"), "/data/deep/note"))
    async with pool_with(data_dir, mounts=mounts, warm=1) as pool:
        sandbox = await pool.take("s1")
        assert (await sandbox.exec("/opt/tools/run; cat /data/deep/note /opt/tools/note")).stdout == "ran\na notea note"
        for deed in (
            "touch /opt/tools/x",
            "echo x >> /data/deep/note",
            "rm /opt/tools/note",
            "touch /data/x",
            "mount -o remount,rw /opt/tools",
        ):
            assert (await sandbox.exec(deed)).exit_code != 0
    assert sorted(path.name for path in tools.iterdir()) == ["note", "run"]


async def test_mounts_are_shown_beside_a_root_file_system(data_dir: str, tools: Path, root: Path) -> None:
    async with pool_with(data_dir, mounts=(Mount(str(tools), "/opt/tools"),), rootfs=str(root)) as pool:
        assert (await (await pool.take()).exec("/opt/tools/run; cat /opt/extra/note")).stdout == "ran\nfrom opt"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sandboxes of an ordinary user's server are that user")
async def test_a_mount_opens_nothing_that_is_closed_to_other_users(data_dir: str, tools: Path) -> None:
    tools.chmod(0o700)
    async with pool_with(data_dir, mounts=(Mount(str(tools), "/opt/tools"),)) as pool:
        assert (await (await pool.take()).exec("ls /opt/tools")).exit_code != 0


async def test_a_mount_of_the_data_folder_stops_the_start(data_dir: str) -> None:
    with pytest.raises(ConfigError, match="shares files with the data folder"):
        async with pool_with(data_dir, mounts=(Mount(data_dir, "/data"),)):
            pass
