"""Credentials at rest and in use: sealed, bound to their place, opened for the right session alone."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ash import credentials
from ash.config import Secret
from ash.credentials import MASTER_KEY_FILE, Binding, Credentials
from ash.errors import AgentNotFound, Conflict, CredentialNotFound, CredentialUnusable, InvalidRequest
from ash.models import ACTIVE, Json, Session, new_id, now
from ash.store import Store

SECRET = "ghp_0123456789/secret"
GITHUB = Binding(agent="helper", host="api.github.com", variable="GITHUB_TOKEN")


@pytest.fixture
async def store(data_dir: str) -> AsyncIterator[Store]:
    async with Store(os.path.join(data_dir, "ash.db")) as found:
        for name in ("helper", "other"):
            await found.put_agent("default", name, "0" * 64, None, None)
        yield found


@pytest.fixture
def vault(store: Store, data_dir: str) -> Credentials:
    return Credentials(store, data_dir)


def session(agent: str = "helper", tenant: str = "default", id: str = "", **options: Json | str) -> Session:
    return Session(id or new_id(), tenant, agent, 1, "0" * 64, ACTIVE, None, dict(options), None, "box", now(), now())


async def make(vault: Credentials, binding: Binding = GITHUB, secret: str = SECRET, type: str = "custom", tenant: str = "default") -> str:
    return (await vault.create(tenant, type, Secret(secret), "mine", binding)).id


# At rest


async def test_the_secret_is_in_no_file_but_sealed(vault: Credentials, data_dir: str) -> None:
    await make(vault)
    [bound] = (await vault.open(session())).bound
    assert bound.secret.reveal() == SECRET
    for path in Path(data_dir).iterdir():
        assert SECRET.encode() not in path.read_bytes(), path
    assert stat.S_IMODE(Path(data_dir, MASTER_KEY_FILE).stat().st_mode) == 0o600


async def test_the_same_secret_is_never_sealed_the_same_way(vault: Credentials, store: Store) -> None:
    for agent in ("helper", "other"):
        await make(vault, GITHUB._replace(agent=agent))
    first, second = [(await store.find_credentials("default", agent))[0][1] for agent in ("helper", "other")]
    assert first[13:] != second[13:]


CHANGES = (
    "host = 'evil.example'", "header = 'X'", "template = '{value}'", "agent = 'other'", "tenant_id = 'b'", "id = 'b'", "type = 'anthropic'",
    "created_at = ''", "sealed = x'01' || randomblob(60)", "sealed = x''", "sealed = x'02' || substr(sealed, 2)",
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
async def test_a_row_that_was_changed_opens_no_more(vault: Credentials, data_dir: str, change: str) -> None:
    """Whoever can write the database could otherwise have the secret sent to a host of theirs."""
    await make(vault)
    with sqlite3.connect(os.path.join(data_dir, "ash.db")) as database:
        database.execute(f"UPDATE credentials SET {change}")
    database.close()
    agent, tenant = "other" if "agent" in change else "helper", "b" if "tenant" in change else "default"
    with pytest.raises(CredentialUnusable, match="its row was changed"):
        _ = await vault.open(session(agent, tenant))


async def test_another_master_key_is_told_and_the_former_one_helps(vault: Credentials, store: Store, data_dir: str) -> None:
    await make(vault)
    path = Path(data_dir, MASTER_KEY_FILE)
    key = path.read_text()
    path.write_text("x" * 40)
    with pytest.raises(CredentialUnusable, match="another master key"):
        await Credentials(store, data_dir).open(session())
    path.write_text(key)
    assert (await Credentials(store, data_dir).open(session())).bound


async def test_a_missing_master_key_is_not_replaced_behind_stored_credentials(vault: Credentials, store: Store, data_dir: str) -> None:
    await make(vault)
    Path(data_dir, MASTER_KEY_FILE).unlink()
    fresh = Credentials(store, data_dir)
    with pytest.raises(CredentialUnusable, match=r"master\.key in the data folder is missing.* backup"):
        await fresh.open(session())
    with pytest.raises(CredentialUnusable, match="missing"):
        await make(fresh, GITHUB._replace(agent="other"))
    assert not Path(data_dir, MASTER_KEY_FILE).exists()


async def test_the_master_key_can_be_the_operators(store: Store, data_dir: str, tmp_path: Path) -> None:
    file = tmp_path / "key"
    for text, complaint in ((None, "master_key_file names is missing"), ("short", "32 characters")):
        if text is not None:
            file.write_text(text)
        with pytest.raises(CredentialUnusable, match=complaint):
            await make(Credentials(store, data_dir, str(file)))
    file.write_text("k" * 32 + "\n")
    await make(Credentials(store, data_dir, str(file)))
    assert (await Credentials(store, data_dir, str(file)).open(session())).bound
    assert not Path(data_dir, MASTER_KEY_FILE).exists()


def test_a_server_that_uses_no_credentials_loads_no_cryptography() -> None:
    script = "import ash.web, sys; print([name for name in sys.modules if name.startswith('cryptography')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


# What may be stored


@pytest.mark.parametrize(
    ("binding", "complaint"),
    [
        (Binding(host="*.github.com", variable="T"), "for one host"),
        (Binding(host="10.0.0.0/8", variable="T"), "for one host"),
        (Binding(host="api.github.com:*", variable="T"), "one port"),
        (Binding(host="https://api.github.com", variable="T"), "host: .*must be"),
        (Binding(host="api.github.com"), "give a variable"),
        (Binding(host="h.example", variable="A B"), "not a name"),
        (Binding(host="h.example", variable="SSL_CERT_FILE"), "not a name"),
        (Binding(host="h.example", variable="ANTHROPIC_API_KEY"), "not passed into a sandbox"),
        (Binding(host="h.example", variable="T", header="Host"), "cannot hold"),
        (Binding(host="h.example", variable="T", header="X: y\r\nZ"), "cannot hold"),
        (Binding(host="h.example", template="Bearer"), "once"),
        (Binding(host="h.example", template="{value}{value}"), "once"),
        (Binding(host="h.example", template="Bearer {value}\r\nX: y"), "once"),
        (Binding(variable="T"), "needs a host"),
        (Binding(agent="helper"), "cannot be given to an agent"),
    ],
)
async def test_what_could_not_be_used_is_refused_with_what_to_write(vault: Credentials, binding: Binding, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        await make(vault, binding)


@pytest.mark.parametrize("secret", ["short", "x" * 20_000, "with\r\nHeader: y", " leading-space", "täken-12345"])
async def test_a_secret_that_fits_in_no_header_is_refused_without_being_repeated(vault: Credentials, secret: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await make(vault, secret=secret)
    assert secret not in str(refused.value)


async def test_an_unknown_agent_is_told_and_a_second_credential_for_the_same_place_refused(vault: Credentials) -> None:
    with pytest.raises(AgentNotFound):
        await make(vault, GITHUB._replace(agent="typo"))
    await make(vault)
    with pytest.raises(Conflict, match="has a credential for AUTHORIZATION at"):
        await make(vault, GITHUB._replace(header="AUTHORIZATION", variable="B"))
    with pytest.raises(Conflict, match="GITHUB_TOKEN already"):
        await make(vault, GITHUB._replace(host="github.com"))
    await make(vault, GITHUB._replace(agent="other"))
    await make(vault, GITHUB._replace(agent=None))


# Who may use it


async def test_neither_an_agent_nor_a_tenant_gets_more_than_a_session_can_open(vault: Credentials, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "MAX_OF_AGENT", 2)
    monkeypatch.setattr(credentials, "MAX_OF_TENANT", 3)
    made = await asyncio.gather(
        *(make(vault, Binding("helper", f"h{number}.test", template="{value}")) for number in range(5)), return_exceptions=True
    )
    assert [isinstance(each, Conflict) for each in made] == [False, False, True, True, True]
    await make(vault, GITHUB._replace(agent="other"))
    with pytest.raises(Conflict, match="3 credentials"):
        await make(vault, GITHUB._replace(agent=None))
    await make(vault, GITHUB._replace(agent=None), type="custom", tenant="another")


async def test_only_sessions_of_its_agent_and_tenant_get_a_credential(vault: Credentials) -> None:
    await make(vault)
    assert [(bound.host, bound.header) for bound in (await vault.open(session())).bound] == [("api.github.com", "Authorization")]
    assert (await vault.open(session("other"))).bound == ()
    assert (await vault.open(session(tenant="b"))).bound == ()


async def test_a_session_can_ask_for_one_by_its_id(vault: Credentials) -> None:
    id = await make(vault, GITHUB._replace(agent=None))
    assert (await vault.open(session())).bound == ()
    assert [bound.id for bound in (await vault.open(session(credentialId=id))).bound] == [id]
    with pytest.raises(CredentialNotFound):
        await vault.open(session(tenant="b", credentialId=id))
    with pytest.raises(InvalidRequest, match="Invalid or inaccessible credential"):
        await vault.check("b", "helper", id)


async def test_a_sessions_own_credential_goes_before_its_agents_for_the_same_place(vault: Credentials) -> None:
    await make(vault)
    own = await make(vault, GITHUB._replace(agent=None, header="authorization"), "ghp_my_own_one")
    assert [bound.id for bound in (await vault.open(session(credentialId=own))).bound] == [own]


async def test_a_key_for_the_model_comes_from_the_session_or_from_its_agent(vault: Credentials) -> None:
    agents = await make(vault, Binding(agent="helper"), "sk-ant-agents", "anthropic")
    own = await make(vault, Binding(), "sk-ant-sessions", "anthropic")
    opened = [await vault.open(session(**({"credentialId": id} if id else {}))) for id in ("", own)]
    assert [found.model_key.reveal() for found in opened if found.model_key] == ["sk-ant-agents", "sk-ant-sessions"]
    await vault.delete("default", agents)
    assert (await vault.open(session())).model_key is None


@pytest.mark.parametrize("type", ["openai", "bedrock", "custom"])
async def test_a_credential_that_sessions_cannot_use_is_refused_with_the_reason(vault: Credentials, type: str) -> None:
    id = await make(vault, Binding(), type=type)
    with pytest.raises(InvalidRequest, match=r"cannot use credentials of type|names no host"):
        await vault.check("default", "helper", id)


async def test_a_deleted_credential_is_revoked_where_it_was_handed_out(vault: Credentials) -> None:
    id = await make(vault)
    [bound] = (await vault.open(session())).bound
    assert not bound.is_revoked()
    await vault.delete("default", id)
    assert bound.is_revoked()
    assert (await vault.open(session())).bound == ()
    with pytest.raises(CredentialNotFound):
        await vault.delete("default", id)


async def test_a_placeholder_stays_the_same_in_every_session_and_when_the_secret_is_replaced(vault: Credentials) -> None:
    """A clone keeps it in its URL; forks and later sessions have that clone."""
    id = await make(vault)
    [first] = (await vault.open(session())).bound
    await vault.delete("default", id)
    await make(vault, secret="ghp_the_next_one")
    [second] = (await vault.open(session())).bound
    assert first.placeholder == second.placeholder
    await make(vault, GITHUB._replace(host="github.com", variable="B"))
    assert len({bound.placeholder for bound in (await vault.open(session())).bound}) == 2


async def test_use_is_noted(vault: Credentials) -> None:
    await make(vault)
    assert [credential.last_used_at for credential in await vault.list("default")] == [None]
    await vault.open(session())
    assert [credential.last_used_at is not None for credential in await vault.list("default")] == [True]


async def test_nothing_shows_a_secret_by_accident(vault: Credentials) -> None:
    await make(vault)
    opened = await vault.open(session())
    assert SECRET not in f"{opened!r} {opened.bound[0]} {await vault.list('default')}"
