"""The filter of system calls at work: what it refuses in real sandboxes, that it is the filter which refuses, and what still works."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ash.errors import IsolationUnavailable
from ash.isolation.prepare import Isolation
from ash.isolation.seccomp import ALLOW, RULES
from ash.isolation.syscalls import NUMBERS
from tests.integration.boxes import MACHINE, isolating, run_boxed, try_calls
from tests.integration.programs import PROGRAMS
from tests.integration.refused_calls import CALLS, TELLING
from tests.sandboxes import open_pool

PROJECT = Path(__file__).parents[2]
NOBODY = 65534
HERE = [name for name, (call, _, _) in CALLS.items() if call in NUMBERS.get(MACHINE, {})]
pytestmark = [
    pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed"),
    pytest.mark.skipif(MACHINE not in NUMBERS, reason=f"no filter for {MACHINE}"),
]


@pytest.fixture(scope="module")
def answers() -> dict[str, dict[str, Any]]:
    """The kernel's answers to every call, with the filter and without it."""

    async def ask() -> dict[str, dict[str, Any]]:
        with tempfile.TemporaryDirectory(prefix="ash-") as data_dir:
            async with isolating(data_dir) as isolation:
                return {"with": try_calls(isolation), "without": try_calls(isolation, filtered=False)}

    try:
        return asyncio.run(ask())
    except IsolationUnavailable as error:
        pytest.skip(str(error))


# What is refused


@pytest.mark.parametrize("name", HERE)
def test_the_filter_refuses(name: str, answers: dict[str, dict[str, Any]]) -> None:
    assert answers["with"]["calls"][name] == CALLS[name][2]


@pytest.mark.parametrize("name", sorted(TELLING & set(HERE)))
def test_without_the_filter_the_kernel_answers_otherwise(name: str, answers: dict[str, dict[str, Any]]) -> None:
    assert answers["without"]["calls"][name] != CALLS[name][2]


def test_every_refusing_rule_is_attacked() -> None:
    attacked = {call for call, _, _ in CALLS.values()}
    refusing = [rule for rule in RULES if rule.action != ALLOW and "without a call" not in rule.why]
    assert [rule.calls for rule in refusing if not attacked & set(rule.calls.split())] == []


@pytest.mark.skipif(MACHINE != "x86_64", reason="a second and a third calling convention exist on x86-64 only")
def test_calls_of_another_convention_end_the_program(answers: dict[str, dict[str, Any]]) -> None:
    assert (answers["with"]["x32"], answers["with"]["i386"]) == ("SIGSYS", "SIGSYS")
    assert "SIGSYS" not in (answers["without"]["x32"], answers["without"]["i386"])


def test_a_user_keyring_that_sandboxes_would_share_is_out_of_reach(answers: dict[str, dict[str, Any]]) -> None:
    """Under an ordinary user's server it would hold that user's own keys."""
    assert answers["with"]["calls"]["find the user's keyring"] == "EPERM"
    assert answers["without"]["calls"]["find the user's keyring"] in ("done", "ENOSYS")


# Where it is in force


async def test_the_bridge_its_tools_and_the_first_process_all_have_the_filter(data_dir: str) -> None:
    async with open_pool(data_dir) as pool:
        if pool.status().isolation == "unavailable":
            pytest.skip(pool.status().warnings[0])
        sandbox = await pool.take()
        found = await sandbox.exec("grep -h '^Seccomp:' /proc/[0-9]*/status | sort -u; ls -d /proc/[0-9]* | wc -l")
        assert found.stdout.split()[:2] == ["Seccomp:", "2"]
        assert int(found.stdout.split()[2]) >= 3
        refused = await sandbox.exec("python3 -I -c 'import socket; socket.socket(40, 1)'")
        assert "Address family not supported" in refused.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: becomes another user")
def test_sandboxes_of_an_ordinary_user_have_the_same_filter() -> None:
    with tempfile.TemporaryDirectory(prefix="ash-code-") as copy:
        for name in ("ash", "tests"):
            shutil.copytree(PROJECT / name, Path(copy, name), ignore=shutil.ignore_patterns("__pycache__"))
        os.chmod(copy, 0o755)
        command = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups", "/usr/bin/python3", "-B", "-m"]
        done = subprocess.run([*command, "tests.integration.boxes"], capture_output=True, text=True, cwd=copy, timeout=120, check=False,
                              env={"PATH": os.defpath, "HOME": "/nonexistent"})  # fmt: skip
    if "IsolationUnavailable" in done.stderr:
        pytest.skip(f"this host cannot isolate for ordinary users: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    calls = json.loads(done.stdout)["calls"]
    assert {name: calls[name] for name in HERE} == {name: CALLS[name][2] for name in HERE}


# What still works


@pytest.fixture
def isolation(data_dir: str) -> Iterator[Isolation]:
    runner, opened = asyncio.Runner(), isolating(data_dir)
    with runner:
        try:
            yield runner.run(opened.__aenter__())
        except IsolationUnavailable as error:
            pytest.skip(str(error))
        finally:
            runner.run(opened.__aexit__(None, None, None))


@pytest.mark.parametrize("name", PROGRAMS)
def test_ordinary_programs_do_not_notice_the_filter(name: str, isolation: Isolation) -> None:
    if not os.access(f"/usr/bin/{name}", os.X_OK):
        pytest.skip(f"{name} is not installed under /usr/bin")
    done = run_boxed(isolation, "/bin/bash", "-c", f"mkdir /tmp/work && cd /tmp/work && export HOME=/tmp && {PROGRAMS[name]}")
    assert done.returncode == 0, done.stdout + done.stderr


# Debuggers

TRACE = """
import ctypes, os, signal
libc, child = ctypes.CDLL(None), os.fork()
if child == 0:
    libc.ptrace(0, 0, 0, 0)
    os.kill(os.getpid(), signal.SIGSTOP)
    os._exit(0)
os.waitpid(child, os.WUNTRACED)
traced = libc.ptrace(24, child, None, None) == 0
os.kill(child, signal.SIGKILL)
raise SystemExit(not traced)
"""


@pytest.mark.parametrize("allowed", [False, True])
async def test_programs_trace_each_other_only_where_the_setting_allows_it(data_dir: str, allowed: bool) -> None:
    try:
        async with isolating(data_dir, ptrace=allowed) as isolation:
            done = run_boxed(isolation, "/usr/bin/python3", "-I", "-c", TRACE)
            assert (done.returncode == 0) == allowed, done.stderr
            calls = try_calls(isolation)["calls"]
    except IsolationUnavailable as error:
        pytest.skip(str(error))
    changed = {name for name in HERE if calls[name] != CALLS[name][2]}
    assert changed == ({"trace a process", "read a process's memory", "write a process's memory"} if allowed else set())
