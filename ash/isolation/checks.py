"""What this host can enforce, measured primitive by primitive: each with a verdict, what was found, and the command that mends it.

Everything is tried in throw-away folders and cgroups; no sandbox, file or cgroup of a running server is touched.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from ash.errors import AshError, ConfigError, IsolationUnavailable, SandboxFailed
from ash.isolation import cgroup as cgroups
from ash.isolation import delegation, host, prepare
from ash.isolation.bwrap import ENVIRONMENT, OUTER_ENVIRONMENT
from ash.isolation.cgroup import CgroupTree
from ash.isolation.folders import Folders
from ash.isolation.launch import run
from ash.isolation.machine import FAIL, OK, UNKNOWN, WARN, Finding, check_disk, check_memory, nearest
from ash.isolation.prepare import Choices, Isolation, kernel_version
from ash.isolation.records import Limits
from ash.isolation.seccomp import ARCHITECTURES
from ash.isolation.stage import launch_prefix
from ash.isolation.syscalls import NUMBERS

OLDEST_KERNEL, GOOD_KERNEL = (5, 6), (5, 14)
"""The first with openat2 and pidfds in full; the first that counts processes per user namespace and has cgroup.kill."""
_OPENAT2, _RESOLVE_BENEATH = 437, 0x08  # the same number on every machine
_TRIAL_TIMEOUT = 10.0
_NAMES = {
    "memory": "memory of a sandbox as a whole", "pids": "processes and threads", "cpu": "processor time", "io": "reading and writing",
}  # fmt: skip


# The kernel and its tools


def check_kernel() -> Iterator[Finding]:
    release = os.uname().release
    version = kernel_version(release)
    if version < OLDEST_KERNEL:
        yield Finding("kernel", FAIL, f"Linux {release}", f"use Linux {_dotted(OLDEST_KERNEL)} or newer, best {_dotted(GOOD_KERNEL)}")
    elif version < GOOD_KERNEL:
        lacks = "processes cannot be limited without cgroups for an ordinary user, and cgroup.kill is missing"
        yield Finding("kernel", WARN, f"Linux {release}: {lacks}", f"use Linux {_dotted(GOOD_KERNEL)} or newer")
    else:
        yield Finding("kernel", OK, f"Linux {release}")
    yield _check_machine(platform.machine())
    yield _check_pidfd()
    yield _check_openat2()
    yield _check_program("prlimit", "sets the limits of each process", "install the package util-linux")


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(str(part) for part in version)


def _check_machine(machine: str) -> Finding:
    if machine in ARCHITECTURES:
        return Finding("architecture", OK, f"{machine}, for which there is a filter of system calls")
    return Finding("architecture", FAIL, f"{machine}: there is no filter of system calls for it", f"use {' or '.join(ARCHITECTURES)}")


def _check_pidfd() -> Finding:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return Finding(
            "pidfd", FAIL, f"processes cannot be held by descriptor: {error.strerror}", "use Linux 5.6 or newer, without a filter over it"
        )
    return Finding("pidfd", OK, "processes can be held by descriptor")


def _check_openat2() -> Finding:
    """Tried on the root folder: `..` must not lead out of it."""
    libc = ctypes.CDLL(None, use_errno=True)
    how = (ctypes.c_uint64 * 3)(os.O_PATH | os.O_CLOEXEC, 0, _RESOLVE_BENEATH)
    folder = os.open("/usr", os.O_PATH | os.O_CLOEXEC)
    try:
        fd = libc.syscall(ctypes.c_long(_OPENAT2), folder, b"../etc", ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how)))
        code = ctypes.get_errno()
    finally:
        os.close(folder)
    if fd >= 0:
        os.close(fd)
        return Finding("openat2", FAIL, "openat2 does not keep a path beneath its folder", "use a kernel without this fault")
    if code != 18:  # EXDEV: the path leads out
        return Finding(
            "openat2", WARN, f"openat2 is missing ({os.strerror(code)}); paths are walked by descriptor", "use Linux 5.6 or newer"
        )
    return Finding("openat2", OK, "openat2 keeps a path beneath its folder")


def _check_program(name: str, purpose: str, fix: str) -> Finding:
    path = shutil.which(name, path=OUTER_ENVIRONMENT["PATH"])
    return Finding(name, OK, f"{path} {purpose}") if path else Finding(name, FAIL, f"{name} is missing, which {purpose}", fix)


# The sandbox, tried from inside

_TRIED_CALLS = {"io_uring_setup": (1, 0), "clone3": (0, 0), "keyctl": (0, -3, 0), "bpf": (-1, 0, 0)}
# What holds inside, as the sandbox's own uid sees it. Each attempt is harmless where it works.
_LOOK_INSIDE = """
import json, os, socket, sys
found = {"uid": os.getuid(), "version": ".".join(map(str, sys.version_info[:3]))}
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
found["seccomp"] = status.get("Seccomp", "0").strip()
found["capabilities"] = [name for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb") if int(status.get(name, "0"), 16)]
found["privileges"] = status.get("NoNewPrivs", "0").strip()
try:
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    found["answered"] = []
    for name, number, arguments in json.loads(sys.argv[1]):
        if libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments)) != -1 or ctypes.get_errno() not in (1, 38):
            found["answered"].append(name)
    found["namespace"] = libc.unshare(0x10000000) == 0
    found["ctypes"] = True
