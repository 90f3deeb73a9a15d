"""/health and /metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from ash import __version__, models
from tests import fakes
from tests.harness import Server, eventually

POOL = {"total", "cold", "warming", "warm", "waiting", "running", "maxCapacity", "resumeWarmHits", "resumeColdHits", "preWarmHits"}


async def test_health_has_what_typed_clients_need_and_says_how_the_server_runs(server: Server) -> None:
    health = await server.call("GET", "/health", expect=200)
    assert (health["status"], health["version"], health["auth"]) == ("ok", __version__, "local")
    assert health["pool"].keys() == POOL
    assert all(isinstance(health[name], int) for name in ("activeSessions", "activeSandboxes", "uptime", "remoteRunners"))
    assert all(isinstance(count, int) for count in health["pool"].values())
    assert health["limits"]
    assert health["model"]["provider"] == "offline"


async def test_health_counts_sessions_and_sandboxes(server: Server) -> None:
    server.sandboxes.script = fakes.wait
    id = await server.session()
    await server.session()
    await server.parts.sessions.send("default", id, "hi", {})
    health = await server.call("GET", "/health")
    assert (health["activeSessions"], health["activeSandboxes"]) == (2, 2)
    assert (health["pool"]["total"], health["pool"]["running"], health["pool"]["waiting"]) == (2, 1, 1)


async def test_unisolated_agents_that_may_call_the_api_are_a_warning(start_server: Callable[..., Awaitable[Server]]) -> None:
    server = await start_server(sandbox="none")
    assert any("--auth always" in warning for warning in (await server.call("GET", "/health"))["warnings"])


async def metrics(server: Server) -> dict[str, float]:
    async with server.http.get(server.url + "/metrics") as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        lines = (await answer.text()).splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


async def test_metrics_count_what_happened(server: Server) -> None:
    id = await server.session()
    await server.frames(id)
    server.sandboxes.script = fakes.fail
    await server.frames(id)
    await server.call("POST", f"/api/sessions/{await server.session()}/pause")
    usage = {"model": "m", "input_tokens": 7, "output_tokens": 3}
    _ = await server.parts.log.append(id, [models.NewEvent(models.USAGE_RECORDED, usage)])
    found = await metrics(server)
    assert found['ash_turns_total{status="completed"}'] == found['ash_turns_total{status="failed"}'] == 1
    assert found["ash_turns_started_total"] == 2
    assert (found["ash_active_sessions"], found['ash_sessions{status="paused"}']) == (1, 1)
    assert (found['ash_tokens_total{kind="input"}'], found['ash_tokens_total{kind="output"}']) == (7, 3)


async def test_a_session_that_wakes_is_counted(server: Server) -> None:
    id = await server.session()
    await server.call("POST", f"/api/sessions/{id}/stop")
    await server.call("POST", f"/api/sessions/{id}/resume")
    await eventually(lambda: len(server.sandboxes.claimed) == 2)
    found = await metrics(server)
    assert found['ash_resume_total{path="cold"}'] == found['ash_resume_cold_total{source="local"}'] == 1


async def test_a_session_has_series_of_what_it_uses_while_it_has_a_sandbox(server: Server) -> None:
    id, other = await server.session(), await server.session()
    found = await metrics(server)
    assert found[f'ash_session_memory_bytes{{session="{id}"}}'] == fakes.USAGE["memoryBytes"]
    assert found["ash_sandboxes_memory_bytes"] == 2 * fakes.USAGE["memoryBytes"]
    assert found['ash_pressure_percent{scope="host",resource="cpu",kind="some"}'] == 1.5
    assert not any('resource="io"' in name for name in found)
    for session in (id, other):
        await server.call("POST", f"/api/sessions/{session}/stop")
    assert not any(name.startswith("ash_session_") for name in await metrics(server))


async def test_a_limit_that_a_session_met_is_counted(server: Server) -> None:
    id = await server.session()
    server.sandboxes.claimed[0].met = [{"limit": "processes", "message": "too many"}]
    await server.frames(id)
    found = await metrics(server)
    assert (found['ash_limits_reached_total{limit="processes"}'], found['ash_limits_reached_total{limit="memory"}']) == (1, 0)


async def test_every_metric_is_described_once(server: Server) -> None:
    await server.session()
    async with server.http.get(server.url + "/metrics") as answer:
        lines = (await answer.text()).splitlines()
    described = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(described) == len(set(described))
    samples = {line.partition("{")[0].partition(" ")[0] for line in lines if not line.startswith("#")}
    assert samples == set(described)


@pytest.mark.parametrize("path", ["/health", "/metrics"])
async def test_a_head_request_gets_no_body(server: Server, path: str) -> None:
    async with server.http.head(server.url + path) as answer:
        assert (answer.status, await answer.read()) == (200, b"")


async def test_metrics_tell_who_was_refused_and_who_gave_way(
    start_server: Callable[..., Awaitable[Server]], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await start_server(max_sandboxes=1)
    id = await server.session()
    server.parts.sessions._live[id].idle_since -= 60
    await server.session()
    status = server.sandboxes.status()._replace(
        counts={"refused_memory": 3, "second_starts": 2, "evictions": 4}, waiting=5, start_seconds=0.25
    )
    monkeypatch.setattr(server.sandboxes, "status", lambda: status)
    found = await metrics(server)
    assert (found['ash_starts_refused_total{reason="memory"}'], found['ash_starts_refused_total{reason="disk"}']) == (3, 0)
    assert (found["ash_second_starts_total"], found["ash_pool_evictions_total"], found["ash_starts_waiting"]) == (2, 4, 5)
    assert (found["ash_hibernations_for_room_total"], found['ash_start_seconds{quantile="0.5"}']) == (1, 0.25)


@pytest.mark.parametrize(("setting", "is_warned"), [("0", False), ("1", True)])
async def test_health_warns_when_programs_may_trace_each_other(
    setting: str, is_warned: bool, start_server: Callable[..., Awaitable[Server]]
) -> None:
    server = await start_server(sandbox_ptrace=setting)
    warnings = (await server.call("GET", "/health"))["warnings"]
    assert any("--sandbox-ptrace" in warning for warning in warnings) is is_warned
