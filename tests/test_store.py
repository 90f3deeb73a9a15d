from __future__ import annotations

import asyncio
import itertools
import os
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

import ash
from ash import dialect, models, store
from ash.errors import AgentNotFound, Conflict, InvalidRequest, NotFound, SessionNotFound, StoreFailed
from ash.models import ACTIVE, ENDED, ERROR, PAUSED, STARTING, STOPPED, ApiKey, NewEvent, SandboxHandle, Session
from ash.store import Store

NOW = "2024-05-06T07:08:09.000Z"


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "data" / "ash.db")


@pytest.fixture
async def db(path: str) -> AsyncIterator[Store]:
    async with Store(path) as opened:
        yield opened


@pytest.fixture
def raw(db: Store, path: str) -> Iterator[sqlite3.Connection]:
    """A connection of somebody else to the same file."""
    with closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as connection:
        yield connection


def new_session(**changes: object) -> Session:
    id = models.new_id()
    session = Session(id, "default", "bot", 1, "d1", STARTING, None, {}, None, id, NOW, NOW)
    return session._replace(**changes)  # type: ignore[arg-type]


async def add_session(db: Store, **changes: object) -> str:
    session = new_session(**changes)
    await db.create_session(session)
    return session.id


def deltas(count: int) -> list[NewEvent]:
    return [NewEvent(models.TEXT_DELTA, {"delta": str(number)}) for number in range(count)]


async def append(db: Store, id: str, *events: NewEvent) -> list[models.Event]:
    [stored] = await db.append_events([(id, events)], NOW, False)
    return stored


# Opening


async def test_the_database_is_private_and_in_wal_mode(db: Store, path: str, raw: sqlite3.Connection) -> None:
    assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    for name in os.listdir(os.path.dirname(path)):
        assert os.stat(os.path.join(os.path.dirname(path), name)).st_mode & 0o077 == 0, name


async def test_a_database_is_opened_again_with_its_records(path: str) -> None:
    async with Store(path) as first:
        id = await add_session(first)
        await append(first, id, *deltas(2))
    async with Store(path) as second:
        assert (await second.get_session("default", id)).id == id
        assert await second.last_seq(id) == 2
    assert os.listdir(os.path.dirname(path)) == ["ash.db"]


async def test_a_database_of_a_newer_program_is_refused_in_words(path: str) -> None:
    async with Store(path):
        pass
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreFailed, match=r"newer Ash.*schema 99"):
        await Store(path).__aenter__()


async def test_a_database_of_another_program_is_refused_and_left_alone(path: str) -> None:
    os.makedirs(os.path.dirname(path))
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("CREATE TABLE agents (id TEXT)")
    with pytest.raises(StoreFailed, match="another program"):
        await Store(path).__aenter__()
    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute("PRAGMA journal_mode").fetchone() == ("delete",)


async def test_a_file_that_is_no_database_is_refused_in_words(path: str) -> None:
    os.makedirs(os.path.dirname(path))
    Path(path).write_bytes(b"not a database at all " * 100)
    with pytest.raises(StoreFailed, match="damaged or not a database"):
        await Store(path).__aenter__()


async def test_a_second_opening_finds_the_schema_and_uses_it(path: str) -> None:
    async with Store(path) as first, Store(path) as second:
        id = await add_session(first)
        assert (await second.get_session("default", id)).id == id


async def test_a_failed_migration_leaves_nothing_behind(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    good = store._migrations()
    monkeypatch.setattr(store, "_migrations", lambda: [*good, "CREATE TABLE more (a);\nCREATE TABLE agents (a);\n"])
    with pytest.raises(StoreFailed, match="already exists"):
        await Store(path).__aenter__()
    monkeypatch.undo()
    async with Store(path) as db, db.transaction() as writer:
        assert list(await writer.execute_fetchall("SELECT * FROM sqlite_master WHERE name = 'more'")) == []


def test_the_migrations_load_from_inside_a_zip(tmp_path: Path) -> None:
    archive, root = tmp_path / "ash.zip", Path(ash.__file__).parent
    with zipfile.ZipFile(archive, "w") as out:
        for file in (root / "__init__.py", root / "sql" / "__init__.py", root / "sql" / "0001_initial.sql"):
            out.write(file, f"ash/{file.relative_to(root)}")
    script = "from importlib import resources; print([f.name for f in resources.files('ash.sql').iterdir() if f.name.endswith('.sql')])"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(archive)!r}); {script}"],
                          capture_output=True, text=True, timeout=60, check=True)  # fmt: skip
    assert done.stdout.strip() == "['0001_initial.sql']"


