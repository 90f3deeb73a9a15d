"""Finds the part of the cgroup v2 tree that this server may use, or says why there is none and what would change that.

Under systemd that is the server's own cgroup, if it was delegated; in a container the container's; for root elsewhere a cgroup `ash`
at the top. Moves this server into a leaf where the kernel wants that; moves no process of anybody else, but for those of its own
container.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from typing import NamedTuple

from ash.isolation.cgroup import CONTROLLERS, CgroupTree

SERVER_LEAF = "ash-server"
TOP = "ash"
_SYSTEMD = "/run/systemd/system"
_CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv", "/run/systemd/container")
_MOVE_ROUNDS = 10
_LEAVE_TIMEOUT = 3.0

AS_SERVICE = (
    "Run it as a service whose unit has `Delegate=yes` (`ash service install` writes one), "
    "or start it with `systemd-run --user --scope -p Delegate=yes ash start`"
)
_UNIFIED = "Start the machine with the kernel option `systemd.unified_cgroup_hierarchy=1`, or mount cgroup2 and give --cgroup-root"
_WRITABLE = (
    "Start the container with a writable cgroup tree of its own: "
    "with `--cgroupns=private` and `--privileged`, or under podman with `--systemd=always`"
)


class CgroupsUnavailable(Exception):
    """No usable cgroup v2 tree; the text says why, `fix` what to do."""

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(reason)
        self.fix = fix


class TreeReport(NamedTuple):
    """What `describe_tree` found. `problem` is empty when sandboxes can be limited; `missing` names what cannot, and why."""

    root: str
    kind: str
    controllers: tuple[str, ...]
    missing: dict[str, str]
    problem: str
    fix: str


class Surroundings(NamedTuple):
    """The facts that decide, as texts of /proc files and yes or no."""

    mountinfo: str
    cgroup: str
    init_cgroup: str
    is_root: bool
    is_container: bool


class Site(NamedTuple):
    """Where sandboxes' cgroups are to be made. `kind` is one of the words below."""

    path: str
    kind: str
    mount: str = ""


GIVEN, DELEGATED, LEAF, CONTAINER, AT_TOP = "given", "delegated", "leaf", "container", "top"


def look_around() -> Surroundings:
    is_container = any(os.path.exists(path) for path in _CONTAINER_MARKS) or b"\0container=" in b"\0" + _read_bytes("/proc/1/environ")
    # Of the first process nothing can be read where ProtectProc= of systemd or `hidepid` hides it from ordinary users.
    init_cgroup = _read_bytes("/proc/1/cgroup").decode(errors="replace")
    return Surroundings(_read("/proc/self/mountinfo"), _read("/proc/self/cgroup"), init_cgroup, os.geteuid() == 0, is_container)


# Finding the place


def find_site(facts: Surroundings) -> Site:
    """The cgroup to use, by who started this server and how. Changes nothing. Raises CgroupsUnavailable."""
    own = own_path(facts.cgroup)
    mount, shown = _find_mount(facts, own)
    path = os.path.normpath(os.path.join(mount, os.path.relpath(own, shown)))
    parent = os.path.dirname(path)
    if own != "/" and not _is_marked(path) and (os.path.basename(path) == SERVER_LEAF or _is_handed_over(parent)):
        return Site(parent, LEAF)
    if _is_marked(path) or (not facts.is_root and _is_writable(path)):
        return Site(path, DELEGATED)
    if facts.is_root:
        return _find_for_root(facts, mount, path, own)
    raise CgroupsUnavailable(f"this server's cgroup {own} belongs to somebody else", AS_SERVICE)


def _find_for_root(facts: Surroundings, mount: str, path: str, own: str) -> Site:
    is_real_top = not os.path.exists(os.path.join(mount, "cgroup.events"))  # the kernel's own top has no such file
    if own == "/" and not is_real_top and own_path(facts.init_cgroup) == "/":
        return Site(path, CONTAINER)
    if is_real_top and (own == "/" or not facts.is_container):  # at the very top no container bounds this server either
        return Site(os.path.join(mount, TOP), AT_TOP, mount)
    if not _others_that_stay(path):
        return Site(path, DELEGATED)
    raise CgroupsUnavailable(f"this server's cgroup {own} also holds processes of others, and it is in a container", _WRITABLE)


