"""Permission rules and modes: what may run, and what the model is told."""

from __future__ import annotations

import os
from typing import Any

import pytest

from ash.runtime.paths import Paths
from ash.runtime.permissions import Permissions, parse_rule
from ash.runtime.settings import Settings
from ash.runtime.tools import TOOLS


def denial(permissions: Permissions, tool: str, **given: Any) -> str | None:
    is_read_only = tool in TOOLS and TOOLS[tool].is_read_only
    return permissions.denial(tool, given, is_read_only=is_read_only)


def strict(paths: Paths, *allowed: str, **lists: Any) -> Permissions:
    return Permissions(Settings(**lists), paths, mode="default", allowed=allowed)


def allows(paths: Paths, rule: str, command: str) -> bool:
    return denial(strict(paths, rule), "Bash", command=command) is None


def denies(paths: Paths, rule: str, command: str) -> bool:
    return denial(Permissions(Settings(deny=(rule,)), paths), "Bash", command=command) is not None


# Commands


@pytest.mark.parametrize(
    ("rule", "command"),
    [
        ("Bash", "anything; at all"),
        ("Bash(*)", "anything; at all"),
        ("Bash(npm run test)", "npm run test"),
        ("Bash(npm run test)", "npm  run   test"),
        ("Bash(npm run:*)", "npm run build"),
        ("Bash(npm run:*)", "npm run"),
        ("Bash(npm run *)", "npm run build --x"),
        ("Bash(npm run *)", "npm run"),
        ("Bash(git * main)", "git push origin main"),
        ("Bash(npm:*)", "cd sub && npm test 2>&1"),
        ("Bash(npm:*)", "npm test > /dev/null"),
        ("Bash(npm:*)", "timeout 60 npm test"),
        ("Bash(npm:*)", "for i in 1 2; do npm test; done"),
        ("Bash(cd x && npm test)", "cd x && npm test"),
    ],
)
def test_an_allowed_command_runs(paths: Paths, rule: str, command: str) -> None:
    assert allows(paths, rule, command)


@pytest.mark.parametrize(
    ("rule", "command"),
    [
        ("Bash(npm run test)", "npm run test2"),
        ("Bash(npm run test)", "npm run test --x"),
        ("Bash(npm run:*)", "npm runx"),
        ("Bash(ls *)", "lsof"),
        ("Bash(git status:*)", "git status; rm -rf /"),
        ("Bash(git status:*)", "git status && rm x"),
        ("Bash(git status:*)", "git status | sh"),
        ("Bash(git status:*)", "git status\nrm x"),
        ("Bash(git status:*)", "git status & rm x"),
        ("Bash(git status:*)", "git status $(rm x)"),
        ("Bash(git status:*)", "git status `rm x`"),
        ("Bash(git status:*)", 'git status "$(rm x)"'),
        ("Bash(git status:*)", "git status <(rm x)"),
        ("Bash(git status:*)", "git status > .bashrc"),
        ("Bash(git status:*)", "git status >> $FILE"),
        ("Bash(git status:*)", "X=1 git status"),
        ("Bash(git status:*)", "PATH=. ; git status"),
        ("Bash(git status:*)", "git() { rm x; }; git status"),
        ("Bash(git status:*)", "alias git=rm; git status"),
        ("Bash(git status:*)", "git status 'unbalanced"),
        ("Bash(git status:*)", "{ git status; rm x; }"),
        ("Bash(git status:*)", "(git status; rm x)"),
        ("Bash(git status:*)", "git status <<E\n$(rm x)\nE"),
        ("Bash(git status:*)", "if git status; then rm x; fi"),
        ("Bash(git status:*)", "git status $((a[$(rm x)]))"),
        ("Bash(git status:*)", ""),
        ("Bash(git status", "git status"),
    ],
)
def test_a_rule_allows_nothing_beyond_its_command(paths: Paths, rule: str, command: str) -> None:
    assert not allows(paths, rule, command)


@pytest.mark.parametrize(
    "command",
    [
        "rm",
        "rm -rf x",
        "x && rm y",
        "x; rm y",
        "x | rm",
        "echo $(rm x)",
        "bash -c 'rm x'",
        "/bin/rm x",
        "A=1 rm x",
        "find . -exec rm {} +",
        "rm 'unbalanced",
    ],
)
def test_a_denied_command_is_caught_wherever_it_stands(paths: Paths, command: str) -> None:
    assert denies(paths, "Bash(rm:*)", command)