async def test_a_closed_store_says_so(path: str) -> None:
    async with Store(path) as db:
        pass
    with pytest.raises(StoreFailed, match="closed"):
        await db.count_sessions()


# Transactions


async def test_a_transaction_rolls_back_on_an_error(db: Store) -> None:
    async def fail() -> None:
        async with db.transaction() as writer:
            await writer.execute("INSERT INTO api_keys VALUES ('1', 't', 'l', 'c', 'h')")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert await db.count_keys() == 0


async def test_transactions_come_one_after_the_other(db: Store) -> None:
    seen: list[str] = []

    async def use(name: str) -> None:
        async with db.transaction() as writer:
            seen.append(f"{name} in")
            await writer.execute_fetchall("SELECT 1")
            seen.append(f"{name} out")

    await asyncio.gather(*(use(name) for name in "abc"))
    assert seen == ["a in", "a out", "b in", "b out", "c in", "c out"]


@pytest.mark.parametrize("steps", range(12))
async def test_a_cancelled_await_leaves_no_transaction_open(db: Store, steps: int) -> None:
    async def work() -> None:
        async with db.transaction(sync=True) as writer:
            await writer.execute("INSERT INTO api_keys VALUES ('1', 't', 'l', 'c', 'h')")
            await writer.execute("INSERT INTO api_keys VALUES ('2', 't', 'l', 'c', 'i')")

    task = asyncio.ensure_future(work())
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    async with db.transaction() as writer:  # would fail inside another transaction
        [(count,)] = await writer.execute_fetchall("SELECT count(*) FROM api_keys")
    assert count in (0, 2)


async def test_a_lock_held_by_another_process_is_an_error_in_words(db: Store, raw: sqlite3.Connection) -> None:
    await db._writer.execute_fetchall("PRAGMA busy_timeout = 1")
    raw.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreFailed, match="another process holds the database"):
        await add_session(db)
    raw.execute("ROLLBACK")
    await add_session(db)


async def test_a_full_disk_is_an_error_in_words_and_the_store_goes_on(db: Store) -> None:
    id = await add_session(db)
    [(pages,)] = await db._writer.execute_fetchall("PRAGMA page_count")
    await db._writer.execute_fetchall(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreFailed, match=r"disk .* is full"):
        await append(db, id, NewEvent("text.delta", {"delta": "x" * 1_000_000}))
    await db._writer.execute_fetchall("PRAGMA max_page_count = 1000000")
    assert [event.seq for event in await append(db, id, *deltas(1))] == [1]


async def test_a_synced_append_commits_with_full_synchronous_and_the_next_one_without(db: Store) -> None:
    id, said = await add_session(db), list[str]()
    await db._writer.set_trace_callback(said.append)
    for sync in (True, True, False):
        await db.append_events([(id, deltas(1))], NOW, sync)
    kinds = [statement.split()[-1] if "PRAGMA" in statement else "insert" for statement in said]
    # An insert shows more than once: SQLite names the statement again for each trigger it fires.
    assert [kind for kind, _ in itertools.groupby(kinds)] == ["FULL", "insert", "NORMAL", "insert"]


# Agents


async def test_each_deploy_is_a_new_version_and_keeps_what_is_not_given(db: Store) -> None:
    first = await db.put_agent("default", "bot", "d1", {"A": "1"}, {"x": 1})
    second = await db.put_agent("default", "bot", "d2", None, None)
    assert (first.version, second.version) == (1, 2)
    assert second == first._replace(version=2, digest="d2", updated_at=second.updated_at)
    assert (await db.put_agent("default", "bot", "d3", {}, {"y": 2})).env == {}
    assert (await db.get_agent("default", "bot")).config == {"y": 2}


async def test_agents_of_tenants_are_apart_and_listed_by_name(db: Store) -> None:
    for tenant, name in (("default", "b"), ("default", "a"), ("other", "a")):
        await db.put_agent(tenant, name, "d", None, None)
    assert [agent.name for agent in await db.list_agents("default")] == ["a", "b"]
    await db.delete_agent("other", "a")
    assert (await db.get_agent("default", "a")).version == 1
    with pytest.raises(AgentNotFound, match="Agent not found"):
        await db.get_agent("other", "a")
    with pytest.raises(AgentNotFound):
        await db.delete_agent("other", "a")


