from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ash import agents as module
from ash import models
from ash.agents import Agents, check_env
from ash.errors import AgentNotFound, AgentUnusable, AshError, InvalidRequest, PayloadTooLarge
from ash.models import Session
from ash.store import Store

PROMPT = ("CLAUDE.md", b"# Bot\n")
SETTINGS = ".claude/settings.json"


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with Store(str(tmp_path / "data" / "ash.db")) as opened:
        yield opened


@pytest.fixture
def agents(store: Store, tmp_path: Path) -> Agents:
    return Agents(store, str(tmp_path / "data" / "agents"), max_bytes=1000, max_files=20)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An agent's folder on the server."""
    folder = tmp_path / "data" / "my-agent"
    folder.mkdir()
    (folder / "CLAUDE.md").write_text("# Mine\n")
    return folder


async def deploy(agents: Agents, *files: tuple[str, bytes], name: str = "bot", **options: Any) -> models.Agent:
    return await agents.deploy("default", name, files=list(files), **options)


def contents(agents: Agents, agent: models.Agent) -> dict[str, bytes]:
    root = Path(agents.folder(agent.digest))
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def folders(agents: Agents) -> set[str]:
    return set(os.listdir(agents.folder("")))


# Names, sources


async def test_files_are_unpacked_read_only_and_executable_where_they_name_an_interpreter(agents: Agents) -> None:
    old = os.umask(0o077)
    try:
        agent = await deploy(agents, PROMPT, ("bin/run", b"#!/bin/sh\n"), ("./docs//a.md", b"a"))
    finally:
        os.umask(old)
    assert contents(agents, agent) == {"CLAUDE.md": b"# Bot\n", "bin/run": b"#!/bin/sh\n", "docs/a.md": b"a"}
    root = Path(agents.folder(agent.digest))
    modes = {path.name: path.stat().st_mode & 0o777 for path in (root, *root.rglob("*"))}
    assert modes == {root.name: 0o755, "CLAUDE.md": 0o444, "bin": 0o755, "run": 0o555, "docs": 0o755, "a.md": 0o444}


@pytest.mark.parametrize("name", ["", "a b", "a/b", "..", "ü", "a" * 256, "a\n"])
async def test_a_name_that_is_not_plain_is_refused(agents: Agents, name: str) -> None:
    with pytest.raises(InvalidRequest, match="name must be 1 to 255 letters"):
        await deploy(agents, PROMPT, name=name)


async def test_without_files_the_prompt_is_the_whole_agent(agents: Agents) -> None:
    prompted = await agents.deploy("default", "one", system_prompt="Be kind.")
    assert contents(agents, prompted) == {"CLAUDE.md": b"Be kind."}
    assert contents(agents, await agents.deploy("default", "two")) == {"CLAUDE.md": b"# two\n"}


async def test_a_given_prompt_replaces_the_one_of_the_files(agents: Agents) -> None:
    agent = await deploy(agents, PROMPT, ("a", b"a"), system_prompt="Other")
    assert contents(agents, agent) == {"CLAUDE.md": b"Other", "a": b"a"}
    assert contents(agents, await deploy(agents, ("a", b"a"), system_prompt="Other")) == {"CLAUDE.md": b"Other", "a": b"a"}


async def test_files_without_a_prompt_are_refused(agents: Agents) -> None:
    with pytest.raises(InvalidRequest, match=r"no CLAUDE\.md.*systemPrompt"):
        await deploy(agents, ("docs/CLAUDE.md", b"not at the top"))
    assert folders(agents) == set()


async def test_files_and_path_together_are_refused(agents: Agents, source: Path) -> None:
    with pytest.raises(InvalidRequest, match="not both"):
        await deploy(agents, PROMPT, path=str(source))


# Versions


async def test_each_deploy_is_a_version_and_the_same_files_share_a_folder(agents: Agents) -> None:
    first, other = await deploy(agents, PROMPT, ("a", b"1")), await deploy(agents, PROMPT, ("a", b"2"))
    again, twin = await deploy(agents, ("a", b"1"), PROMPT), await deploy(agents, PROMPT, ("a", b"1"), name="twin")
    assert [agent.version for agent in (first, other, again, twin)] == [1, 2, 3, 1]
    assert first.digest == again.digest == twin.digest != other.digest
    assert folders(agents) == {first.digest, other.digest}


async def test_the_digest_depends_on_names_modes_and_contents(agents: Agents, source: Path) -> None:
    (source / "a").write_bytes(b"x")
    digests = [(await agents.deploy("default", "bot", path="my-agent")).digest]
    (source / "a").chmod(0o755)
    digests.append((await agents.deploy("default", "bot", path="my-agent")).digest)
    (source / "a").rename(source / "b")
    digests.append((await agents.deploy("default", "bot", path="my-agent")).digest)
    assert len(set(digests)) == 3


