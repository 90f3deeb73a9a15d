"""How commands are found and called, what --help costs, and what exit codes mean."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ash import __version__
from ash.__main__ import COMMANDS
from tests.cli.conftest import Ash, command, environment, run
from tests.cli.stub_server import StubServer

CLIENT_COMMANDS = [["chat", "--help"], ["session", "list", "--help"], ["deploy", "--help"], ["--help"]]


def test_help_lists_every_command(call: Ash) -> None:
    done = call("--help")
    assert done.code == 0
    assert all(f"  {name} " in done.out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, call: Ash) -> None:
    done = call(name, "--help")
    assert (done.code, done.err) == (0, "")
    assert f"ash {name}" in done.out


@pytest.mark.parametrize("arguments", CLIENT_COMMANDS)
def test_client_commands_load_neither_server_nor_asyncio(arguments: list[str]) -> None:
    code = (
        "import sys; from ash.__main__ import main; main(sys.argv[1:]); "
        "sys.stderr.write(repr([m for m in ('asyncio', 'aiohttp', 'ash.web', 'ash.store', 'ssl') if m in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment(), capture_output=True, text=True, timeout=20, check=True
    )
    assert done.stderr == "[]"


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["session"], ["session", "nonsense"], ["session", "get"], ["deploy"], ["deploy", "x", "--nope"], ["chat"],
     ["deploy", "x", "-e", "novalue"], ["start", "--port", "many"], ["start", "--auth", "never"], ["start", "--port", "70000"],
     ["offline-model", "--port", "70000"], ["offline-model", "--host", "bad..host"]],
)  # fmt: skip
def test_wrong_usage_exits_2_and_says_so_on_stderr(call: Ash, arguments: list[str]) -> None:
    done = call(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err


def test_a_misspelt_command_gets_a_suggestion(call: Ash) -> None:
    assert "'deploy'" in call("deplyo").err
    assert "'create'" in call("session", "craete").err


def test_an_error_goes_to_stderr_and_exits_1(ash: Ash) -> None:
    done = ash("agent", "info", "nobody")
    assert (done.code, done.out) == (1, "")
    assert done.err == 'error: no agent "nobody" (see: ash agent list)\n'


def test_a_session_that_is_not_there_is_named(ash: Ash, stub: StubServer) -> None:
    assert ash("session", "get", "1234").err == "error: no session 1234 (see: ash session list)\n"
    stub.sessions["nope"] = {}
    stub.refusals["/api/sessions/nope"] = (400, {"error": "params/id must match format \"uuid\", got 'nope'"})
    assert ash("session", "get", "nope").err == "error: 'nope' is not a session id (see: ash session list)\n"


def test_a_linked_server_that_does_not_answer_can_be_unlinked(call: Ash) -> None:
    call("link", "http://127.0.0.1:1")
    assert "`ash unlink`" in call("agent", "list").err
    assert "`ash unlink`" not in call("agent", "list", "--server", "http://127.0.0.1:1").err


def test_a_wrong_option_is_told_in_one_line(call: Ash) -> None:
    assert call("start", "--bogus").err == "error: unrecognized arguments: --bogus; see: ash start --help\n"


def test_a_server_that_is_not_ash_is_told_by_what_it_lacks(call: Ash, stub: StubServer) -> None:
    stub.refusals["/health"] = (200, {"ok": True})
    done = call("health", "--server", stub.url)
    assert (done.code, done.err) == (1, "error: the server's Health lacks status; is this address an Ash server?\n")


def test_no_server_says_how_to_start_one(call: Ash) -> None:
    done = call("health", "--server", "http://127.0.0.1:1")
    assert done.code == 1
    assert "ash start" in done.err


def test_a_missing_key_says_where_to_give_it(ash: Ash, stub: StubServer) -> None:
    stub.key = "ash_secret"
    assert "--api-key is not accepted" in ash("agent", "list", "--api-key", "wrong").err
    told = ash("agent", "list").err
    assert all(word in told for word in ("--api-key", "ASH_API_KEY", "initial-api-key"))
    assert ash("agent", "list", "--api-key", "ash_secret").code == 0


def test_common_options_may_stand_before_the_command(call: Ash, stub: StubServer) -> None:
    for arguments in (
        ["--server", stub.url, "agent", "list"],
        [f"--server={stub.url}", "--json", "agent", "list"],
        ["agent", "--server", stub.url, "list"],
    ):
        done = call(*arguments)
        assert (done.code, '"my-agent"' in done.out) == (0, True), done


def test_options_may_stand_between_the_other_words(ash: Ash, stub: StubServer) -> None:
    assert ash("chat", "my-agent", "--keep", "Hi", "--model", "offline", "there").code == 0
    assert stub.posts("/messages")[-1]["content"] == "Hi there"


def test_what_follows_two_dashes_is_taken_literally(ash: Ash, stub: StubServer) -> None:
    session = stub.session("my-agent")["id"]
    ash("session", "exec", "--cwd", "/tmp", session, "--", "ls", "-la", "--json", "a b", "--")
    assert stub.posts("/exec")[-1] == {"command": "ls -la --json 'a b' --", "timeout": 30000, "cwd": "/tmp"}


def test_the_version_needs_no_server(call: Ash) -> None:
    assert call("version").out == call("--version").out == f"ash {__version__}\n"


def test_a_reader_that_leaves_is_no_error(stub: StubServer) -> None:
    for _ in range(2000):
        stub.session("my-agent")
    process = subprocess.Popen(
        command("session", "list", "--limit", "2000"), env=environment(ASH_SERVER_URL=stub.url, ASH_HOME="/nonexistent"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(10) == 141


def test_an_unusable_client_config_is_named(call: Ash, home: Path) -> None:
    from ash.cli import profile

    profile.save({})
    with open(profile.path(), "w") as file:
        file.write("{")
    done = call("agent", "list")
    assert done.code == 2
    assert "config.json" in done.err


def test_config_shows_values_sources_and_masks_secrets(call: Ash, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-very-secret")
    monkeypatch.setenv("ASH_PORT", "4200")
    for done in (call("config"), call("config", "--json")):
        assert done.code == 0
        assert "sk-very-secret" not in done.out
        assert "***" in done.out
    lines = {line.split()[0]: line.split() for line in call("config").out.splitlines() if line}
    assert lines["port"] == ["port", "4200", "ASH_PORT", "ASH_PORT"]
    assert lines["host"][1:3] == ["127.0.0.1", "default"]


def test_a_misspelt_variable_stops_config_with_its_name(call: Ash, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASH_PROT", "1")
    done = call("config")
    assert done.code == 2
    assert "ASH_PROT" in done.err


def test_cache_can_be_listed(call: Ash, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ASH_CACHE_DIR", str(tmp_path))
    assert call("cache", "list", "--json").out.strip() == "[]"
    assert call("cache", "prune").code == 0


def test_python_dash_m_works_from_any_folder(tmp_path: Path) -> None:
    assert run("version", cwd=tmp_path).out == f"ash {__version__}\n"