async def test_a_version_never_changes(db: Store, raw: sqlite3.Connection) -> None:
    await db.put_agent("default", "bot", "d1", None, None)
    with pytest.raises(sqlite3.IntegrityError, match="never changes"):
        raw.execute("UPDATE agent_versions SET digest = 'd2'")


async def test_digests_are_needed_by_agents_their_versions_and_sessions_that_have_not_ended(db: Store) -> None:
    for digest in ("d1", "d2"):
        await db.put_agent("default", "bot", digest, None, None)
    await add_session(db, agent_digest="d1")
    ended = await add_session(db, agent_digest="d3")
    assert await db.agent_digests() == {"d1", "d2", "d3"}
    await db.transition(ended, ENDED)
    await db.delete_agent("default", "bot")
    assert await db.agent_digests() == {"d1"}


async def test_deleting_an_agent_keeps_its_sessions_and_their_events(db: Store) -> None:
    await db.put_agent("default", "bot", "d1", None, None)
    id = await add_session(db)
    await append(db, id, *deltas(1))
    await db.delete_agent("default", "bot")
    assert (await db.get_session("default", id)).agent_name == "bot"
    assert len(await db.read_events(id)) == 1


# Sessions


async def test_a_session_comes_back_as_it_was_and_only_to_its_tenant(db: Store) -> None:
    session = new_session(model="m", options={"extraEnv": {"A": "ü"}}, parent_session_id=models.new_id())
    await db.create_session(session)
    assert await db.get_session("default", session.id) == session
    with pytest.raises(SessionNotFound, match="Session not found"):
        await db.get_session("other", session.id)
    with pytest.raises(Conflict):
        await db.create_session(session)


async def test_sessions_are_listed_newest_first_with_filters_paging_and_the_total(db: Store) -> None:
    ids = [await add_session(db, created_at=f"2024-05-06T07:08:0{number // 2}.000Z") for number in range(5)]
    await add_session(db, agent_name="other")
    await db.transition(ids[1], ACTIVE)
    sessions, total = await db.list_sessions("default", agent="bot", limit=2, offset=1)
    assert ([session.id for session in sessions], total) == ([ids[3], ids[2]], 5)
    sessions, total = await db.list_sessions("default", status=ACTIVE)
    assert ([session.id for session in sessions], total) == ([ids[1]], 1)
    assert await db.list_sessions("nobody") == ([], 0)


@pytest.mark.parametrize("to", [ACTIVE, PAUSED, STOPPED, ERROR, ENDED])
@pytest.mark.parametrize("old", models.STATUSES)
async def test_a_status_changes_only_as_the_table_allows(db: Store, old: str, to: str) -> None:
    id = await add_session(db, status=old)
    changed = await db.transition(id, to, last_active_at="later")
    assert (changed is not None) == (old in models.TRANSITIONS[to])
    assert (await db.get_session("default", id)).status == (to if changed else old)


async def test_of_two_transitions_at_once_one_wins(db: Store) -> None:
    id = await add_session(db, status=ACTIVE)
    won = await asyncio.gather(db.transition(id, PAUSED), db.transition(id, PAUSED))
    assert sum(session is not None for session in won) == 1


async def test_a_transition_sets_fields_too_and_refuses_unknown_ones(db: Store) -> None:
    id = await add_session(db)
    changed = await db.transition(id, ACTIVE, sandbox_id="s", options={"a": 1})
    assert changed is not None
    assert (changed.sandbox_id, changed.options) == ("s", {"a": 1})
    with pytest.raises(TypeError, match="tenant_id"):
        await db.transition(id, ENDED, tenant_id="other")


async def test_an_update_changes_what_is_given(db: Store) -> None:
    id = await add_session(db, model="m")
    updated = await db.update_session(id, options={"betas": []}, sandbox_id="other")
    assert (updated.model, updated.options, updated.sandbox_id) == ("m", {"betas": []}, "other")
    with pytest.raises(SessionNotFound):
        await db.update_session(models.new_id(), model="m")


async def test_sessions_are_counted_by_status_and_unfinished_starts_fail(db: Store) -> None:
    for status in (STARTING, STARTING, ACTIVE):
        await add_session(db, status=status)
    assert await db.fail_starting() == 2
    assert await db.count_sessions() == {STARTING: 0, ACTIVE: 1, PAUSED: 0, STOPPED: 0, ERROR: 2, ENDED: 0}