@pytest.mark.parametrize("command", ["echo rm", "npm run rm-x", "ls farm", "cat <<'E'\nrm x\nE", "git rm-x", "echo 'rm x'"])
def test_a_denied_word_elsewhere_is_not_the_command(paths: Paths, command: str) -> None:
    assert not denies(paths, "Bash(rm:*)", command)


def test_a_denial_that_is_no_rule_denies_the_whole_tool(paths: Paths) -> None:
    assert denies(paths, "Bash(rm", "ls")


def test_a_redirection_into_a_file_follows_the_rules_for_editing(paths: Paths) -> None:
    allowed = strict(paths, "Bash(echo:*)", "Edit(out/**)")
    assert denial(allowed, "Bash", command="echo x > out/a") is None
    assert denial(allowed, "Bash", command="echo x > other") is not None
    denied = Permissions(Settings(deny=("Edit(.env)", "Read(secrets/**)")), paths)
    assert denial(denied, "Bash", command="echo x > .env") is not None
    assert denial(denied, "Bash", command="cat < secrets/key") is not None


# Files


@pytest.mark.parametrize(
    ("rule", "path", "is_denied"),
    [
        ("Read(./secrets/**)", "secrets/key", True),
        ("Read(./secrets/**)", "./a/../secrets/x/y", True),
        ("Read(./secrets/**)", "other/secrets/key", False),
        ("Read(./secrets)", "secrets/key", True),
        ("Read(secrets/)", "x/secrets/key", True),
        ("Read(.env)", "deep/down/.env", True),
        ("Read(./.env)", "deep/.env", False),
        ("Read(.env.*)", ".env.local", True),
        ("Read(*.pem)", "keys/a.pem", True),
        ("Read(src/*.py)", "src/a.py", True),
        ("Read(src/*.py)", "src/x/a.py", False),
        ("Read(src/**/*.py)", "src/x/y/a.py", True),
        ("Read(/src/a.py)", "src/a.py", True),
        ("Read(//etc/passwd)", "/etc/passwd", True),
        ("Read(~/.ssh/**)", "~/.ssh/id", True),
        ("Read({a,b}.txt)", "b.txt", True),
        ("Read", "anything", True),
        ("Read(**)", "anything", True),
        ("Edit(x)", "x", False),
    ],
)
def test_path_rules_follow_gitignore(paths: Paths, rule: str, path: str, is_denied: bool) -> None:
    permissions = Permissions(Settings(deny=(rule,)), paths)
    assert (denial(permissions, "Read", file_path=path) is not None) == is_denied


def test_a_path_rule_holds_for_the_agent_s_own_copy_too(paths: Paths) -> None:
    permissions = Permissions(Settings(deny=("Read(./secrets/**)",)), paths)
    assert denial(permissions, "Read", file_path=f"{paths.agent}/secrets/key") is not None


def test_a_link_does_not_lead_around_a_rule(paths: Paths) -> None:
    os.makedirs(f"{paths.workspace}/secrets")
    os.symlink("secrets", f"{paths.workspace}/open")
    permissions = Permissions(Settings(deny=("Read(./secrets/**)",)), paths)
    assert denial(permissions, "Read", file_path="open/key") is not None
    assert denial(strict(paths, "Edit(open/**)"), "Write", file_path="open/key") is not None


def test_read_rules_cover_searches_and_edit_rules_cover_writing(paths: Paths) -> None:
    permissions = Permissions(Settings(deny=("Read(./secrets)", "Edit(*.lock)")), paths)
    assert denial(permissions, "Grep", pattern="x", path="secrets") is not None
    assert denial(permissions, "Glob", pattern="x", path="secrets") is not None
    assert denial(permissions, "Write", file_path="a.lock", content="") is not None
    assert not permissions.can_read(f"{paths.workspace}/secrets/key")
    assert permissions.can_read(f"{paths.workspace}/open")


# Modes


@pytest.mark.parametrize(
    ("mode", "allowed"),
    [
        ("bypassPermissions", {"Read", "TodoWrite", "Write", "Bash"}),
        ("default", {"Read", "TodoWrite"}),
        ("permissionsByAgent", {"Read", "TodoWrite"}),
        ("dontAsk", {"Read", "TodoWrite"}),
        ("acceptEdits", {"Read", "TodoWrite", "Write"}),
        ("plan", {"Read", "TodoWrite"}),
        ("unheard of", {"Read", "TodoWrite"}),
    ],
)
def test_what_each_mode_allows_without_rules(paths: Paths, mode: str, allowed: set[str]) -> None:
    permissions = Permissions(Settings(), paths, mode=mode)
    calls: dict[str, dict[str, Any]] = {"Read": {"file_path": "x"}, "TodoWrite": {}, "Write": {"file_path": "x"}, "Bash": {"command": "x"}}
    assert {tool for tool, given in calls.items() if denial(permissions, tool, **given) is None} == allowed


