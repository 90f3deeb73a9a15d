"""`ash policy`: what is in force on a real server, and what a file would say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ash, Done, run
from tests.harness import Server

GOOD = '[egress]\nallow = ["pypi.org"]\n[limits]\nmemory_mb = 512\n[agents.reporter.limits]\nmemory_mb = 900\n'


@pytest.fixture
def policy_file(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(GOOD)
    path.chmod(0o600)
    return path


def rows(done: Done) -> dict[str, list[str]]:
    """The lines of the table by key, their words after it."""
    return {line.split()[0]: line.split()[1:] for line in done.out.splitlines() if line.strip()}


async def test_the_policy_of_the_running_server_is_shown_with_where_each_value_comes_from(
    start_server: Callable[..., Awaitable[Server]], policy_file: Path
) -> None:
    server = await start_server(policy_file=str(policy_file))
    done = await asyncio.to_thread(run, "policy", "--server", server.url)
    assert done.code == 0, done.err
    assert done.out.startswith(f"From {policy_file}\n")
    shown = rows(done)
    assert shown["egress.allow"] == ["pypi.org", "policy"]
    assert shown["egress.deny"] == ["(none)", "default"]
    assert shown["limits.memory_mb"] == ["512", "policy"]
    assert shown["limits.cpu_percent"] == ["100", "setting"]
    assert shown["models.allow"] == ["*", "default"]
    assert shown["hooks.allow"] == ["false", "default"]
    assert shown["agents.reporter.limits.memory_mb"] == ["900", "policy"]
    assert "no hooks run yet" in done.err


async def test_a_file_that_was_refused_at_a_reload_is_said(start_server: Callable[..., Awaitable[Server]], policy_file: Path) -> None:
    server = await start_server(policy_file=str(policy_file))
    policy_file.write_text("[limits]\nmemory = 5\n")
    assert not server.parts.policies.reload()
    done = await asyncio.to_thread(run, "policy", "--server", server.url)
    assert rows(done)["limits.memory_mb"] == ["512", "policy"]
    assert "the policy above stays in force" in done.err
    assert "line 2: there is no key 'memory'" in done.err
    answer = json.loads((await asyncio.to_thread(run, "policy", "--json", "--server", server.url)).out)
    assert answer["policy"]["egress"]["allow"] == ["pypi.org"]
    assert "memory" in answer["problem"]


async def test_without_a_file_it_says_so(server: Server) -> None:
    done = await asyncio.to_thread(run, "policy", "--server", server.url)
    assert done.out.startswith("No policy file")


def test_a_good_file_is_checked_without_a_server(call: Ash, policy_file: Path) -> None:
    done = call("policy", "--check", str(policy_file))
    assert done.code == 0
    assert "can be used" in done.out
    assert rows(done)["egress.allow"] == ["pypi.org", "policy"]
    shown = json.loads(call("policy", "--check", str(policy_file), "--json").out)
    assert (shown["problem"], shown["policy"]["limits"]["memory_mb"]) == (None, 512)


def test_a_bad_file_is_named_with_line_and_key_and_exit_code_2(call: Ash, policy_file: Path) -> None:
    policy_file.write_text("[egress]\nalow = []\n")
    done = call("policy", "--check", str(policy_file))
    assert (done.code, done.out) == (2, "")
    assert f"{policy_file} line 2: there is no key 'alow' in [egress]; did you mean 'allow'?" in done.err
    assert "No such file" in call("policy", "--check", "/no/such/policy.toml").err
    assert call("policy", "--check", "").code == 2