def _find_mount(facts: Surroundings, own: str) -> tuple[str, str]:
    """Where the tree is mounted, and which part of it is there. What is mounted later on the same folder hides what was there."""
    mounts = {place: (shown, writable) for place, shown, writable in find_mounts(facts.mountinfo)}
    if not mounts:
        raise CgroupsUnavailable("no cgroup v2 tree is mounted", _UNIFIED)
    places = [place for place, (shown, _) in mounts.items() if _shows(shown, own)]
    if not places:
        raise CgroupsUnavailable(f"the cgroup v2 tree at {next(iter(mounts))} does not show this server's own cgroup", "Give --cgroup-root")
    for place in places:
        if mounts[place][1]:
            return place, mounts[place][0]
    fix = _WRITABLE if facts.is_container else f"Run `mount -o remount,rw {places[0]}`"
    raise CgroupsUnavailable(f"the cgroup v2 tree at {places[0]} is mounted read-only", fix)


def _shows(shown: str, own: str) -> bool:
    return not own.startswith("/..") and (own == shown or own.startswith(shown.rstrip("/") + "/"))


def find_mounts(mountinfo: str) -> list[tuple[str, str, bool]]:
    """Where cgroup v2 is mounted, which part of the tree is shown there, and whether it can be written; from /proc/self/mountinfo."""
    found = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) >= 6 and kind[:1] == ["cgroup2"]:
            found.append((_unescape(fields[4]), _unescape(fields[3]), "rw" in fields[5].split(",")))
    return found


def own_path(cgroup: str) -> str:
    """A process's cgroup v2 path, from the text of /proc/<pid>/cgroup."""
    return next((line[3:] for line in cgroup.splitlines() if line.startswith("0::")), "/")


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _is_marked(path: str) -> bool:
    """Whether systemd says that it keeps its hands off this cgroup. The first mark is for all to read, the second for root."""
    for name in ("user.delegate", "trusted.delegate"):
        with contextlib.suppress(OSError):
            if os.getxattr(path, name) == b"1":
                return True
    return False


def _is_handed_over(parent: str) -> bool:
    """Whether the cgroup above was delegated to this server, as with `DelegateSubgroup=`. That of a user's systemd is not for us."""
    return _is_marked(parent) and not os.path.basename(parent).startswith("user@")


def _is_writable(path: str) -> bool:
    return all(os.access(os.path.join(path, name), os.W_OK) for name in ("", "cgroup.procs", "cgroup.subtree_control"))


def _others_in(path: str) -> list[int]:
    """Processes directly in a cgroup besides this one. Those of another pid namespace are 0."""
    with contextlib.suppress(OSError):
        return [int(word) for word in _read(os.path.join(path, "cgroup.procs")).split() if int(word) != os.getpid()]
    return []


# Taking it


def open_tree(root: str = "", tag: str = "") -> CgroupTree:
    """The tree to use: `root` when given, else what is found. Raises CgroupsUnavailable; then nothing was moved."""
    site = Site(root, GIVEN) if root else find_site(look_around())
    try:
        return take(site, tag)
    except OSError as error:
        raise CgroupsUnavailable(f"cgroup v2 at {site.path} cannot be used: {error.strerror}", AS_SERVICE) from error


def take(site: Site, tag: str = "") -> CgroupTree:
    """Hand the controllers down to the children of the site; a cgroup with such children may hold no process itself."""
    offered, missing = _offered(site)
    if site.kind == AT_TOP:
        missing |= _enable(site.mount, offered)
        os.makedirs(site.path, exist_ok=True)
    else:
        _make_empty(site)
    missing |= _enable(site.path, [name for name in offered if name not in missing])
    usable = [name for name in CONTROLLERS if name not in missing]
    if not usable:
        raise CgroupsUnavailable(f"no controller can be used at {site.path}: {_list(missing)}", AS_SERVICE)
    tree = CgroupTree(site.path, usable, tag=tag, missing=missing)
    tree.is_made = site.kind == AT_TOP
    return tree


