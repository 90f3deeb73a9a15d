"""`ash credential`: the secret comes from standard input or a file, and is seen nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Ash
from tests.cli.stub_server import StubServer

SECRET = "ghp_0123456789"


def test_a_secret_is_read_from_standard_input_and_never_shown(ash: Ash, stub: StubServer) -> None:
    done = ash("credential", "add", "--host", "api.github.com", "--variable", "GITHUB_TOKEN", "--agent", "my-agent", stdin=f"{SECRET}\n")
    assert done.code == 0
    assert stub.posts("/api/credentials") == [
        {"type": "custom", "key": SECRET, "host": "api.github.com", "variable": "GITHUB_TOKEN", "agent": "my-agent"}
    ]
    assert done.out.startswith("Stored credential ")
    assert "$GITHUB_TOKEN holds a placeholder" in done.err
    assert SECRET not in done.out + done.err


def test_a_secret_is_read_from_a_file(ash: Ash, stub: StubServer, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(SECRET + "\n")
    done = ash("credential", "add", "--host", "h.example", "--template", "Basic me:{value}", "--file", str(file), "--json")
    assert json.loads(done.out)["host"] == "h.example"
    assert stub.posts("/api/credentials")[0]["key"] == SECRET


def test_without_a_host_it_is_a_key_for_the_model(ash: Ash, stub: StubServer) -> None:
    done = ash("credential", "add", "--label", "mine", stdin=SECRET)
    assert stub.posts("/api/credentials") == [{"type": "anthropic", "key": SECRET, "label": "mine"}]
    assert "Model calls" in done.err


@pytest.mark.parametrize("arguments", [(), ("--file", "/nonexistent/token")])
def test_without_a_secret_nothing_is_sent(ash: Ash, stub: StubServer, arguments: tuple[str, ...]) -> None:
    assert ash("credential", "add", "--host", "h.example", *arguments, stdin=" \n").code == 2
    assert stub.posts("/api/credentials") == []


def test_credentials_are_listed_and_deleted(ash: Ash, stub: StubServer) -> None:
    ash("credential", "add", stdin=SECRET)
    [shown] = json.loads(ash("credential", "list").out)
    assert ash("credential", "delete", shown["id"]).out == f"Deleted credential {shown['id']}\n"
    assert json.loads(ash("credential", "list").out) == []
    assert ash("credential", "delete", shown["id"]).code == 1


def test_a_session_is_created_with_a_credential(ash: Ash, stub: StubServer) -> None:
    ash("session", "create", "my-agent", "--credential", "c1")
    assert stub.posts("/api/sessions")[-1]["credentialId"] == "c1"