except ImportError:
    found["ctypes"] = False
def writable(path):
    try:
        os.close(os.open(path, os.O_WRONLY))
        return True
    except OSError:
        return False
fixed = "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/proc/sysrq-trigger", "/etc/passwd", "/usr/bin/env"
found["writable"] = [path for path in fixed if writable(path)]
found["cards"] = [line.split(":")[0].strip() for line in open("/proc/net/dev") if ":" in line]
def reached(address):
    try:
        socket.create_connection(address, 1).close()
        return True
    except OSError:
        return False
found["reached"] = [address[0] for address in (("1.1.1.1", 53), ("169.254.169.254", 80)) if reached(address)]
found["environment"] = sorted(set(os.environ) - set(sys.argv[2:]))
print(json.dumps(found))
"""


async def check_sandbox(folder: str, limits: Limits, choices: Choices) -> list[Finding]:
    """Start a process in a sandbox, as a server of this user would, and ask it what holds. `folder` takes a throw-away folder."""
    findings = [await _check_bubblewrap()]
    if findings[0].verdict == FAIL:
        return findings
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as scratch:
        os.chmod(scratch, 0o711)
        places = Folders(scratch)
        places.open()
        isolation = Isolation("bwrap", places, limits)
        try:
            await prepare.prepare_sandbox(isolation, choices)
            seen = await _look_inside(isolation)
        except (IsolationUnavailable, ConfigError, SandboxFailed) as error:
            findings.append(Finding("user-namespaces", FAIL, error.message, host.find_cause()))
        else:
            findings += [*_judge_sandbox(isolation, seen), *_judge_filter(seen)]
        finally:
            isolation.close()
            places.close()
    return findings


async def _check_bubblewrap() -> Finding:
    program = shutil.which("bwrap") or shutil.which("bwrap", path=OUTER_ENVIRONMENT["PATH"])
    if program is None:
        return Finding("bubblewrap", FAIL, "bubblewrap is not installed", host.install_hint())
    _, output, _ = await run([program, "--version"], OUTER_ENVIRONMENT, _TRIAL_TIMEOUT)
    version = output.split()[-1] if output.split() else "of unknown version"
    if kernel_version(version) < (0, 8):
        return Finding("bubblewrap", FAIL, f"{program} {version}: --disable-userns is missing", "install bubblewrap 0.8 or newer")
    return Finding("bubblewrap", OK, f"{program} {version}")


async def _look_inside(isolation: Isolation) -> dict[str, Any]:
    """Raises SandboxFailed with what was said instead of an answer."""
    numbers = NUMBERS[platform.machine()]
    calls = json.dumps([(name, numbers[name], arguments) for name, arguments in _TRIED_CALLS.items()])
    command = [isolation.python.path, "-I", "-S", "-B", "-c", _LOOK_INSIDE, calls, *ENVIRONMENT, "PWD", "LC_CTYPE"]
    with isolation.boxed(command) as (argv, fds):
        code, output, errors = await run(argv, OUTER_ENVIRONMENT, prepare.PROBE_TIMEOUT, fds)
    try:
        seen: dict[str, Any] = json.loads(output)
    except ValueError as error:
        raise SandboxFailed(f"the check inside a sandbox ended with {code}: {errors.strip()[-200:]}") from error
    return seen


def _judge_sandbox(isolation: Isolation, seen: dict[str, Any]) -> Iterator[Finding]:
    who = f"uid {seen['uid']} inside, {'an unprivileged uid of its own' if isolation.is_root else 'this user'} on the host"
    yield Finding("user-namespaces", OK, f"a sandbox starts: {who}")
    yield _none("capabilities", seen["capabilities"], "no capability is held", "capabilities are held")
    yield _none("read-only", seen["writable"], "/proc/sys, /etc and /usr cannot be written inside", "these can be written inside")
    outside = [*(card for card in seen["cards"] if card != "lo"), *seen["reached"]]
    yield _none("network", outside, "nothing but loopback is there inside", "the network can be reached from inside")
    yield _none("environment", seen["environment"], "no variable of this process is seen inside", "these variables are seen inside")
    where = isolation.python.path
    if seen["ctypes"]:
        yield Finding("sandbox-python", OK, f"{where} {seen['version']}, which a sandbox's uid can run")
    else:
        lacks = f"{where} {seen['version']} has no ctypes: the bridge cannot close itself to the tools"
        yield Finding(
            "sandbox-python", WARN, lacks, "install a complete Python (Debian: `apt-get install python3`), or give --sandbox-python"
        )


def _none(id: str, found: list[str], good: str, bad: str) -> Finding:
    """A finding that holds if nothing was found."""
    fix = "do not run agents here: report this with the versions of the kernel and of bubblewrap"
    return Finding(id, FAIL, f"{bad}: {', '.join(found)}", fix) if found else Finding(id, OK, good)


def _judge_filter(seen: dict[str, Any]) -> Iterator[Finding]:
    fix = "use a kernel with CONFIG_SECCOMP_FILTER"
    if seen["seccomp"] != "2" or seen["privileges"] != "1":
        yield Finding("seccomp", FAIL, f"no filter of system calls is in force inside (Seccomp: {seen['seccomp']})", fix)
    elif seen["ctypes"] and (seen["answered"] or seen["namespace"]):
        open_calls = [*seen["answered"], *(["unshare"] if seen["namespace"] else [])]
        yield Finding("seccomp", FAIL, f"these system calls are not refused inside: {', '.join(open_calls)}", fix)
    else:
        tried = "io_uring, clone3, keyctl, bpf and new namespaces are refused inside" if seen["ctypes"] else "calls could not be tried"
        yield Finding("seccomp", OK, f"a filter of system calls is in force: {tried}")


# Control groups


def check_cgroups(root: str, server_pid: int, limits: Limits) -> Iterator[Finding]:
    """Each controller, tried in a cgroup that is removed again: in the tree of the server `server_pid`, or as one that starts now."""
    try:
        tree, undo = _running_tree(server_pid) if server_pid and not root else _fresh_tree(root)
    except delegation.CgroupsUnavailable as error:
        for name in cgroups.CONTROLLERS:
            yield Finding(f"cgroup.{name}", WARN, f"{_NAMES[name]}: not limited, because {error}", error.fix)
        return
    except OSError as error:
        yield Finding(
            "cgroup", UNKNOWN, f"the server's cgroup cannot be looked at: {error}", "run `ash doctor` as the server's user or as root"
        )
        return
    try:
        yield from _try_tree(tree, limits)
    finally:
        undo()


def _running_tree(pid: int) -> tuple[CgroupTree, Any]:
    """The tree that a running server uses, which is not changed but for one cgroup more."""
    with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
        site = delegation.find_site(delegation.look_around()._replace(cgroup=file.read()))
    enabled: list[str] = []
    with suppress(FileNotFoundError), open(os.path.join(site.path, "cgroup.subtree_control"), encoding="ascii") as file:
        enabled = file.read().split()
    if not enabled:
        report = delegation.describe_tree()
        why = report.problem or f"the running server has no cgroup whose controllers it could use ({site.path})"
        raise delegation.CgroupsUnavailable(why, report.fix or "Stop the server and start it again")
    if not os.access(site.path, os.W_OK):
        raise PermissionError(f"{site.path} belongs to another user")
    missing = {name: f"{site.path} does not hand it down" for name in cgroups.CONTROLLERS if name not in enabled}
    tree = CgroupTree(site.path, [name for name in cgroups.CONTROLLERS if name in enabled], tag="doctor", missing=missing)
    return tree, lambda: None


def _fresh_tree(root: str) -> tuple[CgroupTree, Any]:
    """The tree that a server started by this process would use. What has to be moved for it is only looked at."""
    report = delegation.describe_tree(root)
    if report.problem:
        raise delegation.CgroupsUnavailable(report.problem, report.fix)
    if report.kind == delegation.CONTAINER and len(cgroups_processes(report.root)) > 1:
        why = f"{report.root} holds other processes of this container; a server that starts moves them aside"
        raise delegation.CgroupsUnavailable(f"{why}, a check does not", "Start the server and run `ash doctor` again")
    tree = delegation.open_tree(root, "doctor")
    return tree, lambda: _give_back(tree, report.kind)


def cgroups_processes(path: str) -> list[int]:
    return [pid for pid in cgroups.find_processes(path) if pid]


def _give_back(tree: CgroupTree, kind: str) -> None:
    """Undo what `open_tree` did to the cgroup of this process. Best effort: the cgroup ends with the process anyway."""
    tree.close()
    leaf = os.path.join(tree.root, delegation.SERVER_LEAF)
    if kind in (delegation.DELEGATED, delegation.GIVEN) and os.path.isdir(leaf):
        with suppress(OSError):
            _write(os.path.join(tree.root, "cgroup.subtree_control"), " ".join(f"-{name}" for name in tree.controllers))
            _write(os.path.join(tree.root, "cgroup.procs"), str(os.getpid()))
            os.rmdir(leaf)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _try_tree(tree: CgroupTree, limits: Limits) -> Iterator[Finding]:
    limits = limits._replace(io_mb_per_second=limits.io_mb_per_second or prepare.TRIAL_RATE)
    try:
        path = tree.create(f"{os.getpid()}", limits)
    except OSError as error:
        yield Finding("cgroup", FAIL, f"no cgroup can be made in {tree.root}: {error.strerror}", delegation.AS_SERVICE)
        return
    try:
        problem = _try_process(path)
        tree.check(path, limits)
    finally:
        has_gone = cgroups.remove(path)
    if problem or not has_gone:
        yield Finding("cgroup", FAIL, f"{tree.root}: {problem or 'a cgroup that was used cannot be removed'}", delegation.AS_SERVICE)
        return
    yield Finding("cgroup", OK, f"{tree.root}: a process can be put into a cgroup, ended by it, and the cgroup be removed")
    for name in cgroups.CONTROLLERS:
        if name in tree.controllers:
            yield Finding(f"cgroup.{name}", OK, f"{_NAMES[name]}: limited")
        else:
            yield Finding(
                f"cgroup.{name}", WARN, f"{_NAMES[name]}: not limited, because {tree.missing.get(name, '')}", delegation.AS_SERVICE
            )
    if tree.lacking:
        yield Finding(
            "cgroup.files", WARN, f"this kernel does not take {'; '.join(tree.lacking)}", "use a newer kernel, with swap accounting"
        )


def _try_process(path: str) -> str:
    """What is wrong with a process in the cgroup; empty when it could be put there and ended by the cgroup alone."""
    command = [*launch_prefix(None, None, path), "/bin/sleep", "60"]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=OUTER_ENVIRONMENT
    )
    try:
        deadline = time.monotonic() + _TRIAL_TIMEOUT
        while process.pid not in cgroups_processes(path):
            if process.poll() is not None or time.monotonic() > deadline:
                return "no process can be put into a cgroup"
            time.sleep(0.01)
        cgroups.kill(path)
        process.wait(_TRIAL_TIMEOUT)
    except subprocess.TimeoutExpired:
        return "a cgroup does not end its processes"
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
    return ""


# All of it


async def check_host(kind: str, folder: str, limits: Limits, choices: Choices, *, server_pid: int, warm: int) -> list[Finding]:
    """Every check of this host. `folder` is the data folder, there or not; `server_pid` the server that runs on it, or 0."""
    if kind == "none":
        chosen = Finding("user-namespaces", WARN, prepare.NONE_WARNING, "start the server without `--sandbox none`")
        return [*check_kernel(), chosen, *check_disk(folder, limits), *check_memory(limits, warm)]
    findings = [*check_kernel()]
    place = nearest(folder)
    scratch = place if os.access(place, os.W_OK) else tempfile.gettempdir()
    try:
        findings += await check_sandbox(scratch, limits, choices)
    except (AshError, OSError) as error:
        findings.append(
            Finding("user-namespaces", UNKNOWN, f"a sandbox could not be tried: {error}", "run `ash doctor` as the server's user")
        )
    findings += await asyncio.to_thread(lambda: [*check_cgroups(choices.cgroup_root, server_pid, limits)])
    return [*findings, *check_disk(folder, limits), *check_memory(limits, warm)]
