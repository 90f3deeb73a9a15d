"""`ash deploy`: names, variables, progress and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ash.cli.deploy import read_env
from ash.errors import InvalidRequest
from tests.cli.conftest import Ash
from tests.cli.stub_server import StubServer


def test_deploying_twice_counts_the_version_up(ash: Ash, stub: StubServer, agent_folder: Path) -> None:
    assert ash("deploy", str(agent_folder)) == (0, 'Deployed agent "my-folder" (v1)\n', "")
    assert ash("deploy", str(agent_folder), "--name", "my-folder").out == 'Deployed agent "my-folder" (v2)\n'
    assert json.loads(ash("deploy", str(agent_folder), "--json").out)["version"] == 3


def test_a_name_is_made_of_the_folder_and_told_when_it_changes(ash: Ash, stub: StubServer, agent_folder: Path) -> None:
    renamed = agent_folder.rename(agent_folder.parent / "my agent (2)")
    done = ash("deploy", str(renamed))
    assert done.err == "Normalized agent name: my-agent-2\n"
    assert "my-agent-2" in stub.agents


def test_variables_come_from_env_files_and_flags(ash: Ash, stub: StubServer, agent_folder: Path) -> None:
    (agent_folder / ".env").write_text("A=1\nB=1\nC=1\n")
    (agent_folder / ".env.local").write_text("B=2\nC=2\n")
    done = ash("deploy", str(agent_folder), "-e", "C=3")
    assert stub.agents["my-folder"]["env"] == {"A": "1", "B": "2", "C": "3"}
    assert list(stub.agents["my-folder"]["files"]) == ["CLAUDE.md"]
    assert done.out.endswith("  env: A, B, C\n")
    assert done.err == "Loaded 3 env var(s) from .env\nLoaded 2 env var(s) from .env.local\n"


def test_what_the_server_does_not_use_yet_is_named(ash: Ash, agent_folder: Path) -> None:
    (agent_folder / ".claude" / "skills").mkdir(parents=True)
    (agent_folder / ".claude" / "skills" / "x.md").write_text("x")
    assert ash("deploy", str(agent_folder)).err == "Not used yet: .claude/skills/\n"


def test_env_files_know_quotes_comments_and_export(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("# all\n\nexport A=1 # one\nB='x # y'\nC=\"a\\nb\"\nD=\nE=a=b\n")
    assert read_env(str(file)) == {"A": "1", "B": "x # y", "C": "a\nb", "D": "", "E": "a=b"}


def test_a_bad_line_of_an_env_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("A=1\nnonsense\n")
    with pytest.raises(InvalidRequest, match="line 2"):
        read_env(str(file))


def test_a_folder_without_instructions_is_refused(ash: Ash, stub: StubServer, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = ash("deploy", str(tmp_path / "empty"))
    assert done.code == 1
    assert "CLAUDE.md" in done.err
    assert stub.requests == []


def test_limits_become_the_agents_configuration(ash: Ash, stub: StubServer, agent_folder: Path) -> None:
    ash("deploy", str(agent_folder))
    assert "config" not in stub.posts("/api/agents")[-1], "without any the agent keeps those it has"
    ash("deploy", str(agent_folder), "--limit", "memory_mb=512", "--limit", "turn-timeout=2.5", "--limit", "diskMb=7")
    assert stub.posts("/api/agents")[-1]["config"] == {"limits": {"memoryMb": 512, "turnTimeout": 2.5, "diskMb": 7}}


@pytest.mark.parametrize("wrong", ["memory_mb", "memory_mb=lots", "=5", "memory_mb=nan"])
def test_a_limit_that_is_none_is_a_usage_error(ash: Ash, agent_folder: Path, wrong: str) -> None:
    assert ash("deploy", str(agent_folder), "--limit", wrong).code == 2
