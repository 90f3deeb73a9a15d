"""The policy over HTTP: shown, who may deploy, which models and limits a session may have, and how a reload takes effect."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from ash import models
from ash.errors import ConfigError, InvalidRequest
from ash.models import DEFAULT_TENANT
from ash.sandbox import Limits
from tests import fakes
from tests.harness import Server, eventually

Start = Callable[..., Awaitable[Server]]
Put = Callable[[str], None]


@pytest.fixture
def put(data_dir: str) -> Put:
    """Writes the policy of the server that is started or reloaded next."""

    def write(text: str) -> None:
        path = Path(data_dir, "policy.toml")
        path.write_text(text)
        path.chmod(0o600)

    return write


async def key(server: Server) -> tuple[str, dict[str, str]]:
    record, text = await server.parts.keys.create(DEFAULT_TENANT, "test")
    return record.id, {"Authorization": f"Bearer {text}"}


async def deploy(server: Server, expect: int, **options: Any) -> Any:
    return await server.call(
        "POST", "/api/agents", {"name": "helper", "systemPrompt": "x", **options.pop("body", {})}, expect=expect, **options
    )


async def created(server: Server, expect: int = 201, **options: Any) -> Any:
    answer = await server.call("POST", "/api/sessions", {"agent": "helper", **options}, expect=expect)
    return answer.get("session", answer)


async def turn(server: Server, id: str) -> list[models.Event]:
    """The events of one turn, from the log."""
    started = await server.parts.sessions.send(DEFAULT_TENANT, id, "go", {})
    events: list[models.Event] = []
    async with asyncio.timeout(10):
        async for page in server.parts.log.follow(id, after=started.first_seq - 1):
            events += page
            if events[-1].type == models.TURN_ENDED:
                break
    return events


# Shown


async def test_without_a_file_the_defaults_are_shown(server: Server) -> None:
    answer = await server.call("GET", "/api/policy", expect=200)
    assert answer["problem"] is None
    assert (answer["policy"]["source"], answer["policy"]["egress"]["allow"]) == ("default", [])
    assert answer["policy"]["limits"]["memory_mb"] == server.parts.config.memory_mb
    assert set(answer["policy"]["origins"].values()) == {"default", "setting"}


async def test_paths_of_the_machine_are_shown_to_the_servers_own_user_only(start_server: Start, put: Put, data_dir: str) -> None:
    put("[[mounts]]\nsource = '/usr/share'\ntarget = '/opt/share'\n")
    server = await start_server()
    _, headers = await key(server)
    shown = (await server.call("GET", "/api/policy", headers=headers))["policy"]
    assert (shown["source"], shown["mounts"]) == (f"{data_dir}/policy.toml", [{"source": "/usr/share", "target": "/opt/share"}])
    put("oops")
    assert not server.parts.policies.reload()
    elsewhere = await server.call("GET", "/api/policy", headers={**headers, "X-Forwarded-For": "192.0.2.1"})
    assert (elsewhere["policy"]["source"], elsewhere["policy"]["mounts"]) == ("policy.toml", [{"target": "/opt/share"}])
    assert elsewhere["problem"].startswith("policy.toml: this is not TOML")
    assert data_dir not in str(elsewhere)


async def test_a_bad_file_stops_the_start_and_a_bad_reload_is_a_warning(start_server: Start, put: Put) -> None:
    put("[limits]\nmemory_mb = 1\n")
    with pytest.raises(ConfigError, match=r"policy.toml line 2: limits.memory_mb: must be from 32 up"):
        await start_server()
    put("[limits]\nmemory_mb = 100\n")
    server = await start_server()
    assert not any("policy" in warning for warning in (await server.call("GET", "/health"))["warnings"])
    put("[limits]\nmemory_mb = 1\n")
    assert not server.parts.policies.reload()
    assert any("The policy file was refused" in warning for warning in (await server.call("GET", "/health"))["warnings"])
    assert "memory_mb: must be from 32 up" in (await server.call("GET", "/api/policy"))["problem"]
    assert (await server.call("GET", "/api/policy"))["policy"]["limits"]["memory_mb"] == 100


# Who may deploy


async def test_only_the_keys_that_the_policy_names_may_deploy_and_delete(start_server: Start, put: Put) -> None:
    server = await start_server()
    id, headers = await key(server)
    _, others = await key(server)
    put(f'[deploy]\nallow = ["{id}"]\n')
    assert server.parts.policies.reload()
    refused = await deploy(server, 403, headers=others)
    assert (refused["code"], "`allow` under [deploy]" in refused["error"]) == ("forbidden", True)
    assert (await deploy(server, 403))["error"].startswith("Who calls without a key may not deploy")
    await deploy(server, 201, headers=headers)
    await server.call("DELETE", "/api/agents/helper", expect=403, headers=others)
    await server.call("GET", "/api/agents/helper", expect=200, headers=others)
    await server.call("DELETE", "/api/agents/helper", expect=200, headers=headers)


async def test_a_key_with_the_label_or_the_text_of_an_allowed_one_is_another_key(start_server: Start, put: Put) -> None:
    server = await start_server(api_key="s3cret")
    id, headers = await key(server)
    put(f'[deploy]\nallow = ["{id}", "env"]\n')
    assert server.parts.policies.reload()
    made = await server.call("POST", "/api/api-keys", {"label": id}, expect=201, headers=headers)
    await deploy(server, 403, headers={"Authorization": f"Bearer {made['key']}"})
    made = await server.call("POST", "/api/api-keys", {"label": "env"}, expect=201, headers=headers)
    await deploy(server, 403, headers={"Authorization": f"Bearer {made['key']}"})
    await deploy(server, 201, headers={"Authorization": "Bearer s3cret"})


async def test_local_means_the_servers_own_user_whatever_key_the_request_carries(start_server: Start, put: Put) -> None:
    put('[deploy]\nallow = ["local"]\n')
    server = await start_server()
    _, headers = await key(server)
    await deploy(server, 201)
    await deploy(server, 201, headers=headers)
    await deploy(server, 403, headers={**headers, "X-Forwarded-For": "192.0.2.1"})
    await deploy(server, 403, headers={**headers, "Via": "1.1 proxy"})


async def test_nobody_may_deploy_where_the_list_is_empty(start_server: Start, put: Put) -> None:
    put("[deploy]\nallow = []\n")
    server = await start_server(api_key="s3cret")
    await deploy(server, 403)
    await deploy(server, 403, headers={"Authorization": "Bearer s3cret"})


async def test_who_may_not_deploy_learns_nothing_of_the_body(start_server: Start, put: Put) -> None:
    put("[deploy]\nallow = []\n")
    server = await start_server()
    await deploy(server, 403, body={"name": 5, "path": "/etc"})


# Models


async def test_a_session_on_a_model_that_is_not_allowed_is_refused_and_nothing_stays_of_it(start_server: Start, put: Put) -> None:
    put('[models]\nallow = ["offline", "claude-sonnet-*"]\n')
    server = await start_server()
    await server.deploy()
    refused = await created(server, 403, model="claude-opus-5-5")
    assert "'claude-opus-5-5' is not allowed here; `allow` under [models]" in refused["error"]
    assert "'claude-opus-5-5'" in (await created(server, 403, model="opus"))["error"]
    assert (await server.call("GET", "/api/sessions"))["sessions"] == []
    id = (await created(server, model="sonnet"))["id"]
    await server.call("PATCH", f"/api/sessions/{id}/config", {"model": "opus"}, expect=403)
    assert (await server.call("GET", f"/api/sessions/{id}"))["session"]["model"] == "sonnet"
    await server.call("POST", f"/api/sessions/{id}/messages", {"content": "x", "model": "opus"}, expect=403)
    assert await server.frames(id, model="sonnet")


async def test_the_default_model_and_that_of_the_agent_are_checked_too(start_server: Start, put: Put) -> None:
    put('[models]\nallow = ["claude-sonnet-*"]\n')
    server = await start_server()
    await server.deploy()
    assert "'offline'" in (await created(server, 403))["error"]
    id = (await created(server, model="sonnet"))["id"]
    await server.call("PATCH", f"/api/sessions/{id}/config", {"model": None}, expect=403)


async def test_a_block_that_the_provider_would_fetch_is_refused_before_the_turn(start_server: Start, put: Put) -> None:
    server = await start_server()
    id = await server.session()
    blocks = [{"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}]
    refused = await server.call("POST", f"/api/sessions/{id}/messages", {"content": blocks}, expect=403)
    assert "'url_source'" in refused["error"]
    put('[models]\nprovider_features = ["url_source"]\n')
    assert server.parts.policies.reload()
    assert await server.frames(id, blocks)


# Limits


async def test_a_session_gets_the_servers_limits_and_shows_them(server: Server) -> None:
    await server.deploy()
    session = await created(server)
    config = server.parts.config
    assert session["limits"] == {
        "memoryMb": config.memory_mb, "cpuPercent": config.cpu_percent, "maxProcesses": config.max_processes,
        "maxFileMb": config.max_file_mb, "diskMb": config.disk_mb, "maxFiles": config.max_files, "cpuWeight": config.cpu_weight,
        "ioMbPerSecond": config.io_mb_per_second, "toolTimeout": config.tool_timeout, "turnTimeout": config.turn_timeout,
        "idleTimeout": config.idle_timeout,
    }  # fmt: skip
    assert "limits" not in session["config"]
    assert server.sandboxes.claimed[0].inits[0][1]["toolTimeout"] == config.tool_timeout
    assert "limits" not in server.sandboxes.claimed[0].inits[0][1]


async def test_the_session_comes_before_the_agent_and_the_agent_before_the_server(server: Server) -> None:
    await deploy(server, 201, body={"config": {"limits": {"memoryMb": 512, "maxProcesses": 64, "toolTimeout": 20}}})
    session = await created(server, limits={"memoryMb": 256, "turnTimeout": 30, "idleTimeout": None})
    shown = session["limits"]
    assert (shown["memoryMb"], shown["maxProcesses"], shown["toolTimeout"], shown["turnTimeout"]) == (256, 64, 20, 30)
    assert (shown["cpuPercent"], shown["idleTimeout"]) == (server.parts.config.cpu_percent, server.parts.config.idle_timeout)
    sandbox = server.sandboxes.claimed[0]
    assert sandbox.spec.limits is not None
    assert (sandbox.spec.limits.memory_mb, sandbox.spec.limits.max_processes) == (256, 64)
    assert sandbox.inits[0][1]["toolTimeout"] == 20
    assert (await server.call("GET", f"/api/sessions/{session['id']}"))["session"]["limits"] == shown


@pytest.mark.parametrize(("given", "words"), [
    ([], "limits must be an object"), ({"memory": 5}, "there is no limit 'memory'"),
    ({"memoryMb": "x"}, "limits.memoryMb must be a whole number"),
    ({"memoryMb": 1}, "limits.memoryMb must be from 32 up"), ({"memoryMb": 4096}, "4096 is more than this server allows (2048)"),
    ({"diskMb": 0}, "limits.diskMb: 0, no limit, is more than"), ({"turnTimeout": 1e9}, "limits.turnTimeout"),
])  # fmt: skip
async def test_limits_beyond_the_maximum_or_malformed_are_refused_by_name(server: Server, given: Any, words: str) -> None:
    await server.deploy()
    assert words in (await created(server, 400, limits=given))["error"]
    if isinstance(given, dict):
        refused = await deploy(server, 400, body={"config": {"limits": given}})
        assert words.replace("limits.", "config.limits.", 1) in refused["error"]
    assert (await server.call("GET", "/api/sessions"))["sessions"] == []


async def test_a_policy_raises_and_lowers_the_maximum_and_may_do_so_for_one_agent(start_server: Start, put: Put) -> None:
    put("[limits]\nmemory_mb = 1024\nmax_processes = 1000\n[agents.big.limits]\nmemory_mb = 8192\n")
    server = await start_server()
    await deploy(server, 201)
    await deploy(server, 201, body={"name": "big"})
    assert (await created(server))["limits"]["memoryMb"] == 1024, "the server's own 2048 would be more than the policy allows"
    assert (await created(server, limits={"maxProcesses": 900}))["limits"]["maxProcesses"] == 900
    assert (await created(server))["limits"]["maxProcesses"] == server.parts.config.max_processes, "more is only for who asks"
    assert "(1024)" in (await created(server, 400, limits={"memoryMb": 2048}))["error"]
    assert (await created(server, agent="big", limits={"memoryMb": 8000}))["limits"]["memoryMb"] == 8000
    assert (await created(server, agent="big"))["limits"]["memoryMb"] == 2048


async def test_limits_survive_sleep_and_fork_and_are_clamped_when_the_policy_was_lowered(
    start_server: Start, put: Put, caplog: pytest.LogCaptureFixture
) -> None:
    server = await start_server()
    await server.deploy()
    id = (await created(server, limits={"memoryMb": 1500, "turnTimeout": 50}))["id"]
    fork = (await server.call("POST", f"/api/sessions/{id}/fork", expect=201))["session"]
    assert (fork["limits"]["memoryMb"], fork["limits"]["turnTimeout"]) == (1500, 50)
    put("[limits]\nmemory_mb = 1000\n")
    assert server.parts.policies.reload()
    path = f"/api/sessions/{id}"
    assert (await server.call("GET", path))["session"]["limits"]["memoryMb"] == 1500, "its sandbox was started with them"
    await server.call("POST", f"{path}/pause", expect=200)
    assert (await server.call("GET", path))["session"]["limits"]["memoryMb"] == 1000, "what its next sandbox gets"
    await server.call("POST", f"{path}/resume", expect=200)
    await eventually(lambda: len(server.sandboxes.claimed) == 2)
    spec = server.sandboxes.claimed[1].spec
    assert spec.limits is not None
    assert spec.limits.memory_mb == 1000
    assert f"session {id} gets a memory_mb of 1000, not the 1500 asked for" in caplog.text
    put("")
    assert server.parts.policies.reload()
    await server.call("POST", f"{path}/pause", expect=200)
    assert (await server.call("GET", path))["session"]["limits"]["memoryMb"] == 1500, "what it asked for was not forgotten"


async def test_an_agent_from_before_the_policy_was_lowered_still_starts_with_less(start_server: Start, put: Put) -> None:
    server = await start_server()
    await deploy(server, 201, body={"config": {"limits": {"memoryMb": 1500}}})
    put("[limits]\nmemory_mb = 1000\n")
    assert server.parts.policies.reload()
    assert (await created(server))["limits"]["memoryMb"] == 1000


async def test_an_agent_whose_stored_limits_are_wrong_says_so(server: Server) -> None:
    await server.deploy()
    agent = await server.parts.agents.get(DEFAULT_TENANT, "helper")
    await server.parts.store.put_agent(DEFAULT_TENANT, "helper", agent.digest, None, {"limits": {"memoryMb": "lots"}})
    assert "config.limits.memoryMb must be a whole number; deploy it again" in (await created(server, 422))["error"]


async def test_warm_sandboxes_are_those_of_a_session_that_asks_for_nothing(start_server: Start, put: Put) -> None:
    put("[limits]\nmemory_mb = 1024\n")
    server = await start_server()
    await server.deploy()
    await created(server)
    spec = server.sandboxes.claimed[0].spec
    assert spec.limits == server.sandboxes.limits
    assert isinstance(spec.limits, Limits)
    assert spec.limits.memory_mb == 1024


async def test_a_turn_beyond_its_limit_ends_with_an_event_and_words_that_say_which(server: Server) -> None:
    await server.deploy()
    id = (await created(server, limits={"turnTimeout": 1}))["id"]
    server.sandboxes.script = fakes.wait
    events = await turn(server, id)
    *_, limit, failed, end = events
    assert (limit.type, limit.data["limit"]) == (models.LIMIT_REACHED, "turn_time")
    assert (
        failed.data["error"] == limit.data["message"] == "the turn took longer than 1 s, the session's limit (turn_timeout), and was ended"
    )
    assert end.data["status"] == "failed"
    server.sandboxes.script = fakes.echo
    assert (await turn(server, id))[-1].data["status"] == "completed", "the session goes on"


async def test_a_session_gives_up_its_processes_after_its_own_idle_time(server: Server) -> None:
    await server.deploy()
    await created(server)
    await created(server, limits={"idleTimeout": 0.2})
    patient, hasty = server.sandboxes.claimed
    await eventually(lambda: hasty.is_gone, 20)
    assert not patient.is_gone


async def test_exec_takes_no_longer_than_a_tool(server: Server) -> None:
    await server.deploy()
    id = (await created(server, limits={"toolTimeout": 2}))["id"]
    await server.call("POST", f"/api/sessions/{id}/exec", {"command": "sleep 99", "timeout": 90_000}, expect=200)
    await server.call("POST", f"/api/sessions/{id}/exec", {"command": "true", "timeout": 500}, expect=200)
    assert [options["timeout"] for _, options in server.sandboxes.claimed[0].commands] == [2, 0.5]


async def test_a_tool_that_runs_longer_than_the_hang_limit_is_no_hung_session(start_server: Start) -> None:
    server = await start_server(hang_timeout=1)
    await server.deploy()
    id = (await created(server, limits={"toolTimeout": 600}))["id"]

    async def long_tool(sandbox: fakes.FakeSandbox, turn_id: str, content: Any, options: models.Json) -> Any:
        for _ in range(6):
            await asyncio.sleep(0.3)
            yield {"ev": "message", "turn_id": turn_id, "data": {"type": "tool_progress", "elapsed_time_seconds": 1}}
        yield {"ev": "done", "turn_id": turn_id, "status": "completed"}

    server.sandboxes.script = long_tool
    assert (await turn(server, id))[-1].data["status"] == "completed"


async def test_limits_of_an_agent_that_are_no_object_are_refused(server: Server) -> None:
    with pytest.raises(InvalidRequest, match=r"config\.limits must be an object"):
        server.parts.sessions.check_agent_limits(DEFAULT_TENANT, "a", {"limits": 5})