# Events


async def test_events_are_numbered_without_gaps_in_each_session(db: Store) -> None:
    one, two = await add_session(db), await add_session(db)
    stored = await db.append_events([(one, deltas(2)), (two, deltas(1)), (one, deltas(1)), (two, [])], NOW, False)
    assert [[event.seq for event in events] for events in stored] == [[1, 2], [1], [3], []]
    [more] = await db.append_events([(one, deltas(2))], NOW, False)
    assert more == (await db.read_events(one))[3:]
    assert [event.seq for event in await db.read_events(one)] == [1, 2, 3, 4, 5]


async def test_a_batch_larger_than_one_statement_keeps_its_order(db: Store) -> None:
    one, two = await add_session(db), await add_session(db)
    await db.append_events([(one, deltas(700)), (two, deltas(400)), (one, deltas(3))], NOW, True)
    read = await db.read_events(one)
    assert [event.seq for event in read] == list(range(1, 704))
    assert [event.data["delta"] for event in read] == [*map(str, range(700)), "0", "1", "2"]
    assert await db.last_seq(two) == 400


async def test_a_batch_with_an_unknown_session_records_nothing(db: Store) -> None:
    id = await add_session(db)
    for size in (1, 600):
        with pytest.raises(SessionNotFound):
            await db.append_events([(id, deltas(size)), (models.new_id(), deltas(1))], NOW, False)
    assert await db.last_seq(id) == 0


async def test_a_batch_without_events_records_nothing(db: Store) -> None:
    assert await db.append_events([], NOW, True) == []


async def test_any_text_comes_back_as_it_was(db: Store) -> None:
    id = await add_session(db)
    data = {"delta": "ü \u2028 \x00 \U0001f600 \ud800"}  # the last is half of a pair, which UTF-8 cannot hold
    await append(db, id, NewEvent("text.delta", data))
    assert [event.data for event in await db.read_events(id)] == [data]
    with pytest.raises(InvalidRequest, match="Unicode"):
        await db.get_session("\ud800", id)


async def test_reading_starts_after_a_cursor_and_filters_types(db: Store) -> None:
    id = await add_session(db)
    await append(db, id, *deltas(3), NewEvent(models.TURN_ENDED, {}), *deltas(2))
    assert [event.seq for event in await db.read_events(id, after=1, limit=2)] == [2, 3]
    assert [event.seq for event in await db.read_events(id, types=[models.TURN_ENDED])] == [4]
    assert await db.read_events(id, after=10**30) == []
    assert len(await db.read_events(id, after=-(10**30), limit=10**30)) == 6
    assert (await db.last_seq(id), await db.last_seq("nobody")) == (6, 0)


async def test_messages_are_numbered_from_one_whatever_lies_between_them(db: Store) -> None:
    id = await add_session(db)
    for turn in range(3):
        await append(db, id, NewEvent(models.TURN_STARTED, {"content": turn}), *deltas(3), NewEvent(models.USER_MESSAGE, {}),
                     NewEvent(models.ASSISTANT_MESSAGE, {}), NewEvent(models.RESULT_RECORDED, {}))  # fmt: skip
    messages = await db.list_messages(id)
    assert [number for number, _ in messages] == list(range(1, 10))
    assert [event.type for _, event in messages] == list(dialect.MESSAGE_TYPES) * 3
    assert await db.list_messages(id, after=4, limit=3) == messages[4:7]
    assert await db.list_messages(id, after=10**30) == []


@pytest.mark.parametrize(
    ("where", "index"),
    [(f"session_id = 'a' AND {store._IN_CONVERSATION}", "events_of_conversations"), (store._IN_TURNS, "events_of_turns")],
)
async def test_conversations_and_turns_are_found_by_their_index(db: Store, raw: sqlite3.Connection, where: str, index: str) -> None:
    plan = raw.execute(f"EXPLAIN QUERY PLAN SELECT session_id, seq, type FROM events WHERE {where} ORDER BY session_id, seq").fetchall()
    assert index in str(plan)
    assert set(dialect.MESSAGE_TYPES) <= set(store.CONVERSATION_TYPES)