async def test_a_damaged_folder_is_replaced_by_the_next_deploy(agents: Agents) -> None:
    agent = await deploy(agents, PROMPT, ("a", b"1"))
    os.unlink(os.path.join(agents.folder(agent.digest), "a"))
    again = await deploy(agents, PROMPT, ("a", b"1"))
    assert contents(agents, again) == {"CLAUDE.md": b"# Bot\n", "a": b"1"}
    assert folders(agents) == {agent.digest}


async def test_deploys_at_the_same_time_all_succeed(agents: Agents) -> None:
    found = await asyncio.gather(*(deploy(agents, PROMPT, ("a", b"1")) for _ in range(8)))
    assert sorted(agent.version for agent in found) == list(range(1, 9))
    assert folders(agents) == {found[0].digest}


async def test_a_large_deploy_does_not_stall_the_loop(store: Store, tmp_path: Path) -> None:
    agents = Agents(store, str(tmp_path / "agents"), max_bytes=100 * 2**20, max_files=1000)
    running = asyncio.ensure_future(deploy(agents, PROMPT, *((f"f{number}", bytes(2**20)) for number in range(50))))
    longest, loop = 0.0, asyncio.get_running_loop()
    while not running.done():
        before = loop.time()
        await asyncio.sleep(0.001)
        longest = max(longest, loop.time() - before)
    assert len(contents(agents, await running)) == 51
    assert longest < 0.5


async def test_env_and_config_are_kept_until_given_anew(agents: Agents) -> None:
    await deploy(agents, PROMPT, env={"A": "1"}, config={"x": 1})
    kept = await deploy(agents, PROMPT)
    assert (kept.env, kept.config) == ({"A": "1"}, {"x": 1})
    assert (await deploy(agents, PROMPT, env={}, config={})).env == {}


@pytest.mark.parametrize("env", [{"A": 1}, {"": "x"}, {"A=B": "x"}, {"A": "x\0"}, {"A\0": "x"}])
async def test_an_environment_that_no_process_can_have_is_refused(agents: Agents, env: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="env: "):
        await deploy(agents, PROMPT, env=env)
    with pytest.raises(InvalidRequest, match="extraEnv: "):
        check_env(env, "extraEnv")


# Deleting


async def test_deleting_an_agent_removes_the_folders_that_nothing_needs(agents: Agents, store: Store) -> None:
    used, unused = await deploy(agents, PROMPT, ("a", b"1")), await deploy(agents, PROMPT, ("a", b"2"))
    shared = await deploy(agents, PROMPT, ("a", b"3"))
    await deploy(agents, PROMPT, ("a", b"3"), name="twin")
    id = models.new_id()
    await store.create_session(Session(id, "default", "bot", 1, used.digest, "active", None, {}, None, id, "", ""))
    await agents.delete("default", "bot")
    assert folders(agents) == {used.digest, shared.digest}
    assert unused.digest not in folders(agents)
    with pytest.raises(AgentNotFound):
        await agents.delete("default", "bot")


async def test_pruning_removes_what_an_interrupted_deploy_left_and_nothing_foreign(agents: Agents) -> None:
    agent = await deploy(agents, PROMPT)
    for name in (".unpacking-1", "0" * 64, "notes"):
        os.mkdir(agents.folder(name))
    await agents.prune()
    assert folders(agents) == {agent.digest, "notes"}


async def test_pruning_before_the_first_deploy_does_nothing(agents: Agents) -> None:
    await agents.prune()
    assert await agents.list("default") == []


