"""Permission rules and modes: what may run, and what the model is told."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
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


_T = "$(touch pwned)"
HIDDEN = [
    "for x do touch pwned; done",
    "for x { touch pwned; }",
    "time for x do touch pwned; done",
    "for x in 1; do touch pwned; done",
    f""": "${{x:-'{_T}'}}" """,
    f""": "${{x-'{_T}'}}" """,
    f""": "${{x:='{_T}'}}" """,
    f""": "${{x+'}}{_T}'}}" """,
    f"""HOME=; : "${{HOME:-'{_T}'}}" """,
    f""": <<E\n${{x:-'{_T}'}}\nE""",
    f""": <<< "${{x:-'{_T}'}}" """,
    f""": $(( ${{x:-'a[{_T}]'}} ))""",
    ': "`: \\"\'\\"; touch pwned; : \\"\'\\"`"',
    ": `touch pwned`",
    ": `: \\`touch pwned\\``",
    f"test -v 'a[{_T}]'",
    f"[ -v 'a[{_T}]' ]",
    f"[ ! -v 'a[{_T}]' ]",
    f"[ a = a -a -v 'a[{_T}]' ]",
    f"if [ -v 'a[{_T}]' ]; then :; fi",
    f"time test -v 'a[{_T}]'",
    f"for o in -v; do test $o 'a[{_T}]'; done",
    f"for o in -v; do test \"$o\" 'a[{_T}]'; done",
    "for o in '-v a[$(touch${IFS}pwned)]'; do [ $o ]; done",
    f"test -{{v,v}} 'a[{_T}]' -o -v 'a[{_T}]'",
    f"""for x in '{_T}'; do : "${{x@P}}"; done""",
    f"for i in 'a[{_T}]'; do : $[i]; done",
    f"for i in 'a[{_T}]'; do : \"$[i]\"; done",
    f"for i in 'a[{_T}]'; do : $((i)); done",
    f"for i in 'a[{_T}]'; do ((i)); done",
    f"for npm in 'a[{_T}]'; do ((npm)); done",
    f"for i in 'a[{_T}]'; do : ${{PWD:i}}; done",
    f"for i in 'a[{_T}]'; do : ${{PWD:0:i}}; done",
    f"for i in 'a[{_T}]'; do : ${{!i}}; done",
    f"for i in 'a[{_T}]'; do : <<E\n$[i]\nE\ndone",
    f"for i in 'a[{_T}]'; do [[ i -eq 0 ]]; done",
    "coproc touch pwned",
    "coproc npm { touch pwned; }",
    "time coproc npm { touch pwned; }",
    ": $\\\n(touch pwned)",
    ': "$\\\n(touch pwned)"',
    ": <<E\n$\\\n(touch pwned)\nE",
    ": <<E\na\\\nE\n: '\nE\ntouch pwned\n: '",
    "npm() { touch pwned; }; npm",
    "function npm { touch pwned; }; npm",
    "case x in x) touch pwned;; esac",
    "for PATH in .; do npm; done",
    "PATH=. npm",
    "{PATH}</dev/null npm; touch pwned",
    "trap 'touch pwned' EXIT",
    "eval 'touch pwned'",
    "'eval' 'touch pwned'",
    "\\. ./npm",
    "exec ./npm",
    "nice 5evil npm; touch pwned",
    f"wait -n -p 'a[{_T}]' & wait -n -p 'a[{_T}]'",
    f"printf -v 'a[{_T}]' x",
    f"time printf -v 'a[{_T}]' x",
    f"for o in -v; do printf $o 'a[{_T}]' x; done",
    f"unset 'a[{_T}]'",
    f": $'\\047' {_T} $'\\047'",
    f': $"{_T}"',
    ": | touch pwned",
    ": & touch pwned",
    ": |& touch pwned",
    ": <(touch pwned); wait; for i in 1 2; do pwd; done",
    "(:; (touch pwned))",
    "while touch pwned; do exit; done",
    "until ! touch pwned; do exit; done",
    "{ touch pwned; }",
    ": #'\ntouch pwned #'",
    ": > pwned",
    ": >&pwned",
    ": >& pwned",
    ": &>pwned",
    ": >|pwned",
    ": <>pwned",
    ": 2>>pwned",
    "{ :; } > pwned",
    "for x in 1; do :; done > pwned",
    ": {fd}> pwned",
    "for x in pwned; do : > $x; done",
]


@pytest.mark.parametrize("command", HIDDEN)
@pytest.mark.parametrize("rules", [("Read",), ("Bash(npm:*)", "Bash(printf:*)", "Bash(unset:*)", "Bash(coproc)")], ids=["none", "some"])
def test_what_a_command_hides_needs_a_rule_of_its_own(paths: Paths, command: str, rules: tuple[str, ...]) -> None:
    assert denial(strict(paths, *rules), "Bash", command=command) is not None


def test_what_is_hidden_does_run_where_nobody_stops_it(paths: Paths) -> None:
    """Else the test above would prove nothing. What stays without effect is a form that other versions of the shell run."""
    Path(paths.workspace, "npm").write_text("#!/bin/sh\n/usr/bin/touch pwned\n")
    Path(paths.workspace, "npm").chmod(0o755)
    without_effect = [command for command in HIDDEN if not _touches(paths.workspace, command)]
    assert len(without_effect) < len(HIDDEN) / 8, without_effect


def _touches(folder: str, command: str) -> bool:
    canary = Path(folder, "pwned")
    canary.unlink(missing_ok=True)
    subprocess.run(["bash", "-c", command], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=5, check=False)
    return canary.exists()


@pytest.mark.parametrize(
    "command",
    [
        "ls >&2file", "ls >&2\\\nfile", "cd / && pwd > f", "cd ..; pwd > f", "pushd / && pwd > f",
        "pwd > ~+/../f", "pwd > ~/f", "pwd > ~-/f",
        "pwd > $HOME/f", "pwd > ../f", "pwd > {a,../f}", "(cd ..; pwd > f)", "if cd /; then pwd; fi > f", "builtin cd / && pwd > f",
        "pwd > /dev/tcp/127.0.0.1/9",
    ],
)  # fmt: skip
def test_a_redirection_never_leads_out_of_the_workspace(paths: Paths, command: str) -> None:
    permissions = Permissions(Settings(), paths, mode="acceptEdits", allowed=["Bash(ls)", "Bash(builtin cd:*)", "Bash(pushd:*)"])
    is_inside = command == "ls >&2file"
    assert (denial(permissions, "Bash", command=command) is None) == is_inside
    assert denial(strict(paths, "Bash(ls)", "Bash(pwd)"), "Bash", command=command) is not None


def test_a_redirection_means_the_folder_that_an_earlier_call_went_to(paths: Paths) -> None:
    accepting = Permissions(Settings(), paths, mode="acceptEdits")
    given = {"command": "pwd > f"}
    assert accepting.denial("Bash", given, is_read_only=False, folder=f"{paths.workspace}/sub") is None
    assert accepting.denial("Bash", given, is_read_only=False, folder="/") is not None
    denying = Permissions(Settings(deny=("Edit(sub/f)",)), paths)
    assert denying.denial("Bash", given, is_read_only=False, folder=f"{paths.workspace}/sub") is not None
    assert denial(denying, "Bash", command="cd sub && pwd > f") is not None


@pytest.mark.parametrize(
    "command", ["[ -f x ] && pwd", "test -d a/b", "wait 12", "exit 3", "cd x; pwd 2>/dev/null", "time for x in a; do :; done"]
)
def test_what_only_concerns_the_shell_needs_no_rule(paths: Paths, command: str) -> None:
    assert denial(strict(paths), "Bash", command=command) is None


@pytest.mark.parametrize(
    "command",
    [
        "timeout -s KILL 5 rm x", "timeout --kill-after 3 5 rm x", "timeout 1.5s rm x", "sudo rm x", "sudo -u bob -n rm x", "sudo -- rm x",
        "env A=1 rm x", "env -u A -i rm x", "env -C /tmp -i rm x", "env -S 'rm x'", "nohup rm x", "command -p -- rm x", "time rm x",
        "time -p rm x", "setsid -w rm x", "stdbuf -oL rm x", "ionice -c 3 rm x", "unshare rm x", "chroot / rm x", "flock f rm x",
        "xargs -a f -n1 rm", "ls | xargs rm x", "ls | xargs -I {} rm {}", "xargs -d '\\n' rm",
        "find . -exec rm x ';'", "find . -exec env rm {} +",
        "find . -exec sh -c 'rm x' \\;", "find . -execdir /bin/rm {} \\;", "find . -ok rm {} \\;", "for x do rm y; done",
        "function f { rm x; }; f", "f() { rm x; }; f", "coproc NAME { rm x; }", "coproc rm x", "trap 'rm x' EXIT", "sh -c 'rm x'",
        "bash -lc 'a; rm x'", "bash -o errexit -c 'rm x'", "sudo sh -c 'rm x'", "sudo bash -c \"sh -c 'r\\\"m\\\" x'\"", "eval 'rm x'",
        "eval rm x", "builtin eval 'rm x'", "A=1 sudo rm x", "! sudo rm x", "echo rm x | sh", "echo rm x | sudo bash", "bash <<< 'rm x'",
        "{rm,x}", "case a in a) rm x;; esac", ": \"${x:-'$(rm x)'}\"", "if true; then rm x; fi", "x=rm; $x y", ": `rm x`", "rm\\\n x",
    ],
)  # fmt: skip
def test_a_denied_command_is_caught_behind_whatever_starts_it(paths: Paths, command: str) -> None:
    assert denies(paths, "Bash(rm:*)", command)


def test_a_denied_file_is_caught_in_what_cannot_be_taken_apart(paths: Paths) -> None:
    for command in ("sh -c 'echo x > .env'", ": \"${x:-'$(echo > .env)'}\"", "case a in a) echo>>.env;; esac"):
        assert denies(paths, "Edit(.env)", command), command


def test_rules_with_many_stars_are_quick(paths: Paths) -> None:
    started = time.monotonic()
    assert not denies(paths, "Bash(a*a*a*a*b)", "a" * 100_000)
    assert not denies(paths, "Bash(a*a*a*a*b:*)", "X=1; " + "a" * 100_000)
    assert time.monotonic() - started < 5


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
