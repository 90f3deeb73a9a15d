"""What stands between the server and bwrap: a first step into the cgroup, and for a root server its own mount namespace and uid.

bwrap never runs as uid 0. But a sandbox's own uid cannot walk to a data folder under a home of mode 0700, and bwrap resolves
its sources as that uid. So a root server prepares one private mount namespace, once, in which the needed folders stand at an
open place; each launch enters it and gives up root there. Nothing is mounted where other processes of the host can see it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping, Sequence

from ash.errors import SandboxFailed
from ash.isolation.bwrap import OUTER_ENVIRONMENT

# Places that exist nearly everywhere and that nothing in a sandbox needs; in the private namespace one becomes the stage.
PLACES = ("/mnt", "/media", "/srv", "/opt", "/tmp")

# `slave`: later mounts and unmounts of the host reach the stage, nothing comes back.
_PREPARE = """set -e
place=$1; shift
mount -t tmpfs -o mode=0755,size=64k,nosuid,nodev,noexec ash-stage "$place"
while [ $# -gt 0 ]; do
if [ -d "$2" ]; then mkdir "$place/$1"; else : > "$place/$1"; fi
mount --rbind "$2" "$place/$1"; shift 2
done
echo ready
read -r _ || :
"""

# The process is in its cgroup before it becomes anything else; when memory runs out, sandboxes go before the server does.
_ENTER = """if [ -n "$1" ]; then echo 0 > "$1/cgroup.procs" || exit 71; fi
echo 500 > /proc/self/oom_score_adj
shift
exec "$@"
"""
NO_CGROUP_EXIT = 71


class Stage:
    """The private mount namespace, held by a file descriptor. Closing it is enough: the kernel removes the mounts."""

    def __init__(self, fd: int, place: str, sources: Mapping[str, str]) -> None:
        self._fd, self._place, self._sources = fd, place, dict(sources)

    def locate(self, path: str) -> str:
        """Where a host path stands on the stage; a path that is not under a source stays as it is."""
        for name, source in self._sources.items():
            if path == source or path.startswith(source + "/"):
                return os.path.join(self._place, name) + path[len(source) :]
        return path

    def command(self, uid: int) -> list[str]:
        """Enter the namespace and become `uid`, without supplementary groups. The descriptor itself is not passed on."""
        return ["nsenter", f"--mount=/proc/{os.getpid()}/fd/{self._fd}", "--setgid", str(uid), "--setuid", str(uid), "--"]

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def launch_prefix(stage: Stage | None, uid: int | None, cgroup: str | None) -> list[str]:
    """What precedes bwrap on the command line."""
    enter = ["/bin/sh", "-c", _ENTER, "sh", cgroup or ""]
    return enter if stage is None or uid is None else [*enter, *stage.command(uid)]


def pick_place(sources: Sequence[str], places: Sequence[str] = PLACES) -> str:
    """A place that hides none of the sources and none of the interpreters. Raises SandboxFailed."""
    for place in places:
        hides = any(path == place or path.startswith(place + "/") for path in sources)
        if os.path.isdir(place) and not os.path.islink(place) and not hides:
            return place
    raise SandboxFailed(f"none of {', '.join(places)} can be used to prepare sandboxes; move the data folder out of them")


async def open_stage(sources: Mapping[str, str]) -> Stage:
    """Make the namespace with each of `sources` (name: host folder or file) in it. Raises SandboxFailed with the reason."""
    for program in ("unshare", "nsenter", "mount"):
        if shutil.which(program) is None:
            raise SandboxFailed(f"`{program}` is missing; install the package util-linux")
    place = pick_place(list(sources.values()))
    pairs = [part for name, source in sources.items() for part in (name, source)]
    process = await asyncio.create_subprocess_exec(
        "unshare", "--mount", "--propagation", "slave", "/bin/sh", "-c", _PREPARE, "sh", place, *pairs,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=OUTER_ENVIRONMENT,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    fd = -1
    try:
        async with asyncio.timeout(10):
            if await process.stdout.readline() == b"ready\n":
                fd = os.open(f"/proc/{process.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            process.stdin.close()  # it may go; `communicate` does this by itself only from 3.12 on
            _, error = await process.communicate()
    except TimeoutError as error_:
        process.kill()
        await process.wait()
        raise SandboxFailed("preparing the sandboxes' mount namespace took longer than 10 s") from error_
    if fd < 0:
        raise SandboxFailed(f"the sandboxes' mount namespace could not be made: {error.decode(errors='replace').strip()}")
    return Stage(fd, place, sources)
