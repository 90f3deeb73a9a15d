"""Sessions and turns over a real store and log, with sandboxes that play scripts: every turn ends once, and nothing is forgotten."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from ash import models
from ash.config import Config
from ash.errors import CapacityReached, InvalidRequest, Overloaded, SandboxFailed, SessionEnded, StoreFailed, TurnRunning
from ash.models import DEFAULT_TENANT, Event
from tests import fakes
from tests.harness import Server, eventually, serving

Start = Callable[..., Awaitable[Server]]


async def log_of(server: Server, id: str) -> list[Event]:
    return await server.parts.log.read(id)


async def turn(server: Server, id: str, content: str = "Hello", **options: object) -> list[Event]:
    """The events of one turn, up to its end."""
    started = await server.parts.sessions.send(DEFAULT_TENANT, id, content, dict(options))
    return await rest_of_turn(server, id, started.first_seq)


async def rest_of_turn(server: Server, id: str, first_seq: int) -> list[Event]:
    events: list[Event] = []
    async with asyncio.timeout(5):
        async for batch in server.parts.log.follow(id, first_seq - 1):
            for event in batch:
                events.append(event)
                if event.type == models.TURN_ENDED:
                    return events
    return events


def ending(events: list[Event]) -> tuple[str, str | None]:
    """How a turn ended, and the error it gave before."""
    errors = [event.data["error"] for event in events if event.type == models.TURN_FAILED]
    assert [event.type for event in events].count(models.TURN_ENDED) == 1
    assert len(errors) <= 1
    return events[-1].data["status"], errors[0] if errors else None


async def test_a_turn_is_logged_from_its_first_event_to_its_one_last(start_server: Start) -> None:
    server = await start_server()
    events = await turn(server, await server.session())
    assert events[0].type == models.TURN_STARTED
    assert [event.seq for event in events] == list(range(events[0].seq, events[0].seq + len(events)))
    assert ending(events) == ("completed", None)


async def test_a_sandbox_that_ran_out_of_memory_says_so_in_its_turn_and_the_session_stays_usable(start_server: Start) -> None:
    server = await start_server()
    id = await server.session()
    server.sandboxes.script = fakes.exhaust
    events = await turn(server, id)
    assert ending(events) == ("failed", "the sandbox ran out of memory")
    assert [event.data for event in events if event.type == models.LIMIT_REACHED] == [
        {"limit": "memory", "message": "the sandbox ran out of memory"}
    ]
    assert events[-3].type == models.LIMIT_REACHED
    server.sandboxes.script = fakes.echo
    assert ending(await turn(server, id)) == ("completed", None)


async def test_a_sandbox_that_ran_out_of_memory_between_turns_is_in_the_log(start_server: Start) -> None:
    server = await start_server()
    id = await server.session()
    sandbox = server.sandboxes.claimed[0]
    sandbox.limit_reached = "memory"
    sandbox.vanish("the sandbox ran out of memory")
    async for events in server.parts.log.follow(id, 0, types=(models.LIMIT_REACHED,)):
        assert [event.data["limit"] for event in events] == ["memory"]
        break


async def test_a_limit_that_was_met_and_outlived_is_noted_before_the_turns_end(start_server: Start) -> None:
    server = await start_server()
    id = await server.session()
    server.sandboxes.claimed[0].met = [{"limit": "processes", "message": "more were refused"}]
    events = await turn(server, id)
    assert ending(events) == ("completed", None)
    assert [event.data["limit"] for event in events if event.type == models.LIMIT_REACHED] == ["processes"]
    assert [event for event in await turn(server, id) if event.type == models.LIMIT_REACHED] == []


@pytest.mark.parametrize(
    ("script", "status", "words"),
    [(fakes.fail, "failed", "the model refused"), (fakes.die, "failed", "signal 9")],
)
async def test_a_failing_turn_gives_its_reason_and_leaves_the_session_usable(
    start_server: Start, script: fakes.Script, status: str, words: str
) -> None:
    server = await start_server()
    id = await server.session()
    server.sandboxes.script = script
    ended, error = ending(await turn(server, id))
    assert (ended, words in str(error)) == (status, True)
    server.sandboxes.script = fakes.echo
    assert ending(await turn(server, id)) == ("completed", None)


async def test_a_second_message_during_a_turn_is_refused(start_server: Start) -> None:
    server = await start_server()
    id = await server.session()
    server.sandboxes.script = fakes.wait
    first = await server.parts.sessions.send(DEFAULT_TENANT, id, "one", {})
    with pytest.raises(TurnRunning, match="already running"):
        await server.parts.sessions.send(DEFAULT_TENANT, id, "two", {})
    await eventually(lambda: server.sandboxes.claimed[0].queries)
    server.sandboxes.claimed[0].proceed.set()
    assert ending(await rest_of_turn(server, id, first.first_seq))[0] == "completed"


async def test_of_two_messages_at_once_exactly_one_runs(start_server: Start) -> None:
    server = await start_server()
    id = await server.session()
    sends = (server.parts.sessions.send(DEFAULT_TENANT, id, str(n), {}) for n in range(2))
    results = await asyncio.gather(*sends, return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["Turn", "TurnRunning"]


async def test_the_next_message_may_follow_done_at_once(start_server: Start) -> None:
    server = await start_server()
    id = await server.session()
    for _ in range(30):
        assert ending(await turn(server, id))[0] == "completed"


async def test_interrupt_ends_the_turn(start_server: Start) -> None:
    server = await start_server()
    id = await server.session()
    server.sandboxes.script = fakes.wait
    started = await server.parts.sessions.send(DEFAULT_TENANT, id, "long", {})
    await eventually(lambda: server.sandboxes.claimed[0].queries)
    assert await server.parts.sessions.interrupt(DEFAULT_TENANT, id)
    assert ending(await rest_of_turn(server, id, started.first_seq)) == ("interrupted", None)
    assert not await server.parts.sessions.interrupt(DEFAULT_TENANT, id), "there is nothing left to interrupt"


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"hang_timeout": 1.0}, "no sign of life"), ({"turn_timeout": 1.0}, "turn_timeout")],
)
async def test_a_turn_that_does_not_end_is_ended(start_server: Start, settings: dict[str, float], words: str) -> None:
    server = await start_server(**settings)
    id = await server.session()
    server.sandboxes.script = fakes.wait
    status, error = ending(await turn(server, id))
    assert (status, words in str(error)) == ("failed", True)


async def test_pause_gives_up_the_sandbox_and_resume_brings_the_conversation_back(start_server: Start) -> None:
    server = await start_server()
    sessions = server.parts.sessions
    id = await server.session(systemPrompt="Be kind.", extraEnv={"COLOUR": "red"}, allowedTools=["Read"])
    await turn(server, id, "first")
    assert (await sessions.pause(DEFAULT_TENANT, id)).status == "paused"
    await eventually(lambda: server.sandboxes.claimed[0].is_gone)
    with pytest.raises(InvalidRequest, match="Session is paused; resume it"):
        await sessions.send(DEFAULT_TENANT, id, "too early", {})
    assert (await sessions.resume(DEFAULT_TENANT, id)).status == "active"
    await turn(server, id, "second")
    _, options, transcript = server.sandboxes.claimed[1].inits[-1]
    assert [message["content"] for message in transcript if message["role"] == "user"] == ["first"]
    assert (options["systemPrompt"], options["env"], options["allowedTools"]) == ("Be kind.", {"COLOUR": "red"}, ["Read"])


async def test_ending_a_session_during_a_turn_interrupts_it(start_server: Start) -> None:
    server = await start_server()
    id = await server.session()
    server.sandboxes.script = fakes.wait
    started = await server.parts.sessions.send(DEFAULT_TENANT, id, "long", {})
    assert (await server.parts.sessions.end(DEFAULT_TENANT, id)).status == "ended"
    assert ending(await rest_of_turn(server, id, started.first_seq))[0] == "interrupted"
    assert (await server.parts.sessions.end(DEFAULT_TENANT, id)).status == "ended", "ending again changes nothing"
    with pytest.raises(SessionEnded):
        await server.parts.sessions.resume(DEFAULT_TENANT, id)


async def test_an_idle_session_gives_up_its_sandbox_and_wakes_with_its_next_message(start_server: Start) -> None:
    server = await start_server(idle_timeout=0.2)
    id = await server.session()
    await turn(server, id, "first")
    await eventually(lambda: server.sandboxes.claimed[0].is_gone)
    assert (await server.parts.sessions.get(DEFAULT_TENANT, id)).status == "active"
    assert ending(await turn(server, id, "second"))[0] == "completed"
    assert [message["content"] for message in server.sandboxes.claimed[1].inits[0][2]][:1] == ["first"]
    assert "second" not in str(server.sandboxes.claimed[1].inits[0][2]), "the new message is not part of the past"


async def test_a_changed_configuration_holds_from_the_next_message(start_server: Start) -> None:
    server = await start_server()
    id = await server.session()
    await turn(server, id, "first")
    changed = await server.parts.sessions.update_config(DEFAULT_TENANT, id, {"model": "other", "disallowedTools": ["Bash"]})
    assert (changed.model, changed.options["disallowedTools"]) == ("other", ["Bash"])
    await turn(server, id, "second")
    _, options, transcript = server.sandboxes.claimed[0].inits[-1]
    assert (options["model"], options["disallowedTools"]) == ("other", ["Bash"])
    assert transcript[0]["content"] == "first"


async def test_a_session_that_cannot_start_says_so_and_is_left_in_error(start_server: Start) -> None:
    server = await start_server()
    await server.deploy()
    server.sandboxes.broken = SandboxFailed("no interpreter")
    with pytest.raises(SandboxFailed, match="no interpreter"):
        await server.parts.sessions.create(DEFAULT_TENANT, "helper")
    [session], _ = await server.parts.sessions.list(DEFAULT_TENANT)
    assert session.status == "error"


async def test_a_wake_that_fails_ends_the_turn_with_its_reason(start_server: Start) -> None:
    server = await start_server()
    id = await server.session()
    server.sandboxes.claimed[0].vanish("gone")
    await eventually(lambda: not server.parts.sessions.status()["active_sandboxes"])
    server.sandboxes.broken = CapacityReached("Sandbox capacity reached")
    assert ending(await turn(server, id)) == ("failed", "Sandbox capacity reached")


async def test_the_next_server_ends_the_turns_that_the_last_one_left(start_server: Start, make_config: Callable[..., Config]) -> None:
    server = await start_server()
    id = await server.session()
    opened = await server.parts.log.append(id, [models.NewEvent(models.TURN_STARTED, {"turnId": "t", "content": "x"})])
    await server.runner.cleanup()
    async with serving(make_config()) as next_server:
        events = await next_server.parts.log.read(id, after=opened[0].seq - 1)
        status, error = ending(events)
        assert (status, "server stopped" in str(error)) == ("failed", True)
        assert ending(await turn(next_server, id))[0] == "completed"


async def test_a_stopping_server_ends_its_turns_first(start_server: Start) -> None:
    server = await start_server()
    id = await server.session()
    server.sandboxes.script = fakes.wait
    started = await server.parts.sessions.send(DEFAULT_TENANT, id, "long", {})
    await server.parts.sessions.drain()
    status, error = ending(await rest_of_turn(server, id, started.first_seq))
    assert (status, "shutting down" in str(error)) == ("failed", True)
    with pytest.raises(CapacityReached, match="shutting down"):
        await server.parts.sessions.send(DEFAULT_TENANT, id, "more", {})


async def test_a_fork_has_the_conversation_and_goes_its_own_way(start_server: Start) -> None:
    server = await start_server()
    id = await server.session()
    await turn(server, id, "shared")
    fork = await server.parts.sessions.fork(DEFAULT_TENANT, id)
    assert (fork.status, fork.parent_session_id) == ("paused", id)
    await server.parts.sessions.resume(DEFAULT_TENANT, fork.id)
    await turn(server, fork.id, "apart")
    assert "shared" in str(server.sandboxes.claimed[-1].inits[-1][2])
    assert "apart" not in str(await log_of(server, id))


async def test_a_command_runs_beside_a_turn_and_wakes_a_sleeping_session(start_server: Start) -> None:
    server = await start_server()
    id = await server.session()
    server.sandboxes.claimed[0].vanish("gone")
    await eventually(lambda: not server.parts.sessions.status()["active_sandboxes"])
    result = await server.parts.sessions.exec(DEFAULT_TENANT, id, "ls", timeout=3)
    assert (result.exit_code, result.stdout) == (0, "ran ls")
    assert len(server.sandboxes.claimed) == 2


async def test_nothing_of_an_ended_session_is_left_in_memory(start_server: Start) -> None:
    server = await start_server()
    id = await server.session()
    await turn(server, id)
    await server.parts.sessions.end(DEFAULT_TENANT, id)
    await eventually(lambda: not server.parts.sessions._live)
    assert not os.listdir(os.path.join(server.parts.config.data_dir, "run"))


# Interleavings


async def test_a_message_during_hibernation_wakes_the_one_session_there_is(start_server: Start) -> None:
    server = await start_server(idle_timeout=0.1)
    id = await server.session()
    server.sandboxes.gate.clear()  # the sandbox is given up, and takes its time
    await eventually(lambda: server.parts.sessions.status()["hibernations"])
    server.sandboxes.script = fakes.wait
    sending = asyncio.create_task(server.parts.sessions.send(DEFAULT_TENANT, id, "awake?", {}))
    await asyncio.sleep(0)
    server.sandboxes.gate.set()
    started = await sending
    assert server.parts.sessions.live(id)["turn"]["id"] == started.id
    with pytest.raises(TurnRunning):
        await server.parts.sessions.send(DEFAULT_TENANT, id, "again", {})
    await server.parts.sessions.end(DEFAULT_TENANT, id)
    await eventually(lambda: all(sandbox.is_gone for sandbox in server.sandboxes.claimed))


async def test_resume_during_pause_waits_for_it(start_server: Start) -> None:
    server = await start_server()
    sessions, id = server.parts.sessions, await server.session()
    server.sandboxes.gate.clear()
    pausing = asyncio.create_task(sessions.pause(DEFAULT_TENANT, id))
    await asyncio.sleep(0.05)
    resuming = asyncio.create_task(sessions.resume(DEFAULT_TENANT, id))
    server.sandboxes.gate.set()
    await asyncio.gather(pausing, resuming)
    await turn(server, id)
    assert sum(not sandbox.is_gone for sandbox in server.sandboxes.claimed) == 1
    actions = [event.data["action"] for event in await log_of(server, id) if event.type == models.SESSION_STATUS_CHANGED]
    assert actions == ["created", "paused", "resumed"]


async def test_ending_many_times_at_once_is_one_end(start_server: Start) -> None:
    server = await start_server()
    id = await server.session()
    ended = await asyncio.gather(*(server.parts.sessions.end(DEFAULT_TENANT, id) for _ in range(8)))
    assert {session.status for session in ended} == {"ended"}
    actions = [event.data.get("action") for event in await log_of(server, id)]
    assert actions.count("ended") == 1


async def test_interrupt_during_a_slow_start_ends_the_turn_at_once(start_server: Start) -> None:
    server = await start_server()
    id = await server.session()
    server.sandboxes.claimed[0].vanish("gone")
    await eventually(lambda: not server.parts.sessions.status()["active_sandboxes"])
    server.sandboxes.gate.clear()
    started = await server.parts.sessions.send(DEFAULT_TENANT, id, "slow", {})
    assert await server.parts.sessions.interrupt(DEFAULT_TENANT, id)
    assert ending(await rest_of_turn(server, id, started.first_seq)) == ("interrupted", None)
    server.sandboxes.gate.set()
    assert ending(await turn(server, id, "next"))[0] == "completed"


async def test_an_error_nobody_thought_of_ends_the_turn_too(start_server: Start) -> None:
    server = await start_server()
    id = await server.session()
    server.sandboxes.claimed[0].vanish("gone")
    await eventually(lambda: not server.parts.sessions.status()["active_sandboxes"])
    server.sandboxes.broken = OSError(24, "Too many open files")
    status, error = ending(await turn(server, id))
    assert (status, "internal error" in str(error)) == ("failed", True)
    with pytest.raises(OSError, match="Too many"):
        await server.parts.sessions.create(DEFAULT_TENANT, "helper")
    found, _ = await server.parts.sessions.list(DEFAULT_TENANT, status="error")
    assert len(found) == 1


async def test_events_that_cannot_be_dealt_with_end_their_sandbox_and_its_turn(
    start_server: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await start_server()
    id = await server.session()
    with monkeypatch.context() as patch:
        patch.setattr(models, "expand", lambda *_, **__: 1 / 0)
        status, error = ending(await turn(server, id))
    assert (status, "could not be recorded" in str(error)) == ("failed", True)
    assert server.sandboxes.claimed[0].is_gone
    assert ending(await turn(server, id))[0] == "completed"


async def flood(sandbox: fakes.FakeSandbox, turn_id: str, content: object, options: models.Json) -> AsyncIterator[models.Json]:
    """Talks for ever."""
    while True:
        yield {"ev": "message", "turn_id": turn_id, "data": fakes.assistant("x" * 100_000)}
        await asyncio.sleep(0)


async def test_a_turn_that_floods_its_log_is_ended(start_server: Start) -> None:
    server = await start_server(max_turn_mb=1)
    id = await server.session()
    server.sandboxes.script = flood
    status, error = ending(await turn(server, id))
    assert (status, "more than 1 MiB of events" in str(error)) == ("failed", True)
    assert server.sandboxes.claimed[0].is_gone


async def many_blocks(sandbox: fakes.FakeSandbox, turn_id: str, content: object, options: models.Json) -> AsyncIterator[models.Json]:
    yield {"ev": "message", "turn_id": turn_id, "data": {"type": "assistant", "message": {"content": [{}] * 5000}}}


async def test_a_message_of_thousands_of_blocks_ends_its_sandbox(start_server: Start) -> None:
    server = await start_server()
    id = await server.session()
    server.sandboxes.script = many_blocks
    status, error = ending(await turn(server, id))
    assert (status, "5000 blocks" in str(error)) == ("failed", True)


async def test_the_place_of_a_turn_is_free_only_when_its_end_is_recorded(start_server: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = await start_server()
    id = await server.session()
    append, refused = server.parts.log.append, list[str]()

    async def full_disk_once(session_id: str, events: list[models.NewEvent], *, sync: bool = False) -> list[Event]:
        if sync and not refused:
            refused.append(session_id)
            with pytest.raises(TurnRunning):
                await server.parts.sessions.send(DEFAULT_TENANT, id, "too early", {})
            raise StoreFailed("The disk is full")
        return await append(session_id, events, sync=sync)

    monkeypatch.setattr(server.parts.log, "append", full_disk_once)
    assert ending(await turn(server, id))[0] == "completed"
    assert refused == [id]
    assert ending(await turn(server, id))[0] == "completed"


async def test_a_change_during_the_wake_up_reaches_the_next_turn(start_server: Start) -> None:
    server = await start_server()
    sessions, id = server.parts.sessions, await server.session()
    await sessions.pause(DEFAULT_TENANT, id)
    server.sandboxes.gate.clear()
    await sessions.resume(DEFAULT_TENANT, id)
    await asyncio.sleep(0.05)
    changes = ({"allowedTools": ["Read"]}, {"model": "other"}, {"disallowedTools": ["Bash"]})
    await asyncio.gather(*(sessions.update_config(DEFAULT_TENANT, id, change) for change in changes))
    server.sandboxes.gate.set()
    await turn(server, id)
    _, options, _ = server.sandboxes.claimed[-1].inits[-1]
    assert (options["allowedTools"], options["disallowedTools"], options["model"]) == (["Read"], ["Bash"], "other")


async def test_a_command_that_wakes_the_session_does_not_show_it_the_new_message_twice(start_server: Start) -> None:
    server = await start_server()
    sessions, id = server.parts.sessions, await server.session()
    server.sandboxes.claimed[0].vanish("gone")
    await eventually(lambda: not sessions.status()["active_sandboxes"])
    started, _ = await asyncio.gather(sessions.send(DEFAULT_TENANT, id, "only once", {}), sessions.exec(DEFAULT_TENANT, id, "ls"))
    await rest_of_turn(server, id, started.first_seq)
    assert "only once" not in str([init[2] for sandbox in server.sandboxes.claimed for init in sandbox.inits])


async def test_a_session_keeps_the_environment_its_agent_had_when_it_began(start_server: Start) -> None:
    server = await start_server()
    deploy = server.parts.agents.deploy
    await deploy(DEFAULT_TENANT, "helper", files=None, path=None, system_prompt="x", env={"TOKEN": "old"}, config=None)
    id = (await server.parts.sessions.create(DEFAULT_TENANT, "helper")).id
    await deploy(DEFAULT_TENANT, "helper", files=None, path=None, system_prompt="x", env={"TOKEN": "new"}, config=None)
    await server.parts.sessions.pause(DEFAULT_TENANT, id)
    await server.parts.sessions.resume(DEFAULT_TENANT, id)
    await turn(server, id)
    assert server.sandboxes.claimed[-1].inits[-1][1]["env"] == {"TOKEN": "old"}
    assert "old" not in str(await server.call("GET", f"/api/sessions/{id}"))


async def test_refused_messages_leave_nothing_in_memory(start_server: Start) -> None:
    server = await start_server()
    id = await server.session()
    await server.parts.sessions.end(DEFAULT_TENANT, id)
    with pytest.raises(InvalidRequest):
        await server.parts.sessions.send(DEFAULT_TENANT, id, "hello?", {})
    await eventually(lambda: not server.parts.sessions._live)


# Room


async def idle(server: Server, count: int, seconds: float = 60.0) -> list[str]:
    """Sessions with a sandbox that were last used `seconds` ago, the first one earliest."""
    ids = [await server.session() for _ in range(count)]
    for place, id in enumerate(ids):
        server.parts.sessions._live[id].idle_since -= seconds + count - place
    return ids


def awake(server: Server) -> set[str]:
    return {id for id, live in server.parts.sessions._live.items() if live.sandbox is not None}


async def test_a_session_that_is_refused_at_the_door_leaves_nothing(start_server: Start) -> None:
    server = await start_server()
    await server.deploy()
    server.sandboxes.refusal = Overloaded("The server is short of memory", retry_after=4.2)
    async with server.http.post(f"{server.url}/api/sessions", json={"agent": "helper"}) as answer:
        assert (answer.status, answer.headers["Retry-After"], (await answer.json())["code"]) == (429, "5", "overloaded")
    assert (await server.parts.sessions.list(DEFAULT_TENANT))[0] == []
    assert not server.parts.sessions._live


async def test_a_message_that_no_sandbox_can_be_had_for_is_refused_before_its_turn(start_server: Start) -> None:
    server = await start_server()
    id = await server.session()
    server.sandboxes.claimed[0].vanish("gone")
    await eventually(lambda: not server.parts.sessions.status()["active_sandboxes"])
    server.sandboxes.refusal = Overloaded("The server is short of memory", retry_after=1)
    seen = len(await log_of(server, id))
    async with server.http.post(f"{server.url}/api/sessions/{id}/messages", json={"content": "Hi"}) as answer:
        assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
    assert len(await log_of(server, id)) == seen
    server.sandboxes.refusal = None
    assert ending(await turn(server, id))[0] == "completed"


async def test_a_full_server_hibernates_the_session_that_was_idle_longest(start_server: Start) -> None:
    server = await start_server(max_sandboxes=3)
    ids = await idle(server, 3)
    await turn(server, ids[0])  # now the second one is the oldest
    newcomer = await server.session()
    assert awake(server) == {ids[0], ids[2], newcomer}
    assert ending(await turn(server, ids[1]))[0] == "completed", "it lost nothing but its processes"
    assert awake(server) == {ids[0], ids[1], newcomer}
    assert (await server.parts.sessions.get(DEFAULT_TENANT, ids[2])).status == "active"
    status = server.parts.sessions.status()
    assert (status["made_room"], status["hibernations"]) == (2, 2)


async def test_a_new_session_takes_nothing_from_those_that_were_just_used_but_one_that_goes_on_does(start_server: Start) -> None:
    server = await start_server(max_sandboxes=2)
    sleeper = await server.session()
    await server.parts.sessions.pause(DEFAULT_TENANT, sleeper)
    busy = [await server.session() for _ in range(2)]
    with pytest.raises(CapacityReached, match="capacity reached"):
        await server.parts.sessions.create(DEFAULT_TENANT, "helper")
    await server.parts.sessions.resume(DEFAULT_TENANT, sleeper)
    assert ending(await turn(server, sleeper))[0] == "completed"
    assert awake(server) == {sleeper, busy[1]}


async def test_turns_and_commands_never_give_way(start_server: Start) -> None:
    server = await start_server(max_sandboxes=2)
    first, second = await idle(server, 2)
    server.sandboxes.script = fakes.wait
    started = await server.parts.sessions.send(DEFAULT_TENANT, first, "long", {})
    server.parts.sessions._live[second].commands += 1
    with pytest.raises(CapacityReached):
        await server.parts.sessions.create(DEFAULT_TENANT, "helper")
    server.parts.sessions._live[second].commands -= 1
    server.parts.sessions._live[second].idle_since -= 60
    await server.parts.sessions.create(DEFAULT_TENANT, "helper")
    assert first in awake(server)
    await server.parts.sessions.interrupt(DEFAULT_TENANT, first)
    assert ending(await rest_of_turn(server, first, started.first_seq))[0] == "interrupted"


async def test_many_sessions_that_wake_at_once_share_few_sandboxes(start_server: Start) -> None:
    server = await start_server(max_sandboxes=2)
    ids = []
    for _ in range(6):
        ids.append(await server.session())
        server.parts.sessions._live[ids[-1]].idle_since -= 60
    async with asyncio.timeout(10):
        for _ in range(2):
            for id in ids:
                assert ending(await turn(server, id))[0] == "completed"
    assert len(awake(server)) == 2


async def test_a_sandbox_that_does_not_take_its_agent_is_replaced(start_server: Start) -> None:
    server = await start_server()
    server.sandboxes.deaf = 1
    id = await server.session()
    deaf, good = server.sandboxes.claimed
    assert (deaf.is_gone, good.is_gone, deaf.spec.fresh, good.spec.fresh) == (True, False, True, False)
    assert ending(await turn(server, id))[0] == "completed"
    assert server.parts.sessions.status()["replaced"] == 1
    server.sandboxes.deaf = 2
    with pytest.raises(SandboxFailed, match="did not take its agent"):
        await server.parts.sessions.create(DEFAULT_TENANT, "helper")
    assert all(sandbox.is_gone for sandbox in server.sandboxes.claimed[2:])
