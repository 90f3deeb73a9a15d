"""Which server and which key a command uses, and how a link and a first key are remembered."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest

from ash.cli import profile
from ash.remote import owner
from tests.cli.conftest import Ash
from tests.cli.stub_server import StubServer


def where(server: str | None = None, api_key: str | None = None) -> profile.Address:
    return profile.address(argparse.Namespace(server=server, api_key=api_key))


@pytest.fixture
def local(stub: StubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> StubServer:
    """The stub, as the server of this machine."""
    monkeypatch.setattr(profile, "DEFAULT_URL", stub.url)
    return stub


def test_the_address_comes_from_flag_variable_config_default(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert where()[:2] == ("http://localhost:4100", "default")
    profile.link("http://config", None)
    assert where()[:2] == ("http://config", "config")
    monkeypatch.setenv("ASH_SERVER_URL", "http://variable")
    assert where()[:2] == ("http://variable", "ASH_SERVER_URL")
    assert where("http://flag")[:2] == ("http://flag", "flag")


def test_a_stored_key_goes_to_its_own_server_only(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile.save({"api_key": "local-key"})
    assert where().key == "local-key"
    assert where("http://127.0.0.1:4100/").key == "local-key"
    assert where("http://elsewhere").key is None
    monkeypatch.setenv("ASH_API_KEY", "variable-key")
    assert where("http://elsewhere").key == "variable-key"
    assert where("http://elsewhere", "flag-key").key == "flag-key"


def test_the_config_is_private(home: Path) -> None:
    profile.save({"api_key": "x"})
    assert (home / "config.json").stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in home.iterdir()] == ["config.json"]


def test_a_link_keeps_the_local_key_aside_and_unlink_brings_it_back(call: Ash, stub: StubServer, home: Path) -> None:
    profile.save({"api_key": "local-key"})
    assert call("link", stub.url, "--api-key", "remote-key").code == 0
    assert profile.load() == {"server_url": stub.url, "api_key": "remote-key", "local_api_key": "local-key"}
    stub.key = "remote-key"
    assert call("agent", "list").code == 0
    assert stub.requests[-1][3]["Authorization"] == "Bearer remote-key"
    assert call("link").out == f"Linked to {stub.url}\n"
    assert call("unlink").code == 0
    assert profile.load() == {"api_key": "local-key"}
    assert call("unlink").out == "There was no link.\n"


def test_a_key_can_be_given_where_no_shell_history_sees_it(call: Ash, stub: StubServer, home: Path) -> None:
    assert call("link", stub.url, "--api-key", "-", stdin="typed-key\n").code == 0
    assert profile.load()["api_key"] == "typed-key"


def test_a_link_to_a_server_that_is_down_is_stored_with_a_warning(call: Ash, home: Path) -> None:
    done = call("link", "http://127.0.0.1:1")
    assert (done.code, "cannot be used yet" in done.err) == (0, True)
    assert call("link", "nonsense").code == 1
    assert profile.load()["server_url"] == "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({}, {"api_key": "new"}),
        ({"api_key": "refused"}, {"api_key": "new"}),
        ({"server_url": "LOCAL"}, {"server_url": "LOCAL", "api_key": "new"}),
        ({"server_url": "http://far", "api_key": "far"}, {"server_url": "http://far", "api_key": "far", "local_api_key": "new"}),
    ],
)
def test_the_first_key_of_a_server_gets_into_the_config(
    local: StubServer, tmp_path: Path, stored: dict[str, str], expected: dict[str, str]
) -> None:
    (tmp_path / "initial-api-key").write_text("new\n")
    local.key = "new"
    profile.save({name: value.replace("LOCAL", local.url) for name, value in stored.items()})
    assert profile.adopt_key(str(tmp_path), local.url) is True
    assert profile.load() == {name: value.replace("LOCAL", local.url) for name, value in expected.items()}
    assert profile.adopt_key(str(tmp_path), local.url) is False
    assert (tmp_path / "initial-api-key").exists(), "this server looks for its owner's key here alone"


def test_in_the_folder_of_the_config_the_key_exists_once(local: StubServer, home: Path) -> None:
    home.mkdir()
    (home / "initial-api-key").write_text("new\n")
    assert profile.adopt_key(str(home), local.url) is True
    assert profile.load() == {"api_key": "new"}
    assert [path.name for path in home.iterdir()] == ["config.json"]


def test_a_key_that_somebody_chose_and_the_server_takes_is_not_replaced(local: StubServer, tmp_path: Path) -> None:
    (tmp_path / "initial-api-key").write_text("new\n")
    local.key = "chosen"
    profile.save({"api_key": "chosen"})
    assert profile.adopt_key(str(tmp_path), local.url) is False
    assert profile.load() == {"api_key": "chosen"}


def test_the_key_of_a_server_that_is_not_talked_to_stays_where_it_is(home: Path, tmp_path: Path) -> None:
    (tmp_path / "initial-api-key").write_text("new\n")
    assert profile.adopt_key(str(tmp_path), "http://127.0.0.1:4999") is False
    assert (tmp_path / "initial-api-key").exists()
    assert profile.load() == {}


def test_config_json_tells_the_client_side(call: Ash, home: Path) -> None:
    profile.link("http://far", "far-key")
    client = json.loads(call("config", "--json").out)["client"]
    assert client == {"serverUrl": "http://far", "source": "config", "apiKey": "***", "apiKeySource": "config", "home": str(home)}


def test_a_stored_key_is_sent_only_when_the_server_asks(call: Ash, local: StubServer, home: Path) -> None:
    profile.save({"api_key": "kept"})
    assert call("agent", "list").code == 0
    assert [headers.get("Authorization") for *_, headers in local.requests] == [None]
    local.key = "kept"
    assert call("chat", "my-agent", "Hi") == (0, "Hello, Ada.\n", "")
    assert len([log for log in local.logs.values() if log]) == 1, "the refused message started no turn"


def test_a_stored_key_does_not_go_to_another_users_server(
    call: Ash, local: StubServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile.save({"api_key": "kept"})
    local.key = "kept"
    monkeypatch.setattr(owner, "_listeners", lambda _table, _port: [0, os.geteuid() + 1])
    done = call("agent", "list")
    assert (done.code, "belongs to another user" in done.err, "--api-key" in done.err) == (1, True, True)
    assert [headers.get("Authorization") for *_, headers in local.requests] == [None]
    assert call("agent", "list", "--api-key", "kept").code == 0


def test_the_owner_of_a_port_is_read_from_the_kernel(local: StubServer) -> None:
    assert set(owner._listeners("/proc/net/tcp", local.server_address[1])) == {os.geteuid()}
    assert (owner.is_trusted(local.server_address[1]), owner.is_trusted(1)) == (True, False)
    names = ("localhost", "127.0.0.2", "::1", "0.0.0.0", "example.org", "10.0.0.1")
    assert [owner.is_this_machine(name) for name in names] == [True] * 4 + [False] * 2
