"""Egress as a part of the server: what an agent's settings ask for, what the API shows, what metrics count."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ash.dialect import frame
from ash.models import EGRESS_RECORDED, EGRESS_REFUSED, Event, Json, new_id
from tests.egress.network import Way, status
from tests.harness import Server, eventually


def upload(settings: Any, local: Any = None) -> Json:
    import base64

    files = {"CLAUDE.md": "be kind", ".claude/settings.json": json.dumps(settings, indent=1)}
    if local is not None:
        files[".claude/settings.local.json"] = json.dumps(local)
    entries = [{"path": path, "content": base64.b64encode(text.encode()).decode()} for path, text in files.items()]
    return {"name": "helper", "files": entries}


def network(**lists: list[Any]) -> Json:
    return {"sandbox": {"network": lists}}


async def session_of(server: Server) -> tuple[str, Way]:
    """A session on the agent, and its sandbox's socket as a program inside has it."""
    id = (await server.call("POST", "/api/sessions", {"agent": "helper"}, expect=201))["session"]["id"]
    folder = os.path.join(server.sandboxes.claimed[-1].handle.run_dir, "gw")
    return id, Way(server.parts.egress, folder, [], None)  # type: ignore[arg-type]


async def events(server: Server, id: str) -> list[Json]:
    rows = (await server.call("GET", f"/api/sessions/{id}/events", expect=200))["events"]
    return [json.loads(row["data"]) for row in rows if row["type"] == "lifecycle"]


async def test_an_agents_hosts_come_from_both_its_settings_files(server: Server) -> None:
    await server.call(
        "POST", "/api/agents", upload(network(allowedDomains=["a.test"]), network(allowedDomains=["b.test"], deniedDomains=["c.test"]))
    )
    id, way = await session_of(server)
    asked = {name: await way.get(f"http://{name}/") for name in ("a.test", "b.test", "c.test", "d.test")}
    words = {name: answer.partition(b"Ash-Egress: ")[2].partition(b"\r\n")[0].decode() for name, answer in asked.items()}
    assert words == {"a.test": "not_allowed", "b.test": "not_allowed", "c.test": "denied", "d.test": "not_asked"}
    assert (await server.call("GET", f"/api/sessions/{id}"))["session"]["egress"] == {"hosts": {}, "refused": 4}


async def test_what_an_agent_asks_for_is_not_reported_as_ignored(server: Server) -> None:
    made = await server.call("POST", "/api/agents", upload(network(allowedDomains=["pypi.org", "*.example.com", "host:8443"])), expect=201)
    assert "ignored" not in made["agent"]["config"]


async def test_a_host_that_is_none_is_refused_at_deploy_with_file_and_line(server: Server) -> None:
    answer = await server.call("POST", "/api/agents", upload(network(allowedDomains=["https://pypi.org/"])), expect=400)
    assert answer["error"].startswith(".claude/settings.json line 4: sandbox.network.allowedDomains: 'https://pypi.org/'")
    others: list[Json] = [network(deniedDomains=[7]), {"sandbox": []}, {"sandbox": {"network": {"allowedDomains": "pypi.org"}}}]
    for wrong in others:
        await server.call("POST", "/api/agents", upload(wrong), expect=400)


async def test_settings_from_before_they_were_checked_allow_nothing(server: Server) -> None:
    made = (await server.call("POST", "/api/agents", upload(network(allowedDomains=["pypi.org"])), expect=201))["agent"]
    folder = Path(server.parts.config.data_dir, made["path"])
    (folder / ".claude").chmod(0o755)
    for text in (json.dumps(network(allowedDomains=["a b"])), "{"):
        (folder / ".claude" / "settings.json").unlink()
        (folder / ".claude" / "settings.json").write_text(text)
        server.parts.agents._networks.clear()
        assert await server.parts.agents.network(folder.name) == ((), ())


async def test_refusals_are_in_the_log_and_in_the_timeline_but_not_in_message_streams(server: Server) -> None:
    await server.deploy()
    id, way = await session_of(server)
    assert status(await way.get("http://evil.test/")) == 403
    shown = await eventually(lambda: _refused(server, id))
    assert shown[0]["host"] == "evil.test"
    assert shown[0]["action"] == "egress_refused"
    assert [frame.event for frame in await server.frames(id)].count("egress.refused") == 0


async def _refused(server: Server, id: str) -> list[Json]:
    return [data for data in await events(server, id) if data["action"] == "egress_refused"]


def test_no_stream_of_messages_shows_these_events() -> None:
    for kind in (EGRESS_REFUSED, EGRESS_RECORDED):
        assert frame(Event(new_id(), 1, kind, {}, "2026-01-01T00:00:00.000Z")) is None


async def test_at_a_sandboxs_end_its_sums_are_in_the_log(server: Server) -> None:
    await server.deploy()
    id, way = await session_of(server)
    await way.get("http://evil.test/")
    await server.call("POST", f"/api/sessions/{id}/pause", expect=200)
    sums = [data for data in await events(server, id) if data["action"] == "egress_recorded"]
    assert sums == [{"action": "egress_recorded", "hosts": {}, "refused": 1}]
    assert (await server.call("GET", f"/api/sessions/{id}"))["session"]["egress"] is None


async def test_metrics_count_refusals_by_reason(server: Server) -> None:
    await server.deploy()
    _, way = await session_of(server)
    await way.get("http://evil.test/")
    text = await server.call("GET", "/metrics", expect=200)
    assert 'ash_egress_refused_total{reason="not_asked"} 1' in text
    assert "ash_egress_connections_total 0" in text