# What may not be in an upload


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/etc/passwd", "absolute"),
        ("../x", r"contains \.\."),
        ("a/../../x", r"contains \.\."),
        ("a\0b", "control character"),
        ("a\nb", "control character"),
        ("a\\b", "backslash"),
        ("", "names no file"),
        ("./", "names no file"),
        ("a/", "names no file"),
        ("a" * 256, "longer than"),
        ("/".join("a" * 600), "deeper than"),
        ("\udc80", "not valid Unicode"),
    ],
)
async def test_a_path_that_leads_outside_or_cannot_be_is_refused(agents: Agents, path: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        await deploy(agents, PROMPT, (path, b"x"))
    assert folders(agents) == set()


@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        (["a", "./a"], "there twice"),
        (["Read.md", "README.md", "readme.md"], "differ only by case"),
        (["docs/a", "Docs/b"], "differ only by case"),
        (["é", "e\u0301"], "differ only by case"),
        (["a", "a/b"], "both a file and a folder"),
        (["a/b", "a"], "both a file and a folder"),
    ],
)
async def test_names_that_collide_are_refused(agents: Agents, paths: list[str], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        await deploy(agents, PROMPT, *((path, b"x") for path in paths))


async def test_too_much_is_refused_with_the_limit(agents: Agents) -> None:
    with pytest.raises(PayloadTooLarge, match="more than 20 files"):
        await deploy(agents, PROMPT, *((str(number), b"") for number in range(20)))
    with pytest.raises(PayloadTooLarge, match=r"larger than 0\.0009.* MiB"):
        await deploy(agents, PROMPT, ("a", b"x" * 600), ("b", b"x" * 600))
    assert folders(agents) == set()


async def test_a_disk_that_fails_is_an_error_in_words(agents: Agents) -> None:
    Path(agents.folder("")).parent.joinpath("agents").write_text("a file where the folder should be")
    with pytest.raises(AshError, match="cannot be stored on the server"):
        await deploy(agents, PROMPT)


# A folder on the server


async def test_a_path_is_absolute_or_relative_to_the_data_folder(agents: Agents, source: Path) -> None:
    (source / "skills").mkdir()
    (source / "skills" / "a.md").write_bytes(b"a")
    one, two = [await agents.deploy("default", "bot", path=path) for path in (str(source), "my-agent")]
    assert one.digest == two.digest
    assert contents(agents, one) == {"CLAUDE.md": b"# Mine\n", "skills/a.md": b"a"}


async def test_the_same_folder_has_the_same_digest_uploaded_or_read(agents: Agents, source: Path) -> None:
    (source / "run").write_bytes(b"#!/bin/sh\n")
    read = await agents.deploy("default", "bot", path=str(source))
    assert read.digest == (await deploy(agents, ("CLAUDE.md", b"# Mine\n"), ("run", b"#!/bin/sh\n"))).digest


@pytest.mark.parametrize("path", ["nowhere", "ash.db", "bad\0path"])
async def test_a_path_that_is_no_folder_is_refused(agents: Agents, path: str) -> None:
    with pytest.raises(InvalidRequest, match=r"must contain CLAUDE\.md; there is no such folder"):
        await agents.deploy("default", "bot", path=path)


async def test_a_folder_without_a_prompt_is_refused(agents: Agents, source: Path) -> None:
    (source / "CLAUDE.md").unlink()
    with pytest.raises(InvalidRequest, match=r"^Agent directory must contain CLAUDE\.md$"):
        await agents.deploy("default", "bot", path=str(source))


async def test_what_is_never_part_of_an_agent_is_left_out(agents: Agents, source: Path) -> None:
    for name in ("node_modules", ".git", "sub"):
        (source / name).mkdir()
        (source / name / "x").write_bytes(b"x")
    for name in (".env", ".env.local", ".DS_Store", "a.pid", "sub/b.lock"):
        (source / name).write_bytes(b"secret")
    (source / ".venv").symlink_to("/usr")
    (source / "prod.env").symlink_to("/etc/hostname")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(source / "s.sock"))
        agent = await agents.deploy("default", "bot", path=str(source))
    assert set(contents(agents, agent)) == {"CLAUDE.md", "sub/x"}


@pytest.mark.parametrize("target", ["/etc/passwd", "CLAUDE.md", "/etc", "nowhere"])
async def test_a_link_is_refused(agents: Agents, source: Path, target: str) -> None:
    (source / "link").symlink_to(target)
    with pytest.raises(InvalidRequest, match="'link' is a link"):
        await agents.deploy("default", "bot", path=str(source))


async def test_what_is_neither_file_nor_folder_is_refused(agents: Agents, source: Path) -> None:
    os.mkfifo(source / "pipe")
    with pytest.raises(InvalidRequest, match="'pipe' is neither"):
        await agents.deploy("default", "bot", path=str(source))


async def test_a_folder_on_the_server_has_the_same_limits_and_leaves_no_descriptor_open(agents: Agents, source: Path) -> None:
    (source / "a" / "b").mkdir(parents=True)
    (source / "a" / "b" / "big").write_bytes(b"x" * 1001)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(PayloadTooLarge):
        await agents.deploy("default", "bot", path=str(source))
    assert len(os.listdir("/proc/self/fd")) == len(before)


# Configuration


