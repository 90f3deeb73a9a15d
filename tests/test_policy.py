"""The policy file: what it may say, what is refused with which words, and how it is read again."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from ash import limits
from ash.config import Config, load_config
from ash.egress.rules import EgressPolicy
from ash.errors import ConfigError
from ash.models import DEFAULT_TENANT
from ash.policy import DeployPolicy, Policies, Policy, load_policy, open_policies
from ash.sandbox import Mount
from tests.harness import needs_root

PAGE = Path(__file__).parents[1] / "docs" / "policy.md"
KEY = "0f8fad5b-d9cb-469f-a165-70867728950e"
Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def put(text: str) -> str:
        path = tmp_path / "policy.toml"
        path.write_text(text)
        path.chmod(0o600)
        return str(path)

    return put


def test_without_a_file_nothing_leaves_and_everybody_with_a_key_may_deploy(tmp_path: Path) -> None:
    policy = Policies(str(tmp_path / "none.toml"), str(tmp_path), is_required=False).current
    assert (policy.egress.allow, policy.mounts, dict(policy.maximum), policy.hooks) == ((), (), {}, False)
    assert policy.allows_model("anything")
    assert not policy.allows_feature("web_fetch_20250910")
    assert policy.deploy.allows(KEY, is_local=False)
    assert policy.source == "default"


def test_an_empty_file_is_the_same_as_none(write: Write) -> None:
    path = write("# nothing yet\n")
    assert load_policy(path) == Policy(source=path)


def test_every_table_is_read(write: Write, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    policy = load_policy(
        write(f"""
        [egress]
        allow = ["pypi.org", "*.example.com:8443"]
        deny = ["evil.example.com"]
        allow_private = ["10.1.0.0/16"]
        bandwidth_mb_per_second = 5
        connections = 3
        [models]
        allow = ["claude-*"]
        provider_features = ["web_search_*"]
        [[mounts]]
        source = "{tools}"
        target = "/opt/tools"
        [limits]
        memory_mb = 4096
        turn_timeout = 90.5
        [hooks]
        allow = true
        [runtimes]
        allow = ["built-in"]
        [deploy]
        allow = ["local", "env", "{KEY}"]
        [agents.reporter]
        egress.allow = ["reports.example.com"]
        limits.memory_mb = 8192
    """)
    )
    assert policy.egress == EgressPolicy(
        ("pypi.org", "*.example.com:8443"), ("evil.example.com",), ("10.1.0.0/16",), bandwidth_mb_per_second=5.0, connections=3
    )  # fmt: skip
    assert (policy.models, policy.provider_features) == (("claude-*",), ("web_search_*",))
    assert policy.mounts == (Mount(str(tools), "/opt/tools"),)
    assert dict(policy.maximum) == {"memory_mb": 4096, "turn_timeout": 90.5}
    assert (policy.hooks, policy.deploy) == (True, DeployPolicy(("local", "env", KEY)))
    assert policy.egress_of(DEFAULT_TENANT, "reporter").allow == ("reports.example.com",)
    assert policy.egress_of(DEFAULT_TENANT, "reporter").deny == ("evil.example.com",), "only `allow` is another one"
    assert policy.egress_of(DEFAULT_TENANT, "helper") == policy.egress
    assert policy.maximum_of(DEFAULT_TENANT, "reporter") == {"memory_mb": 8192, "turn_timeout": 90.5}


def test_an_exception_for_an_agent_is_not_for_another_tenants_agent_of_that_name(write: Write) -> None:
    policy = load_policy(write('[agents.reporter]\negress.allow = ["a.example.com"]\nlimits.memory_mb = 9000\n'))
    assert policy.egress_of("somebody-else", "reporter").allow == ()
    assert policy.maximum_of("somebody-else", "reporter") == {}


@pytest.mark.parametrize(("text", "line", "words"), [
    ("[egres]\n", 1, "there is no table [egres]; did you mean 'egress'?"),
    ("top = 1\n", 1, "there is no table [top]"),
    ("egress = 5\n", 1, "egress must be a table: write [egress]"),
    ("mounts = 5\n", 1, "write [[mounts]]"),
    ("agents = 5\n", 1, "agents must be a table"),
    ("[egress]\n\nalow = []\n", 3, "there is no key 'alow' in [egress]; did you mean 'allow'?"),
    ('[egress]\nallow = "pypi.org"\n', 2, "egress.allow: must be a list of texts"),
    ("[egress]\nallow = [1]\n", 2, "egress.allow: must be a list of texts"),
    ('[egress]\nallow = ["https://pypi.org/simple"]\n', 2, "egress.allow: 'https://pypi.org/simple'"),
    ('[egress]\nallow_private = ["10.1.0.1/16"]\n', 2, "is not a network"),
    ("[egress]\nconnections = 0\n", 2, "egress.connections: must be a whole number of at least 1"),
    ("[egress]\nconnections = 2.5\n", 2, "must be a whole number"),
    ("[egress]\nbandwidth_mb_per_second = inf\n", 2, "must be a number of at least 0"),
    ("[egress]\nidle_seconds = true\n", 2, "must be a number of at least 1"),
    ("[models]\nallow = []\n", 2, "models.allow: is empty, which would allow no model"),
    ('[models]\nallow = [""]\n', 2, "must be a list of texts"),
    ("[[mounts]]\ntarget = '/x'\n", 1, "an entry has no source"),
    ("[[mounts]]\nsource = 'tools'\n", 2, "mounts.source: must be an absolute path"),
    ("[[mounts]]\nsource = '/usr/../etc'\n", 2, "must be an absolute path without .."),
    ("[[mounts]]\nsource = '/no/such/folder'\n", 2, "/no/such/folder cannot be used: No such file or directory"),
    ("[[mounts]]\nsource = '/'\n", 2, "would show the host's processes"),
    ("[[mounts]]\nsource = '/proc/sys'\n", 2, "would show the host's processes"),
    ("[[mounts]]\nsource = '/dev/null'\n", 2, "neither a file nor a folder"),
    ("[[mounts]]\nsource = '/usr'\ntarget = '/workspace/usr'\n", 3, "where a sandbox has something of its own"),
    ("[[mounts]]\nsource = '/usr'\ntarget = '/'\n", 3, "where a sandbox has something of its own"),
    ("[[mounts]]\nsource = '/usr'\ntarget = '//proc'\n", 3, "where a sandbox has something of its own"),
    ("[[mounts]]\nsource = '/usr'\ntarget = '/opt/a'\n[[mounts]]\nsource = '/usr'\ntarget = '/opt/a/b'\n", 3, "two of them meet"),
    ("[[mounts]]\nsource = '/usr'\ntarget = '/opt/a'\nmode = 'rw'\n", 4, "there is no key 'mode'"),
    ("[limits]\nmemory = 5\n", 2, "did you mean 'memory_mb'?"),
    ('[limits]\nmemory_mb = "5"\n', 2, "limits.memory_mb: must be a whole number"),
    ("[limits]\nmemory_mb = 5\n", 2, "must be from 32 up, got 5"),
    ("[limits]\ncpu_weight = 20000\n", 2, "must be from 1 to 10000"),
    ("[limits]\nturn_timeout = nan\n", 2, "limits.turn_timeout: must be a number"),
    ("[limits]\nmax_processes = true\n", 2, "must be a whole number"),
    ('[hooks]\nallow = "no"\n', 2, "must be true or false, without quotes"),
    ('[runtimes]\nallow = ["node"]\n', 2, "there is no runtime 'node'"),
    ("[runtimes]\nallow = []\n", 2, "would let no agent run"),
    ('[deploy]\nallow = ["my-key-label"]\n', 2, "'my-key-label' is nobody"),
    ("[agents.a]\nmodels = 5\n", 2, "there is no key 'models' in [agents.a]"),
    ("[agents.a.egress]\ndeny = []\n", 2, "there is no key 'deny' in [agents.a.egress]"),
    ("[agents.a.limits]\nmemory_mb = 1\n", 2, "agents.a.limits.memory_mb: must be from 32 up"),
    ('[agents."a b"]\n', 1, "is not the name of an agent"),
])  # fmt: skip
def test_what_is_wrong_is_named_with_file_line_and_key(write: Write, text: str, line: int, words: str) -> None:
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load_policy(path)
    assert caught.value.message.startswith(f"{path} line {line}: "), caught.value.message
    assert words in caught.value.message


@pytest.mark.parametrize("text", ["x = \n", "[egress\n", '[egress]\nallow = ["a"\n', "a = 1\na = 2\n"])
def test_what_is_not_toml_is_named_with_its_line(write: Write, text: str) -> None:
    with pytest.raises(ConfigError, match=r"policy.toml: this is not TOML: .*(line \d|end of document)"):
        load_policy(write(text))


def test_a_file_that_is_not_utf8_is_named_with_its_line(write: Write) -> None:
    path = write("")
    Path(path).write_bytes(b"# ok\n[models]\n# \xff\n")
    with pytest.raises(ConfigError, match="line 3: this is not UTF-8"):
        load_policy(path)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666, 0o777])
def test_a_policy_that_others_may_write_is_refused(write: Write, mode: int) -> None:
    path = write("[hooks]\nallow = false\n")
    os.chmod(path, mode)
    with pytest.raises(ConfigError, match=r"others than its owner may write the policy; chmod go-w"):
        load_policy(path)
    os.chmod(path, 0o644)
    load_policy(path)


@needs_root
def test_a_policy_that_belongs_to_somebody_else_is_refused(write: Write) -> None:
    path = write("")
    os.chown(path, 12345, 12345)
    with pytest.raises(ConfigError, match=r"belongs to another user \(uid 12345\); chown it"):
        load_policy(path)


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="the policy is not a file"):
        load_policy(str(tmp_path / "pipe"))
    with pytest.raises(ConfigError, match="the policy cannot be read: Is a directory"):
        load_policy(str(tmp_path))


def test_a_huge_file_is_refused(write: Write) -> None:
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        load_policy(write("#" * (2**20 + 1)))


# Mounts


def test_the_data_folder_is_never_shown_to_a_sandbox(tmp_path: Path, write: Write) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    (data / "sessions").mkdir(parents=True)
    other.mkdir()
    (tmp_path / "link").symlink_to(data / "sessions")
    for source in (data, data / "sessions", tmp_path, tmp_path / "link"):
        path = write(f"[[mounts]]\nsource = '{source}'\ntarget = '/opt/x'\n")
        with pytest.raises(ConfigError, match="shares files with the data folder"):
            load_policy(path, str(data))
    assert load_policy(write(f"[[mounts]]\nsource = '{other}'\ntarget = '/opt/x'\n"), str(data)).mounts


def test_a_socket_is_never_shown_to_a_sandbox(data_dir: str, write: Write) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{data_dir}/docker.sock")
        path = write(f"[[mounts]]\nsource = '{data_dir}/docker.sock'\ntarget = '/opt/x'\n")
        with pytest.raises(ConfigError, match="neither a file nor a folder; a socket"):
            load_policy(path)


def test_a_mount_without_a_target_is_where_its_source_is(write: Write) -> None:
    assert load_policy(write("[[mounts]]\nsource = '/usr/share/'\n")).mounts == (Mount("/usr/share", "/usr/share"),)
    with pytest.raises(ConfigError, match="something of its own"):
        load_policy(write("[[mounts]]\nsource = '/etc/hostname'\n"))


# Who may deploy, which models


@pytest.mark.parametrize(("allow", "key", "is_local", "may"), [
    (("*",), KEY, False, True), (("*",), None, False, True),
    (("local",), KEY, True, True), (("local",), None, True, True), (("local",), KEY, False, False),
    ((KEY,), KEY, False, True), ((KEY,), "other", False, False), ((KEY,), None, True, False),
    (("env",), "env", False, True), (("env",), KEY, False, False), ((), KEY, True, False),
])  # fmt: skip
def test_who_may_deploy(allow: tuple[str, ...], key: str | None, is_local: bool, may: bool) -> None:
    assert DeployPolicy(allow).allows(key, is_local=is_local) is may


@pytest.mark.parametrize(("pattern", "name", "allowed"), [
    ("claude-*", "claude-opus-5-5", True), ("claude-*", "offline", False), ("claude-*", "Claude-x", False),
    ("claude-sonnet-5-5", "claude-sonnet-5-5", True), ("claude-sonnet-5-5", "claude-sonnet-5-50", False), ("*", "", True),
    ("claude-[os]*", "claude-opus", True), ("claude-[os]*", "claude-haiku", False), ("claude-*", "x claude-", False),
    ("claude-*", "claude-\nx", True),
])  # fmt: skip
def test_a_pattern_is_for_the_whole_name(pattern: str, name: str, allowed: bool) -> None:
    assert Policy(models=(pattern,)).allows_model(name) is allowed


# In force


def test_a_good_file_is_in_force_after_a_reload_and_a_bad_one_changes_nothing(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    path = write('[egress]\nallow = ["a.example.com"]\n')
    policies = Policies(path, "", is_required=False)
    write('[egress]\nallow = ["b.example.com"]\n')
    assert policies.reload()
    assert policies.egress_of(DEFAULT_TENANT, "any").allow == ("b.example.com",)
    write("[egress]\nallow = 5\n")
    assert not policies.reload()
    assert policies.current.egress.allow == ("b.example.com",)
    assert "line 2" in policies.problem
    assert "the one before stays in force" in caplog.text
    write("")
    assert policies.reload()
    assert policies.problem == ""
    assert not policies.current.egress.allow


def test_a_file_that_vanishes_does_not_lift_the_policy(write: Write) -> None:
    path = write('[models]\nallow = ["claude-*"]\n')
    policies = Policies(path, "", is_required=False)
    os.unlink(path)
    assert not policies.reload()
    assert not policies.current.allows_model("offline")
    assert "No such file" in policies.problem


def test_a_file_that_appears_is_read_at_the_next_reload(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    policies = Policies(str(path), "", is_required=False)
    assert policies.reload()
    path.write_text('[models]\nallow = ["claude-*"]\n')
    path.chmod(0o600)
    assert policies.reload()
    assert policies.current.models == ("claude-*",)


def test_mounts_that_change_are_said_to_need_a_restart(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    policies = Policies(write(""), "", is_required=False)
    with caplog.at_level(logging.WARNING):
        assert policies.reload()
        assert "mounts" not in caplog.text
        write("[[mounts]]\nsource = '/usr'\ntarget = '/opt/usr'\n")
        assert policies.reload()
    assert "mounts have changed; that takes effect with the next start" in caplog.text


def test_a_file_that_was_named_must_be_there(make_config: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy cannot be read: No such file"):
        open_policies(make_config(policy_file=str(tmp_path / "gone.toml")))


def test_the_default_place_is_the_data_folder(make_config: Callable[..., Config], data_dir: str) -> None:
    config = make_config()
    assert open_policies(config).current.source == "default"
    path = Path(data_dir, "policy.toml")
    path.write_text("[hooks]\nallow = true\n")
    path.chmod(0o600)
    assert open_policies(config).current.source == str(path)


# Shown


def test_what_is_shown_is_all_that_is_in_force_and_where_it_comes_from(write: Write) -> None:
    server = limits.of_server(load_config({}, {}))
    shown = load_policy(write('[egress]\nallow = ["a.example.com"]\n[limits]\nmemory_mb = 100\n')).describe(server)
    assert shown["egress"]["allow"] == ["a.example.com"]
    assert shown["egress"].keys() == set(EgressPolicy._fields)
    assert (shown["limits"]["memory_mb"], shown["limits"]["cpu_percent"]) == (100, 100)
    assert shown["models"] == {"allow": ["*"], "provider_features": []}
    assert (shown["origins"]["egress.allow"], shown["origins"]["egress.deny"]) == ("policy", "default")
    assert (shown["origins"]["limits.memory_mb"], shown["origins"]["limits.cpu_percent"]) == ("policy", "setting")
    assert "no hooks run yet" in shown["notes"]["hooks.allow"], "a key that governs nothing says so"


# The page


def example() -> str:
    found = re.search(r"```toml\n(# policy\.toml.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def test_the_example_of_the_page_can_be_used_as_it_is(write: Write) -> None:
    text = example()
    assert load_policy(write(text)).given
    uncommented = re.sub(r"(?m)^# ?(?=\[|\w+ = )", "", text)
    policy = load_policy(write(uncommented))
    shown = policy.describe(limits.of_server(load_config({}, {})))
    unset = {key for key, origin in shown["origins"].items() if origin != "policy"}
    assert not unset, "the example has every key"
    assert policy.mounts
    assert policy.agents


def test_every_key_is_on_the_page() -> None:
    page = PAGE.read_text()
    shown = Policy().describe(limits.of_server(load_config({}, {})))
    for key in shown["origins"]:
        assert f"`{key.rpartition('.')[2]}`" in page, key
    for table in ("egress", "models", "[mounts]", "limits", "hooks", "runtimes", "deploy", "agents.NAME"):
        assert f"`[{table}]`" in page, table
