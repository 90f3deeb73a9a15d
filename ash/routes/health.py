"""/health, for anybody who may reach the port, and /metrics in the Prometheus text format. It shows counters and no session's content."""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections.abc import Iterator
from typing import Any

from aiohttp import web

from ash import __version__
from ash.auth import GUARD
from ash.models import ACTIVE, Json
from ash.routes.parts import Parts, parts

_COORDINATOR = f"{platform.node()}-{os.getpid()}"
_RESOURCES = (
    ("memory_bytes", "gauge", "memoryBytes", "Memory in use"),
    ("processes", "gauge", "processes", "Processes and threads"),
    ("cpu_seconds", "gauge", "cpuSeconds", "CPU time since their start"),
)
_REFUSALS = ("queue", "capacity", "memory", "disk", "descriptors", "processes")
_Sample = tuple[dict[str, str], float]


async def health(request: web.Request) -> web.Response:
    here = parts(request)
    status = here.sessions.status()
    counts = await here.store.count_sessions()
    pool = status["pool"]
    return web.json_response({
        "status": "ok",
        "version": __version__,
        "coordinatorId": _COORDINATOR,
        "activeSessions": counts[ACTIVE],
        "activeSandboxes": status["active_sandboxes"],
        "remoteRunners": 0,
        "uptime": _uptime(here),
        "pool": {**_pool_states(status), "maxCapacity": pool.maximum, **_resume_hits(status)},
        "auth": "local" if request.app[GUARD].trusts_local else "always",
        "isolation": pool.isolation,
        "limits": pool.limits,
        "model": here.gateway.describe(),
        "warnings": warnings(here, request.app[GUARD].trusts_local),
    })  # fmt: skip


def warnings(here: Parts, trusts_local: bool) -> list[str]:
    """What an operator should know about how this server runs."""
    found = list(here.sandboxes.status().warnings)
    if notice := here.gateway.describe().get("notice"):
        found.append(notice)
    if here.policies.problem:
        found.append("The policy file was refused when it was last read, and the policy before it is in force; `ash policy` says why")
    if here.config.sandbox_ptrace:
        found.append("The programs of an agent may trace each other (--sandbox-ptrace)")
    if here.config.sandbox == "none" and trusts_local:
        found.append("With --sandbox none agents are processes of the server's user, who needs no key for this API; use --auth always")
    return found


def _uptime(here: Parts) -> int:
    return int(time.monotonic() - here.started)


def _pool_states(status: Json) -> dict[str, int]:
    """Every sandbox in one state: being started, ready for anyone, in a turn, or between two turns of its session."""
    pool = status["pool"]
    running = min(status["running_turns"], pool.running)
    return {
        "total": pool.total, "cold": 0, "warming": pool.starting, "warm": pool.warm,
        "waiting": pool.running - running, "running": running,
    }  # fmt: skip


def _resume_hits(status: Json) -> dict[str, int]:
    return {"resumeWarmHits": 0, "resumeColdHits": status["wakes"], "preWarmHits": status["pool"].warm_claims}