def test_accepted_edits_stay_in_the_workspace(paths: Paths) -> None:
    permissions = Permissions(Settings(), paths, mode="acceptEdits")
    assert denial(permissions, "Write", file_path="/etc/x") is not None
    assert denial(permissions, "Write", file_path="../home/x") is not None


def test_deny_wins_over_ask_and_ask_over_allow(paths: Paths) -> None:
    permissions = strict(paths, deny=("Bash(a:*)",), ask=("Bash(a:*)", "Bash(b:*)"), allow=("Bash",))
    assert "denied by the rule" in str(denial(permissions, "Bash", command="a"))
    assert "asks for an approval" in str(denial(permissions, "Bash", command="b"))
    assert denial(permissions, "Bash", command="c") is None


def test_allow_does_not_open_plan_mode(paths: Paths) -> None:
    assert denial(Permissions(Settings(allow=("Bash",)), paths, mode="plan"), "Bash", command="x") is not None


def test_deny_holds_in_every_mode(paths: Paths) -> None:
    permissions = Permissions(Settings(deny=("Bash(rm:*)",)), paths, mode="bypassPermissions")
    assert denial(permissions, "Bash", command="rm x") is not None


def test_the_session_s_mode_wins_over_the_folder_s(paths: Paths) -> None:
    assert Permissions(Settings(default_mode="bypassPermissions"), paths, mode="default").mode == "default"
    assert Permissions(Settings(default_mode="plan"), paths).mode == "plan"
    assert Permissions(Settings(), paths).mode == "bypassPermissions"


def test_a_list_of_what_is_allowed_rules_out_the_rest_unless_a_mode_is_named(paths: Paths) -> None:
    assert Permissions(Settings(), paths, allowed=["Bash"]).mode == "default"
    assert Permissions(Settings(), paths, allowed=["Bash"], mode="bypassPermissions").mode == "bypassPermissions"
    assert Permissions(Settings(default_mode="acceptEdits"), paths, allowed=["Bash"]).mode == "acceptEdits"
    assert Permissions(Settings(), paths, allowed=[]).mode == "bypassPermissions"
    assert Permissions(Settings(default_mode="bypassPermissions"), paths, allowed=["Bash"]).mode == "default"


def test_a_folder_may_rule_out_bypassing(paths: Paths) -> None:
    assert Permissions(Settings(forbids_bypass=True), paths, mode="bypassPermissions").mode == "default"


def test_a_call_that_is_not_granted_is_told_how_it_could_be(paths: Paths) -> None:
    assert "allowedTools" in str(denial(strict(paths), "Bash", command="x"))


def test_unreadable_settings_deny_everything(paths: Paths) -> None:
    permissions = Permissions(Settings(problem="settings.json line 3: x"), paths, mode="bypassPermissions", allowed=["Read"])
    assert "line 3" in str(denial(permissions, "Read", file_path="x"))


def test_a_tool_is_hidden_only_when_it_is_denied_altogether(paths: Paths) -> None:
    permissions = Permissions(Settings(deny=("Bash(rm:*)",)), paths, disallowed=["Write", "mcp__git"])
    offered = {name: permissions.offers(name) for name in ("Bash", "Write", "mcp__git__push", "mcp__gitx__push")}
    assert offered == {"Bash": True, "Write": False, "mcp__git__push": False, "mcp__gitx__push": True}


@pytest.mark.parametrize("text", ["Bash", "Bash()", "Bash(*)", "Bash(:*)"])
def test_rules_about_a_whole_tool_have_no_specifier(text: str) -> None:
    rule = parse_rule(text)
    assert rule is not None
    assert rule.spec is None


@pytest.mark.parametrize("text", ["mcp__git__push", "mcp__git", "mcp__git__*", "mcp__*"])
def test_mcp_rules_cover_their_tools(text: str) -> None:
    rule = parse_rule(text)
    assert rule is not None
    assert rule.covers("mcp__git__push")


@pytest.mark.parametrize("text", ["", "Bash(x", "(x)", "a b"])
def test_what_is_no_rule_is_not_parsed(text: str) -> None:
    assert parse_rule(text) is None
