"""A server as a hardened systemd service of an unprivileged user, imitated by the mounts and process attributes that systemd would set.

Which directives leave sandboxes working, and that one which does not is named. The unit itself is tried where systemd runs: `tests/vm`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
NOBODY = "65534"
USER = f"setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups"
SERVER = """
import asyncio, os, sys, tempfile
sys.path.insert(0, os.getcwd())
from tests.sandboxes import open_pool, until

async def main():
    with tempfile.TemporaryDirectory(prefix="ash-") as data_dir:
        async with open_pool(data_dir, warm=1) as pool:
            status = pool.status()
            if status.isolation == "unavailable":
                print(status.warnings[0])
                return
            await until(lambda: pool.status().warm == 1, 20)
            sandbox = await pool.take("s1")
            result = await sandbox.exec("echo inside > note; cat note; mount | grep -c ' / '")
            await sandbox.stop()
            print("stopped" if sandbox.failure else "alive", result.stdout)

asyncio.run(main())
"""
# What systemd 252 does for each directive, as far as it can be seen from inside.
WORKING = {
    "NoNewPrivileges": ("true", "--no-new-privs"),
    "CapabilityBoundingSet, empty": ("true", "--no-new-privs --bounding-set=-all --inh-caps=-all"),
    "ProtectHome": ("mount -t tmpfs -o mode=000,ro none /home && mount -t tmpfs -o mode=000,ro none /root", ""),
    "PrivateTmp": ("mount -t tmpfs -o mode=1777,nosuid,nodev private /tmp", ""),
    "PrivateDevices": (
        "d=/mnt && mount -t tmpfs -o nosuid,noexec,mode=755 none $d && mkdir $d/pts $d/shm && "
        "for f in null zero full random urandom tty; do touch $d/$f && mount --bind /dev/$f $d/$f; done && "
        "ln -s pts/ptmx $d/ptmx && mount --rbind /dev/pts $d/pts && mount --rbind /dev/shm $d/shm && mount --rbind $d /dev",
        "",
    ),
    "ProtectProc=invisible": ("umount /proc; mount -t proc -o nosuid,nodev,noexec,hidepid=invisible proc /proc", ""),
    "ProtectProc=noaccess": ("umount /proc; mount -t proc -o nosuid,nodev,noexec,hidepid=noaccess proc /proc", ""),
    "ProtectKernelModules": ("d=/usr/lib/modules; [ ! -d $d ] || mount -t tmpfs -o mode=000,ro none $d", ""),
    "ProtectControlGroups": ("mount -o remount,ro,bind /sys/fs/cgroup", ""),
    "ProtectSystem=strict": (
        "mount --rbind / /mnt && mount -o remount,bind,ro /mnt && cd /mnt && pivot_root . mnt && umount -l /mnt && cd / && "
        "mount -t tmpfs -o mode=1777 private /tmp",
        "",
    ),
}
TRICKY = ("CapabilityBoundingSet, empty", "PrivateDevices", "ProtectProc=invisible", "ProtectProc=noaccess", "ProtectSystem=strict")
BROKEN = {
    "ProtectKernelTunables": "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys",
    "ProtectKernelLogs": "mount --bind /dev/null /proc/kmsg",
    "ProcSubset": "umount /proc; mount -t proc -o nosuid,nodev,noexec,subset=pid proc /proc",
}
pytestmark = [
    pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts what a service would see"),
]


@pytest.fixture(scope="module")
def code() -> Iterator[str]:
    """A copy that an ordinary user can read, outside of what the directives hide."""
    with tempfile.TemporaryDirectory(prefix="code-", dir="/var/tmp") as copy:
        for name in ("ash", "tests"):
            shutil.copytree(PROJECT / name, Path(copy, name), ignore=shutil.ignore_patterns("__pycache__"))
        os.chmod(copy, 0o755)
        yield copy


def serve(code: str, mounts: str, attributes: str = "") -> str:
    """What a server says that sees these mounts and has these attributes."""
    command = f'{mounts} && cd {code} && exec {USER} {attributes} /usr/bin/python3 -B -c "$0"'
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", command, SERVER],
        capture_output=True, text=True, timeout=120, check=False, cwd="/", env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )  # fmt: skip
    if "unshare" in done.stderr and "Operation not permitted" in done.stderr:
        pytest.skip(f"this machine makes no mount namespaces: {done.stderr}")
    return done.stdout or done.stderr


@pytest.fixture(scope="module")
def plain(code: str) -> None:
    said = serve(code, "true")
    if said.startswith("Agents cannot be isolated"):
        pytest.skip(f"this host cannot isolate for ordinary users: {said}")


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("directive", TRICKY)
def test_sandboxes_work_in_a_service_with(directive: str, code: str) -> None:
    assert serve(code, *WORKING[directive]) == "stopped inside\n1\n\n"


@pytest.mark.usefixtures("plain")
def test_sandboxes_work_in_a_service_with_all_of_them(code: str) -> None:
    together = " && ".join(f"{{ {mounts}; }}" for name, (mounts, _) in WORKING.items() if name != "ProtectProc=noaccess")
    assert serve(code, together, WORKING["CapabilityBoundingSet, empty"][1]) == "stopped inside\n1\n\n"


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("directive", BROKEN)
def test_a_server_says_which_directive_keeps_it_from_isolating(directive: str, code: str) -> None:
    said = serve(code, BROKEN[directive])
    assert said.startswith("Agents cannot be isolated")
    assert f"{directive}=" in said