async def metrics(request: web.Request) -> web.Response:
    here = parts(request)
    status, counts, usage = here.sessions.status(), await here.store.count_sessions(), await here.store.usage_totals(None)
    by_session, rest = await here.sessions.usages()
    pressure = await asyncio.to_thread(here.sandboxes.pressure)
    families = (*_families(here, status, counts, usage), *_resource_families(by_session, rest, pressure))
    lines = [line for name, kind, help, samples in families if samples for line in _render(name, kind, help, samples)]
    return web.Response(
        body=("\n".join(lines) + "\n").encode(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
    )  # fmt: skip


def _families(here: Parts, status: Json, counts: dict[str, int], usage: dict[str, int]) -> Iterator[tuple[str, str, str, list[_Sample]]]:
    pool, states = status["pool"], _pool_states(status)
    del states["total"]
    yield "ash_up", "gauge", "1 while the server answers.", [({"coordinator": _COORDINATOR}, 1)]
    yield "ash_build_info", "gauge", "The version that runs.", [({"version": __version__}, 1)]
    yield "ash_uptime_seconds", "gauge", "Seconds since the start.", [({}, _uptime(here))]
    yield "ash_active_sessions", "gauge", "Sessions with status active.", [({}, counts[ACTIVE])]
    yield "ash_sessions", "gauge", "Sessions by status.", _by("status", counts)
    yield "ash_active_sandboxes", "gauge", "Sandboxes that belong to a session.", [({}, status["active_sandboxes"])]
    yield "ash_pool_sandboxes", "gauge", "Sandboxes by state.", _by("state", states)
    yield "ash_pool_max_capacity", "gauge", "Most sandboxes at once.", [({}, pool.maximum)]
    yield "ash_resume_total", "counter", "Sandboxes given to sessions.", _by("path", {
        "warm": 0, "cold": status["wakes"], "prewarm": pool.warm_claims,
    })  # fmt: skip
    yield "ash_resume_cold_total", "counter", "Sessions that woke, by where their files were.", _by("source", {
        "local": status["wakes"], "cloud": 0, "fresh": 0,
    })  # fmt: skip
    yield "ash_cold_starts_total", "counter", "Sandboxes started because no warm one waited.", [({}, pool.cold_starts)]
    yield "ash_hibernations_total", "counter", "Sandboxes that idle sessions gave up.", [({}, status["hibernations"])]
    yield "ash_hibernations_for_room_total", "counter", "Those of them given up because another needed room.", [({}, status["made_room"])]
    yield from _door_families(status)
    yield "ash_limits_reached_total", "counter", "Limits that sessions met.", _by("limit", status["limits_reached"])
    yield "ash_turns_started_total", "counter", "Turns started.", [({}, status["turns_started"])]
    yield "ash_turns_running", "gauge", "Turns under way.", [({}, status["running_turns"])]
    yield "ash_turns_total", "counter", "Turns ended, by how.", _by("status", status["turns_by_status"])
    yield from _egress_families(here.egress.status())
    yield "ash_tokens_total", "counter", "Tokens of all model calls on record.", _by("kind", _token_counts(usage))


def _door_families(status: Json) -> Iterator[tuple[str, str, str, list[_Sample]]]:
    """What happened at the door to new sandboxes."""
    pool = status["pool"]
    refusals = {reason: pool.counts.get(f"refused_{reason}", 0) for reason in _REFUSALS}
    yield "ash_starts_refused_total", "counter", "Sandboxes that were refused, by what was short.", _by("reason", refusals)
    yield "ash_starts_waiting", "gauge", "Starts that wait for others to be done.", [({}, pool.waiting)]
    yield "ash_start_seconds", "gauge", "What the last starts took.", _by("quantile", {
        "0.5": pool.start_seconds, "0.95": pool.slow_start_seconds,
    })  # fmt: skip
    yield "ash_second_starts_total", "counter", "Slow starts that got another beside them.", [({}, pool.counts.get("second_starts", 0))]
    yield "ash_sandboxes_replaced_total", "counter", "Sandboxes replaced for not taking their agent.", [({}, status["replaced"])]
    yield "ash_pool_evictions_total", "counter", "Warm sandboxes ended for want of room.", [({}, pool.counts.get("evictions", 0))]


def _resource_families(by_session: Json, rest: Json, pressure: Json) -> Iterator[tuple[str, str, str, list[_Sample]]]:
    """What sandboxes use. A session has series of its own only while it has a sandbox, so there are never more than sandboxes."""
    every = (*by_session.values(), *rest.values())
    for name, kind, field, help in _RESOURCES:
        total = sum(usage[field] or 0 for usage in every)
        yield f"ash_sandboxes_{name}", "gauge", f"{help}, all sandboxes alive together.", [({}, total)]
        values = {id: usage[field] for id, usage in by_session.items() if usage[field] is not None}
        yield f"ash_session_{name}", kind, f"{help}, by session with a sandbox.", _by("session", values)
    waits = [
        ({"scope": scope, "resource": resource, "kind": kind}, found[f"{kind}10"])
        for scope, resources in pressure.items()
        for resource, found in resources.items() if found is not None
        for kind in ("some", "full")
    ]  # fmt: skip
    yield "ash_pressure_percent", "gauge", "Part of the last 10 s in which some, or all, of the work waited for a resource.", waits


def _egress_families(egress: Json) -> Iterator[tuple[str, str, str, list[_Sample]]]:
    yield "ash_egress_connections", "gauge", "Connections of sandboxes to the egress proxy.", [({}, egress["open"])]
    yield "ash_egress_connections_total", "counter", "Connections made to hosts for sandboxes.", [({}, egress["connections"])]
    yield "ash_egress_bytes_total", "counter", "Bytes passed between sandboxes and hosts.", _by("direction", egress["bytes"])
    yield "ash_egress_refused_total", "counter", "Requests of sandboxes that were refused, by why.", _by("reason", egress["refused"])
    yield "ash_egress_failed_total", "counter", "Connections to hosts that failed.", [({}, egress["failed"])]


def _token_counts(usage: dict[str, int]) -> dict[str, int]:
    kinds = {"input": "input_tokens", "output": "output_tokens",
             "cache_creation": "cache_creation_input_tokens", "cache_read": "cache_read_input_tokens"}  # fmt: skip
    return {kind: usage.get(name, 0) for kind, name in kinds.items()}


def _by(label: str, values: dict[str, Any]) -> list[_Sample]:
    return [({label: word}, value) for word, value in values.items()]


def _render(name: str, kind: str, help: str, samples: list[_Sample]) -> Iterator[str]:
    yield f"# HELP {name} {help}"
    yield f"# TYPE {name} {kind}"
    for labels, value in samples:
        inner = ",".join(f'{label}="{_escape(word)}"' for label, word in labels.items())
        yield f"{name}{{{inner}}} {value}" if inner else f"{name} {value}"


def _escape(word: str) -> str:
    return word.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


ROUTES = (web.get("/health", health), web.get("/metrics", metrics))