async def test_settings_are_parsed_once_and_empty_where_there_are_none(agents: Agents) -> None:
    settings = {"permissions": {"allow": ["Bash(ls:*)"], "deny": []}, "model": "m"}
    agent = await deploy(agents, PROMPT, (SETTINGS, b"\xef\xbb\xbf" + json.dumps(settings).encode()))
    assert await agents.settings(agent.digest) == settings
    assert await agents.settings((await deploy(agents, PROMPT)).digest) == {}
    with pytest.raises(AgentUnusable, match="deploy it again"):
        await agents.settings("0" * 64)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{\n "a": 1\n "b": 2}', "line 3: this is not JSON"),
        ("[]", "line 1: the file must hold a JSON object"),
        ("[" * 100_000, "this is nested too deeply"),
        (b"{\n\xff}", "line 2: this is not UTF-8"),
        ('{\n"permissions": []}', "line 2: permissions must be an object"),
        ('{"permissions": {\n"allow": "Bash"}}', r"line 2: permissions\.allow must be a list of strings"),
        ('{"permissions": {\n\n"deny": [1]}}', r"line 3: permissions\.deny must be a list of strings"),
        ('{"permissions": {\n"defaultMode": "bypassPermissions"}}', "line 2: .*remove defaultMode"),
        ('{\n"apiKeyHelper": "/bin/x"}', "line 2: .*remove apiKeyHelper"),
        ('{"env": {"A": "1",\n"ANTHROPIC_BASE_URL": "http://x"}}', "line 2: .*may not set ANTHROPIC_BASE_URL"),
        ('{"env": {\n\n"claude_code_use_bedrock": "1"}}', "line 3: .*may not set"),
        ('{"env": {\n"A": true}}', "line 2: .*put it in quotes"),
        ('{"permissions": {\n"defaultMode": 1}}', r"line 2: permissions\.defaultMode must be a string"),
        ('{\n"env": []}', "line 2: env must be an object"),
    ],
)
async def test_settings_that_are_broken_or_not_for_a_folder_to_decide_are_refused(agents: Agents, text: str | bytes, reason: str) -> None:
    agents._max_bytes = 10**6
    content = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(InvalidRequest, match=rf"(?s)\.claude/settings\.json:? ?{reason}"):
        await deploy(agents, PROMPT, (SETTINGS, content))
    assert folders(agents) == set()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "line 1: this is not JSON"),
        ('{"mcpServers": []}', "line 1: mcpServers must be"),
        ('{\n\n"mcpServers": {"a": {}}}', "line 3: .*'a' needs"),
    ],
)
async def test_a_broken_mcp_file_is_refused(agents: Agents, text: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"\.mcp\.json {reason}"):
        await deploy(agents, PROMPT, (".mcp.json", text.encode()))


async def test_what_is_left_aside_is_listed_until_it_is_gone(agents: Agents) -> None:
    settings = (SETTINGS, b'{"hooks": {"Stop": []}, "statusLine": {"a": 1}, "enabledPlugins": {}, "env": {"A": 1}}')
    servers = (".mcp.json", b'{"mcpServers": {"a": {"command": "x"}}}')
    first = await deploy(agents, PROMPT, settings, servers, ("install.md", b""), config={"x": 1})
    expected = [f"{SETTINGS}: hooks", f"{SETTINGS}: statusLine", ".mcp.json: mcpServers"]
    assert first.config == {"x": 1, "ignored": expected}
    assert (await deploy(agents, PROMPT, settings)).config == {"x": 1, "ignored": expected[:2]}
    assert (await deploy(agents, PROMPT)).config == {"x": 1}


async def test_the_local_settings_are_held_to_the_same_rules_and_an_empty_file_says_nothing(agents: Agents) -> None:
    with pytest.raises(InvalidRequest, match=r"settings\.local\.json line 1: .*remove apiKeyHelper"):
        await deploy(agents, PROMPT, (".claude/settings.local.json", b'{"apiKeyHelper": "x"}'))
    agent = await deploy(agents, PROMPT, (SETTINGS, b" "), (".claude/settings.local.json", b""), (".mcp.json", b"{}"))
    assert (agent.config, await agents.settings(agent.digest)) == ({}, {})


async def test_a_huge_settings_file_is_refused(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_CONFIG_BYTES", 10)
    with pytest.raises(PayloadTooLarge, match=r"settings\.json is larger"):
        await deploy(agents, PROMPT, (SETTINGS, b'{"a": "aaaaaaaa"}'))


async def test_parts_of_a_folder_that_nothing_reads_yet_are_named(agents: Agents) -> None:
    files = [("CLAUDE.md", b"x"), (".claude/skills/pdf/SKILL.md", b"---\nname: pdf\n---\n"), ("install.sh", b"true\n")]
    agent = await agents.deploy("default", "skilled", files=files, path=None, system_prompt=None, env=None, config=None)
    assert agent.config["ignored"] == [".claude/skills/", "install.sh"]
