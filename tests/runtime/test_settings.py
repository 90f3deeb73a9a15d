"""What the agent's folder says: prompt, permissions, environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ash.runtime.paths import Paths, tool_environ
from ash.runtime.prompt import DEFAULT_PROMPT, read_prompt, system_prompt
from ash.runtime.settings import Settings, read_settings


def write(paths: Paths, text: str, name: str = "settings.json") -> Settings:
    folder = Path(paths.agent) / ".claude"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return read_settings(paths.agent)


def test_without_a_file_there_are_no_rules(paths: Paths) -> None:
    assert read_settings(paths.agent) == Settings()


def test_rules_mode_and_environment_are_read(paths: Paths) -> None:
    value = {"permissions": {"allow": ["A"], "deny": ["B"], "ask": ["C"], "defaultMode": "plan"}, "env": {"X": "1", "N": 2}, "other": [1]}
    found = write(paths, json.dumps(value))
    assert (found.allow, found.deny, found.ask, found.default_mode) == (("A",), ("B",), ("C",), "plan")
    assert found.env == {"X": "1", "N": "2"}
    assert found.problem is None


def test_the_local_file_adds_to_the_shared_one(paths: Paths) -> None:
    write(paths, '{"permissions": {"deny": ["A"]}, "env": {"X": "1", "Y": "1"}}')
    found = write(paths, '{"permissions": {"deny": ["B"]}, "env": {"X": "2"}}', "settings.local.json")
    assert found.deny == ("A", "B")
    assert found.env == {"X": "2", "Y": "1"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{\n"permissions": {,}}', "settings.json line 2 column 17"),
        ("[]", "must be a JSON object"),
        ('{"permissions": []}', "permissions must be an object"),
        ('{"permissions": {"deny": "Bash"}}', "permissions.deny must be a list of strings"),
        ('{"permissions": {"deny": [1]}}', "permissions.deny must be a list of strings"),
        ('{"env": {"A": true}}', "env.A must be a string"),
        ('{"env": {"A=B": "x"}}', "environment variable"),
        ("[" * 100_000, "settings.json"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(paths: Paths, text: str, words: str) -> None:
    found = write(paths, text)
    assert found.problem is not None
    assert words in found.problem


def test_an_empty_file_and_a_byte_order_mark_are_fine(paths: Paths) -> None:
    assert write(paths, "").problem is None
    assert write(paths, '\ufeff{"permissions": {"deny": ["A"]}}').deny == ("A",)


@pytest.mark.parametrize(
    ("option", "file", "expected"),
    [("mine", "file", "mine"), (None, "file", "file"), (None, None, DEFAULT_PROMPT), ("", "file", DEFAULT_PROMPT)],
)
def test_the_session_s_prompt_wins_over_the_folder_s(paths: Paths, option: str | None, file: str | None, expected: str) -> None:
    if file is not None:
        (Path(paths.agent) / "CLAUDE.md").write_text(file)
    assert system_prompt(option, paths, "2026-01-01")[0] == expected


def test_the_environment_of_tools_is_built_from_nothing(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.delenv("PATH")
    agent: dict[str, Any] = {"A": "agent", "B": "agent", "ANTHROPIC_API_KEY": "x", "CLAUDE_CODE_Y": "x"}
    env = tool_environ(paths, agent, {"B": "session"})
    assert (env["A"], env["B"], env["HOME"]) == ("agent", "session", paths.home)
    assert "/usr/bin" in env["PATH"]
    assert not {"SECRET", "ANTHROPIC_API_KEY", "CLAUDE_CODE_Y"} & set(env)


def test_paths_start_at_the_workspace(paths: Paths) -> None:
    assert paths.resolve("a/../b") == f"{paths.workspace}/b"
    assert paths.resolve("~/x") == f"{paths.home}/x"
    assert paths.resolve("/etc/./x") == "/etc/x"


def test_a_prompt_brings_the_files_it_imports(paths: Paths) -> None:
    folder = Path(paths.agent)
    (folder / "docs").mkdir()
    (folder / "CLAUDE.md").write_text("Main. See @docs/a.md, `@docs/code.md` and me@docs/a.md or @nobody.\n```\n@docs/code.md\n```\n")
    (folder / "docs" / "a.md").write_text("A, with @b.md.")
    (folder / "docs" / "b.md").write_text("B, with @a.md again.")
    (folder / "docs" / "code.md").write_text("not imported")
    found = read_prompt(paths.agent)
    assert found.startswith("Main. See")
    assert found.endswith("Contents of docs/a.md:\n\nA, with @b.md.\n\nContents of docs/b.md:\n\nB, with @a.md again.")
    assert "not imported" not in found


def test_a_prompt_imports_nothing_from_outside_its_folder(paths: Paths) -> None:
    folder = Path(paths.agent)
    (folder.parent / "secret.md").write_text("secret")
    (folder / "link.md").symlink_to("../secret.md")
    (folder / "CLAUDE.md").write_text(f"@../secret.md @{folder.parent}/secret.md @link.md")
    assert "\n" not in read_prompt(paths.agent)