async def test_open_turns_are_those_without_an_end(db: Store) -> None:
    ids = [await add_session(db) for _ in range(3)]
    for id in ids:
        await append(db, id, NewEvent(models.TURN_STARTED, {"turnId": f"1 of {id}"}), *deltas(2), NewEvent(models.TURN_ENDED, {}))
    await append(db, ids[1], NewEvent(models.TURN_STARTED, {"turnId": "2"}), *deltas(1))
    assert await db.open_turns() == [(ids[1], "2")]


async def test_the_turn_of_an_event_is_the_one_that_began_last_before_it(db: Store) -> None:
    id = await add_session(db)
    for turn in "ab":
        start = NewEvent(models.TURN_STARTED, {"turnId": turn, "content": "hi"})
        await append(db, id, *deltas(1), start, *deltas(1), NewEvent(models.TURN_ENDED, {"turnId": turn}))
    assert [await db.find_turn(id, until) for until in (0, 1, 2, 5, 6, 2**80)] == [None, None, (2, "a"), (2, "a"), (6, "b"), (6, "b")]


async def test_a_fork_has_the_finished_turns_without_deltas_and_without_gaps(db: Store) -> None:
    parent = await add_session(db)
    start, end = NewEvent(models.TURN_STARTED, {"turnId": "1", "content": "hi"}), NewEvent(models.TURN_ENDED, {"turnId": "1"})
    await append(db, parent, start, *deltas(2), NewEvent(models.ASSISTANT_MESSAGE, {"a": 1}), end, start, *deltas(1))
    child = new_session(parent_session_id=parent, status=PAUSED)
    await db.fork_session(child)
    assert [(event.seq, event.type) for event in await db.read_events(child.id)] == [
        (1, models.TURN_STARTED), (2, models.ASSISTANT_MESSAGE), (3, models.TURN_ENDED)
    ]  # fmt: skip
    assert [id for id, _ in await db.open_turns()] == [parent]
    fresh = new_session(parent_session_id=await add_session(db))
    await db.fork_session(fresh)
    assert await db.last_seq(fresh.id) == 0


async def test_a_turn_says_when_its_session_was_active(db: Store) -> None:
    id = await add_session(db)
    before = (await db.get_session("default", id)).last_active_at
    _ = await db.append_events([(id, [NewEvent(models.TURN_STARTED, {"turnId": "t", "content": "x"})])], "2031-01-01T00:00:00.000Z", False)
    assert before != (await db.get_session("default", id)).last_active_at == "2031-01-01T00:00:00.000Z"


# Keys, sandboxes, usage


async def test_keys_are_found_by_their_hash_until_they_are_deleted(db: Store) -> None:
    key = ApiKey(models.new_id(), "default", "mine", NOW)
    await db.add_key(key, "h1")
    with pytest.raises(Conflict):
        await db.add_key(key._replace(id=models.new_id()), "h1")
    assert (await db.find_key("h1"), await db.find_key("h2")) == (key, None)
    assert (await db.list_keys("default"), await db.list_keys("other"), await db.count_keys()) == ([key], [], 1)
    with pytest.raises(NotFound, match="API key not found"):
        await db.delete_key("other", key.id)
    await db.delete_key("default", key.id)
    assert await db.find_key("h1") is None


async def test_sandbox_handles_are_kept_until_deleted(db: Store) -> None:
    handle = SandboxHandle("s1", 123, 456, None, "/run/s1", "/sessions/1", 70001)
    await db.save_sandbox("", handle)
    await db.save_sandbox("session", handle._replace(cgroup="/c"))
    assert await db.list_sandboxes() == [("session", handle._replace(cgroup="/c"))]
    await db.delete_sandbox("s1")
    assert await db.list_sandboxes() == []


async def test_usage_adds_up_per_session_and_in_all(db: Store) -> None:
    one, two = await add_session(db), await add_session(db)
    calls = (
        (one, {"model": "m", "input_tokens": 5, "output_tokens": None, "unknown": 1}),
        (one, {"model": "m", "input_tokens": 2, "cache_read_input_tokens": 9}),
        (two, {"model": "m", "output_tokens": 3}),
    )
    for session_id, usage in calls:
        _ = await db.append_events([(session_id, [NewEvent(models.USAGE_RECORDED, usage)])], models.now(), sync=False)
    expected = {"model_calls": 2, "input_tokens": 7, "output_tokens": 0, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 9}
    assert await db.usage_totals(one) == expected
    assert await db.usage_totals() == {**expected, "model_calls": 3, "output_tokens": 3}
    assert (await db.usage_totals("nobody"))["model_calls"] == 0
