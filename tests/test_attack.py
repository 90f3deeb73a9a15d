"""The attack on the server itself, and its report: each deed finds nothing on a sound server, and a proof on one that lacks its layer."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from ash.agents import Agents
from ash.attack import campaign, outside
from ash.attack.campaign import ATTACKS
from ash.attack.outside import DEEDS, Inapplicable
from ash.attack.probes import ATTACKER, FACTS, LIMITED, PROBES, Probe
from ash.attack.report import FAIL, NOT_APPLICABLE, PASS, Report, Result, judge, select
from ash.attack.scene import SECRET, Ran, Scene, Target, Tenant
from ash.attack.wire import Caller
from ash.auth import Guard
from ash.errors import AshError, ConnectionFailed, ProtocolError
from ash.keys import Keys
from ash.models import DEFAULT_TENANT
from ash.remote.server import parse_server
from ash.sessions import Sessions
from tests.harness import Server

Break = Callable[[pytest.MonkeyPatch, Path], None]


# A scene on a server in this process, whose sandboxes are only memory


class PaperScene(Scene):
    """Runs no command."""

    def run(self, id: str, command: str, *, caller: Caller | None = None) -> Ran:
        return Ran(1, "", "")


@pytest.fixture
async def scene(start_server: Callable[..., Awaitable[Server]], tmp_path: Path) -> Scene:
    server = await start_server()
    session = await server.session()
    found = PaperScene(Target(parse_server(server.url, None, 10, 10, None), server.parts.config.data_dir, os.getpid()))
    keys = server.parts.keys
    own, found.key = await keys.create(DEFAULT_TENANT, "own")
    other, other_key = await keys.create("other", "other")
    found.key_id, found.health = own.id, {"auth": "local"}
    found.caller = Caller(found.target.server, found.key)
    found.sessions = {ATTACKER: session}
    env = {"ATTACK_SECRET": f"{SECRET}-{found.name}"}
    await server.call("POST", "/api/agents", {"name": found.name, "systemPrompt": "x", "env": env}, expect=201)
    header = {"Authorization": f"Bearer {other_key}"}
    await server.call("POST", "/api/agents", {"name": "theirs", "systemPrompt": "x"}, expect=201, headers=header)
    theirs = await server.call("POST", "/api/sessions", {"agent": "theirs"}, expect=201, headers=header)
    found.tenant = Tenant("other", Caller(found.target.server, other_key), other.id, theirs["session"]["id"])
    canary = tmp_path / "canary"
    canary.write_text("canary")
    (tmp_path / "sockets").mkdir()
    found.facts = {"canary_file": str(canary), "python": "python3", "data_dir": found.target.data_dir,
                   "host_socket": str(tmp_path / "sockets" / "host.sock")}  # fmt: skip
    agent = Path(found.target.data_dir, "sessions", session, "agent")
    agent.mkdir(parents=True, exist_ok=True)
    (agent / "CLAUDE.md").write_text("x")
    return found


IN_MEMORY = [deed for deed in DEEDS if deed.run not in (outside.outlive_the_session, outside.forge_bridge_lines)]


@pytest.mark.parametrize("deed", IN_MEMORY, ids=lambda deed: deed.id)
async def test_on_a_sound_server_no_deed_works(deed: outside.Deed, scene: Scene) -> None:
    assert await asyncio.to_thread(deed.run, scene) is None


def trust_everybody(patch: pytest.MonkeyPatch, _: Path) -> None:
    async def check(self: Guard, request: Any) -> tuple[str, None]:
        return DEFAULT_TENANT, None

    patch.setattr(Guard, "check", check)


def delete_any_key(patch: pytest.MonkeyPatch, _: Path) -> None:
    async def delete(self: Keys, tenant_id: str, id: str) -> None:
        await self._store._write("DELETE FROM api_keys WHERE id = ?", id)

    patch.setattr(Keys, "delete", delete)


def take_any_path(patch: pytest.MonkeyPatch, _: Path) -> None:
    patch.setattr("ash.agents.clean_path", lambda path: path.replace("\0", "").rpartition("/")[2])


def take_any_settings(patch: pytest.MonkeyPatch, _: Path) -> None:
    patch.setattr("ash.agents._check_configuration", lambda contents: [])


def be_near_everybody(patch: pytest.MonkeyPatch, _: Path) -> None:
    patch.setattr(Guard, "is_direct", lambda self, request: True)


def show_variables(patch: pytest.MonkeyPatch, _: Path) -> None:
    patch.setattr("ash.dialect.agent", lambda agent: {**agent._asdict()})


def read_through_links(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def logs(self: Sessions, tenant_id: str, id: str, after: int = -1) -> list[dict[str, Any]]:
        return [{"index": 0, "level": "stderr", "text": (tmp_path / "canary").read_text(), "ts": ""}]

    patch.setattr(Sessions, "logs", logs)


def run_install_hooks(patch: pytest.MonkeyPatch, _: Path) -> None:
    deploy = Agents.deploy

    async def deploy_and_run(self: Agents, tenant_id: str, name: str, **given: Any) -> Any:
        for path, content in given["files"] or []:
            if path == "install.sh":
                await asyncio.to_thread(subprocess.run, ["/bin/sh"], input=content, check=True)
        return await deploy(self, tenant_id, name, **given)

    patch.setattr(Agents, "deploy", deploy_and_run)


@pytest.mark.parametrize(("break_it", "names"), [
    (trust_everybody, ["call the API without a key", "call the API with a wrong key", "call the API with a deleted key",
                       "get around the key by the spelling of a path", "call the API with a forged Host", "call the API from a web page",
                       "read and change a session of another tenant", "read and change what another tenant has",
                       "start the agent of another tenant"]),
    (delete_any_key, ["delete the key of another tenant"]),
    (take_any_path, ["write outside an agent's folder by an upload"]),
    (take_any_settings, ["decide by its settings about keys and permissions"]),
    (be_near_everybody, ["deploy a folder of the server from afar"]),
    (show_variables, ["find keys and variables in what the API shows"]),
    (read_through_links, ["make the server follow a link"]),
    (run_install_hooks, ["run a hook of the agent on the host"]),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
async def test_on_a_server_without_its_layer_the_deeds_work(
    break_it: Break, names: list[str], scene: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    break_it(monkeypatch, tmp_path)
    proofs = {deed.name: await asyncio.to_thread(deed.run, scene) for deed in DEEDS if deed.name in names}
    assert [name for name in names if not proofs[name]] == []


async def test_without_a_second_tenant_its_deeds_say_why_not(scene: Scene) -> None:
    scene.tenant, scene.why_no_tenant = None, "far away"
    with pytest.raises(Inapplicable, match="far away"):
        await asyncio.to_thread(outside.reach_into_a_tenant, scene)


# The table


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.id)
def test_a_probe_filled_in_is_a_command_that_a_shell_can_read(probe: Any) -> None:
    command = probe.fill(dict.fromkeys(FACTS, "it's a fact; true"))
    assert not [name for name in FACTS if "{" + name + "}" in command]
    done = subprocess.run(["/bin/bash", "-n", "-c", command], capture_output=True, text=True, timeout=10, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("exit_code", "output", "errors", "verdict", "why"), [
    (0, "root\n", "", FAIL, "root"), (0, "", "", FAIL, "exit code 0"),
    (1, "", "Permission denied", PASS, ""), (77, "not here\n", "", NOT_APPLICABLE, "not here"),
    (127, "", "bash: mount: command not found", NOT_APPLICABLE, "it could not be tried: bash: mount: command not found"),
    (1, "", "Traceback …\nNameError: name 'x'", FAIL, "the probe itself is broken: NameError: name 'x'"),
    (1, "", "Traceback …\nPermissionError: [Errno 13]", PASS, ""), (-9, "", "", PASS, ""),
])  # fmt: skip
def test_a_verdict_follows_from_how_the_command_ended(exit_code: int, output: str, errors: str, verdict: str, why: str) -> None:
    assert judge(exit_code, output, errors) == (verdict, why)


def test_probes_are_selected_by_id_or_by_a_part_of_it() -> None:
    ids = [attack.id for attack in ATTACKS]
    assert select(["outlive-its-session"], ids) == ["outlive-its-session"]
    assert select(["metadata"], ids) == ["reach-the-metadata-service", "reach-metadata-addresses-through-the-proxy"]
    with pytest.raises(ValueError, match="nonsense"):
        select(["nonsense"], ids)


# The report


def report(*verdicts: str) -> Report:
    results = tuple(Result(f"probe-{n}", f"probe {n}", "a | layer", verdict, "why\nnot") for n, verdict in enumerate(verdicts))
    return Report("2026-01-01T00:00:00.000Z", 1.0, "0", {"url": "http://x"}, {"kernel": "Linux"}, results)


@pytest.mark.parametrize(("verdicts", "holds"), [
    ((PASS, NOT_APPLICABLE), True), ((PASS, FAIL), False), ((NOT_APPLICABLE,), False), ((), False),
])  # fmt: skip
def test_a_report_holds_when_something_was_stopped_and_nothing_got_through(verdicts: tuple[str, ...], holds: bool) -> None:
    assert report(*verdicts).holds is holds


def test_a_report_is_dated_and_counts_in_both_forms() -> None:
    found = report(PASS, FAIL, NOT_APPLICABLE)
    assert found.to_json()["totals"] == {"pass": 1, "fail": 1, "notApplicable": 1}
    page = found.to_markdown()
    assert page.startswith("# Attack of 2026-01-01T00:00:00.000Z")
    assert page.index("| fail |") < page.index("| not applicable |") < page.index("| pass |")
    assert "a \\| layer" in page
    assert "why not" in page


# What shows nothing


@pytest.mark.parametrize(("session", "error", "verdict"), [
    (LIMITED, ProtocolError("the server answered 500: the sandbox ran out of memory"), PASS),
    (LIMITED, ConnectionFailed("no server answers"), FAIL), (ATTACKER, ProtocolError("the server answered 500: it died"), FAIL),
])  # fmt: skip
async def test_a_probe_that_could_not_be_run_counts_only_where_the_sandbox_was_to_end(
    session: str, error: AshError, verdict: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any, **named: Any) -> Ran:
        raise error

    monkeypatch.setattr(scene, "run", fail)
    scene.health, scene.sessions = {"isolation": "bwrap"}, dict.fromkeys((ATTACKER, LIMITED), "x")
    assert campaign._probe(scene, Probe("a probe", "a layer", "true", session=session))[0] == verdict