def _offered(site: Site) -> tuple[list[str], dict[str, str]]:
    """The controllers that could be handed down, and why the others could not. Raises CgroupsUnavailable when there is none at all."""
    folder = site.mount or site.path
    try:
        present = _read(os.path.join(folder, "cgroup.controllers")).split()
    except OSError as error:
        raise CgroupsUnavailable(f"{folder} is not a cgroup v2 folder: {error.strerror}", "Give a folder of cgroup v2") from error
    offered = [name for name in CONTROLLERS if name in present]
    if not offered:
        why, fix = ("; they belong to cgroup v1", _UNIFIED) if site.kind == AT_TOP else ("", AS_SERVICE)
        raise CgroupsUnavailable(f"cgroup v2 has none of the controllers {', '.join(CONTROLLERS)} here{why}", fix)
    return offered, {name: f"{folder} was not given this controller" for name in CONTROLLERS if name not in offered}


def _make_empty(site: Site) -> None:
    """Move this server into a leaf of the cgroup it is in. Others stay where they are, except in a container of which this is the top."""
    others = _others_that_stay(site.path)
    if site.kind == CONTAINER and 0 not in others:
        _move_all(site.path)
    elif others and site.kind != GIVEN:
        names = ", ".join(f"{pid} ({_name_of(pid)})" for pid in others[:3])
        raise CgroupsUnavailable(f"this server's cgroup {site.path} also holds other processes: {names}", AS_SERVICE)
    elif str(os.getpid()) in _read_procs(site.path):
        _move(site.path, os.getpid())


def _others_that_stay(path: str) -> list[int]:
    """Without the first processes of the probes' pid namespaces, which leave a moment after the bubblewrap that was waited for."""
    deadline = time.monotonic() + _LEAVE_TIMEOUT
    while (others := _others_in(path)) and all(_name_of(pid) in ("bwrap", "gone") for pid in others) and time.monotonic() < deadline:
        time.sleep(0.01)
    return others


def _move_all(path: str) -> None:
    """Until none is left: one that forks while it is moved leaves a child behind."""
    for _ in range(_MOVE_ROUNDS):
        pids = _read_procs(path)
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                _move(path, int(pid))


def _move(path: str, pid: int) -> None:
    leaf = os.path.join(path, SERVER_LEAF)
    os.makedirs(leaf, exist_ok=True)
    _write(os.path.join(leaf, "cgroup.procs"), str(pid))


def _read_procs(path: str) -> list[str]:
    with contextlib.suppress(OSError):
        return _read(os.path.join(path, "cgroup.procs")).split()
    return []


def _enable(path: str, names: list[str]) -> dict[str, str]:
    """Hand controllers down, one by one when not all at once. Returns those that were refused, with the reason."""
    control = os.path.join(path, "cgroup.subtree_control")
    enabled = _read(control).split() if os.path.exists(control) else []
    wanted = [name for name in names if name not in enabled]
    if not wanted:
        return {}
    with contextlib.suppress(OSError):
        _write(control, " ".join(f"+{name}" for name in wanted))
        return {}
    refused = {}
    for name in wanted:
        try:
            _write(control, f"+{name}")
        except OSError as error:
            refused[name] = f"{path} does not hand it down: {error.strerror}"
    return refused


def _list(missing: dict[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in missing.items())


def _name_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return _read(f"/proc/{pid}/comm").strip()
    return "of another pid namespace" if pid == 0 else "gone"


# Only looking


def describe_tree(root: str = "") -> TreeReport:
    """What a server started like this process would use. Changes nothing, so what only a write would show is not in it."""
    site = Site(root, GIVEN)
    try:
        site = site if root else find_site(look_around())
        offered, missing = _offered(site)
        others = [] if site.kind in (CONTAINER, AT_TOP) else _others_in(site.path)
        if others:
            raise CgroupsUnavailable(f"{site.path} also holds other processes, such as {others[0]} ({_name_of(others[0])})", AS_SERVICE)
    except CgroupsUnavailable as error:
        return TreeReport(site.path, site.kind, (), {}, str(error), error.fix)
    return TreeReport(site.path, site.kind, tuple(offered), missing, "", AS_SERVICE if missing else "")


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def _read_bytes(path: str) -> bytes:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read()
    return b""


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
