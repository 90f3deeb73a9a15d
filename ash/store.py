"""The database: every SQL statement of Ash, records in and records out, on one SQLite file in WAL mode.

One connection writes, behind a lock; another one reads. It decides nothing about sessions and never hands out a row or a cursor.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from collections import defaultdict
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from importlib import resources
from types import TracebackType
from typing import Any, Self, TypeVar

import aiosqlite

from ash import dialect, models
from ash.errors import AgentNotFound, AshError, Conflict, CredentialNotFound, InvalidRequest, NotFound, SessionNotFound, StoreFailed
from ash.models import Agent, ApiKey, Credential, Event, Json, NewEvent, SandboxHandle, Session

_T = TypeVar("_T")

APPLICATION_ID = 0x41736844
"""Marks a database file as ours (`PRAGMA application_id`), so that another program's file is refused and not half overwritten."""
CONVERSATION_TYPES = (models.TURN_STARTED, models.ASSISTANT_MESSAGE, models.USER_MESSAGE, models.RESULT_RECORDED)
"""The event types of the index `events_of_conversations`."""
KEEP: Any = object()
"""In place of a value that may be None: leave it as it is."""
TOKEN_KINDS = ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")

_OLDEST_SQLITE = (3, 35, 0)  # the first with RETURNING
_BUSY_TIMEOUT_MS = 5000
_LARGEST = 2**63 - 1
_ROWS_PER_STATEMENT = 500

_AGENT = ", ".join(Agent._fields)
_SESSION = ", ".join(Session._fields)
_KEY = ", ".join(ApiKey._fields)
_CREDENTIAL = ", ".join(Credential._fields)
_HANDLE = ", ".join(SandboxHandle._fields)


def _quoted(types: Iterable[str]) -> str:
    return ", ".join(f"'{kind}'" for kind in types)


def _marks(count: int) -> str:
    return ", ".join("?" * count)


# A partial index is used only by a query that repeats its condition word for word.
_IN_CONVERSATION = f"type IN ({_quoted(CONVERSATION_TYPES)})"
_IN_TURNS = f"type IN ({_quoted((models.TURN_STARTED, models.TURN_ENDED))})"
_INDEXES = ((_IN_CONVERSATION, frozenset(CONVERSATION_TYPES)), (_IN_TURNS, frozenset((models.TURN_STARTED, models.TURN_ENDED))))

# `k` counts the new events of one session from 1. As the statement reads the table it writes, SQLite computes all its rows before it
# inserts the first.
_APPEND = """
    WITH new (session_id, k, type, data) AS (VALUES {rows})
    INSERT INTO events (session_id, seq, type, data, created_at)
    SELECT session_id, k + coalesce((SELECT max(seq) FROM events AS old WHERE old.session_id = new.session_id), 0), type, data, ? FROM new
    RETURNING session_id, seq
"""

_EXPLANATIONS = {
    sqlite3.SQLITE_FULL: "the disk that holds the data folder is full; free some space and try again",
    sqlite3.SQLITE_BUSY: "another process holds the database; only one server may use a data folder",
    sqlite3.SQLITE_LOCKED: "another process holds the database; only one server may use a data folder",
    sqlite3.SQLITE_CORRUPT: "ash.db is damaged; stop the server and restore the data folder from a backup",
    sqlite3.SQLITE_NOTADB: "ash.db is damaged or not a database; stop the server and restore the data folder from a backup",
    sqlite3.SQLITE_IOERR: "the disk that holds the data folder reports an error; look at the system log",
    sqlite3.SQLITE_READONLY: "ash.db cannot be written; check the owner and the permissions of the data folder",
    sqlite3.SQLITE_PERM: "ash.db cannot be opened; check the owner and the permissions of the data folder",
    sqlite3.SQLITE_CANTOPEN: "ash.db cannot be opened; check that the data folder exists and belongs to the server's user",
}


@contextmanager
def _translated() -> Iterator[None]:
    """The one place where errors of sqlite3 become errors of Ash."""
    try:
        yield
    except sqlite3.Error as error:
        raise _explained(error) from error
    except UnicodeEncodeError as error:
        raise InvalidRequest("the text holds half of a surrogate pair; send valid Unicode") from error


def _explained(error: sqlite3.Error) -> AshError:
    code = getattr(error, "sqlite_errorcode", 0)
    if code == sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY:
        return SessionNotFound("Session not found")
    if code in (sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY, sqlite3.SQLITE_CONSTRAINT_UNIQUE):
        return Conflict("a record with this id or name exists already")
    explanation = _EXPLANATIONS.get(code & 0xFF, str(error))  # the low byte is the primary code
    return StoreFailed(f"The database cannot be used: {explanation} ({getattr(error, 'sqlite_errorname', 'SQLITE_ERROR')})")


async def _uninterrupted(work: Coroutine[Any, Any, _T]) -> _T:
    """Await `work` to its end even when the caller is cancelled meanwhile; the cancellation follows afterwards."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                continue  # cancelled once more; one of the two is re-raised below
        if not task.cancelled():
            task.exception()  # it is not lost: the cancellation is what the caller gets to see
        raise


def _dump(value: object) -> str:
    """JSON as it is stored. Half surrogate pairs, which a hostile writer can send, stay escaped: UTF-8 cannot hold them."""
    try:
        text = models.dump(value)
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"the data cannot be stored as JSON: {error}") from error
    return text


def _agent(row: Sequence[Any]) -> Agent:
    agent = Agent._make(row)
    return agent._replace(env=json.loads(row[5]), config=json.loads(row[6]))


def _session(row: Sequence[Any]) -> Session:
    session = Session._make(row)
    return session._replace(options=json.loads(row[7]))


def _bounded(number: int) -> int:
    """A cursor or a count from outside, within what SQLite can hold."""
    return max(-_LARGEST, min(number, _LARGEST))


class Store:
    """An async context manager around the database file at `path`, which it creates and migrates."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = asyncio.Lock()
        self._connections: tuple[aiosqlite.Connection, aiosqlite.Connection] | None = None
        self._level = ""
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
            raise StoreFailed(f"this Python has SQLite {sqlite3.sqlite_version}; Ash needs 3.35 or newer: use another Python")
        async with AsyncExitStack() as stack:
            with _translated():
                _create_private(self._path)
                writer, reader = await self._open(stack), await self._open(stack)
                self._connections = (writer, reader)
                await self._prepare(writer, reader)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        async with self._lock:
            self._connections = None
            with _translated():
                await self._stack.aclose()

    async def _open(self, stack: AsyncExitStack) -> aiosqlite.Connection:
        return await stack.enter_async_context(aiosqlite.connect(self._path, isolation_level=None))

    async def _prepare(self, writer: aiosqlite.Connection, reader: aiosqlite.Connection) -> None:
        for connection in (writer, reader):
            await connection.execute_fetchall(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
            await connection.execute_fetchall("PRAGMA foreign_keys = ON")
            await connection.execute_fetchall("PRAGMA temp_store = MEMORY")
        scripts = _migrations()
        await self._refuse_unknown(len(scripts))  # before anything is changed in a file that is not ours
        [(mode,)] = await writer.execute_fetchall("PRAGMA journal_mode = WAL")
        if mode != "wal":
            raise StoreFailed("The data folder is on a file system that SQLite's WAL does not work on; choose a local disk for --data-dir")
        await self._migrate(scripts)
        await reader.execute_fetchall("PRAGMA query_only = ON")

    # Connections

    @property
    def _writer(self) -> aiosqlite.Connection:
        return self._opened()[0]

    @property
    def _reader(self) -> aiosqlite.Connection:
        return self._opened()[1]

    def _opened(self) -> tuple[aiosqlite.Connection, aiosqlite.Connection]:
        if self._connections is None:
            raise StoreFailed("The database is closed")
        return self._connections

    @asynccontextmanager
    async def transaction(self, *, sync: bool = False) -> AsyncIterator[aiosqlite.Connection]:
        """The writer, alone, in a transaction that commits at the end of the block and rolls back on any error.

        Await nothing but the connection inside. With `sync` the commit has reached the disk when the block is left.
        """
        async with self._lock:
            with _translated():
                writer = self._writer
                await self._use_sync(writer, sync)
                try:
                    await writer.execute_fetchall("BEGIN IMMEDIATE")
                    yield writer
                except BaseException:
                    # A statement whose await was cancelled still runs on the writer's thread; the rollback comes behind it.
                    await _uninterrupted(writer.rollback())
                    raise
                await _uninterrupted(self._commit(writer))

    async def _commit(self, writer: aiosqlite.Connection) -> None:
        try:
            await writer.commit()
        except sqlite3.Error:
            await writer.rollback()
            raise

    async def _use_sync(self, writer: aiosqlite.Connection, sync: bool) -> None:
        """In WAL mode NORMAL leaves the flush to the checkpoint; FULL flushes the log, with all earlier commits, at each commit."""
        level = "FULL" if sync else "NORMAL"
        if self._level != level:
            self._level = ""  # unknown, should this await be cancelled
            await writer.execute_fetchall(f"PRAGMA synchronous = {level}")
            self._level = level

    async def _write(self, sql: str, *values: Any, sync: bool = False) -> list[Any]:
        """One statement, committed by itself: one trip to the writer's thread. When cancelled it still happens, as a whole."""
        async with self._lock:
            with _translated():
                await self._use_sync(self._writer, sync)
                return list(await self._writer.execute_fetchall(sql, values))

    async def _read(self, sql: str, *values: Any) -> list[Any]:
        with _translated():
            return list(await self._reader.execute_fetchall(sql, values))

    # Migrations

    async def _migrate(self, scripts: Sequence[str]) -> None:
        for number, script in enumerate(scripts, 1):
            async with self.transaction(sync=True) as writer:
                [(version,)] = await writer.execute_fetchall("PRAGMA user_version")
                if version < number:
                    for statement in _statements(script):
                        await writer.execute_fetchall(statement)
                    await writer.execute_fetchall(f"PRAGMA application_id = {APPLICATION_ID}")
                    await writer.execute_fetchall(f"PRAGMA user_version = {number}")

    async def _refuse_unknown(self, known: int) -> None:
        [(found,)] = await self._read("PRAGMA user_version")
        [(owner,)] = await self._read("PRAGMA application_id")
        [(tables,)] = await self._read("SELECT count(*) FROM sqlite_master")
        if tables and owner != APPLICATION_ID:
            raise StoreFailed("ash.db in the data folder belongs to another program; choose another folder with --data-dir")
        if found > known:
            raise StoreFailed(
                f"ash.db was written by a newer Ash (schema {found}; this one knows {known}). "
                "Start the newer version, or restore a backup made before the upgrade."
            )

    # Agents

    async def put_agent(
        self, tenant_id: str, name: str, digest: str, env: dict[str, str] | None, config: Json | None
    ) -> Agent:  # fmt: skip
        """Create the agent or give it its next version. `env` and `config` are kept where None is given."""
        moment = models.now()
        kept = [None if value is None else _dump(value) for value in (env, config)]
        upsert = f"""
            INSERT INTO agents ({_AGENT}) VALUES (?, ?, ?, 1, ?, coalesce(?, '{{}}'), coalesce(?, '{{}}'), ?, ?)
            ON CONFLICT (tenant_id, name) DO UPDATE SET version = version + 1, digest = excluded.digest,
                env = coalesce(?, env), config = coalesce(?, config), updated_at = excluded.updated_at
            RETURNING {_AGENT}
        """
        async with self.transaction(sync=True) as writer:
            values = (models.new_id(), tenant_id, name, digest, *kept, moment, moment, *kept)
            [row] = await writer.execute_fetchall(upsert, values)
            agent = _agent(row)
            version = (tenant_id, name, agent.version, digest, moment)
            await writer.execute_fetchall("INSERT INTO agent_versions VALUES (?, ?, ?, ?, ?)", version)
        return agent

    async def get_agent(self, tenant_id: str, name: str) -> Agent:
        rows = await self._read(f"SELECT {_AGENT} FROM agents WHERE tenant_id = ? AND name = ?", tenant_id, name)
        if not rows:
            raise AgentNotFound("Agent not found")
        return _agent(rows[0])

    async def list_agents(self, tenant_id: str) -> list[Agent]:
        return [_agent(row) for row in await self._read(f"SELECT {_AGENT} FROM agents WHERE tenant_id = ? ORDER BY name", tenant_id)]

    async def delete_agent(self, tenant_id: str, name: str) -> None:
        """Its versions go with it; its sessions and their events stay."""
        if not await self._write("DELETE FROM agents WHERE tenant_id = ? AND name = ? RETURNING id", tenant_id, name):
            raise AgentNotFound("Agent not found")

    async def agent_digests(self) -> set[str]:
        """Every digest whose folder is still needed: by an agent, by one of its versions, or by a session that has not ended."""
        sql = """
            SELECT digest FROM agents UNION SELECT digest FROM agent_versions
            UNION SELECT agent_digest FROM sessions WHERE status <> ?
        """
        return {digest for (digest,) in await self._read(sql, models.ENDED)}

    # Sessions

    async def create_session(self, session: Session) -> None:
        await self._write(*_insert_session(session))

    async def fork_session(self, session: Session) -> None:
        """Create `session` with the finished turns of its parent's log, numbered anew; its deltas and usage are not copied."""
        skipped = (models.ASSISTANT_DELTA, models.TEXT_DELTA, models.THINKING_DELTA, models.BLOCK_DELTA,
                   models.SESSION_STATUS_CHANGED, models.USAGE_RECORDED)  # fmt: skip
        copy = f"""
            INSERT INTO events (session_id, seq, type, data, created_at)
            SELECT ?, row_number() OVER (ORDER BY seq), type, data, created_at FROM events
            WHERE session_id = ? AND type NOT IN ({_marks(len(skipped))})
                AND seq <= (SELECT max(seq) FROM events WHERE session_id = ? AND type = ? AND {_IN_TURNS})
        """
        parent = session.parent_session_id
        async with self.transaction() as writer:
            sql, *values = _insert_session(session)
            await writer.execute_fetchall(sql, values)
            await writer.execute_fetchall(copy, (session.id, parent, *skipped, parent, models.TURN_ENDED))

    async def get_session(self, tenant_id: str, id: str) -> Session:
        rows = await self._read(f"SELECT {_SESSION} FROM sessions WHERE id = ? AND tenant_id = ?", id, tenant_id)
        if not rows:
            raise SessionNotFound("Session not found")
        return _session(rows[0])

    async def list_sessions(
        self, tenant_id: str, *, agent: str | None = None, status: str | None = None, limit: int | None = None, offset: int = 0
    ) -> tuple[list[Session], int]:
        """The newest first, and how many there are in all."""
        filters = {"tenant_id": tenant_id, "agent_name": agent, "status": status}
        given = {column: value for column, value in filters.items() if value is not None}
        where = " AND ".join(f"{column} = ?" for column in given)
        page = (-1 if limit is None else _bounded(limit), _bounded(offset))
        rows = await self._read(
            f"SELECT {_SESSION} FROM sessions WHERE {where} ORDER BY created_at DESC, rowid DESC LIMIT ? OFFSET ?", *given.values(), *page
        )
        [(total,)] = await self._read(f"SELECT count(*) FROM sessions WHERE {where}", *given.values())
        return [_session(row) for row in rows], total

    async def transition(self, id: str, to: str, **fields: Any) -> Session | None:
        """Change the status if TRANSITIONS allows it from where the session is, and `fields` with it. None says that it was not allowed."""
        allowed = models.TRANSITIONS[to]
        changes = {"status": to, **{name: _dump(value) if name == "options" else value for name, value in fields.items()}}
        if unknown := changes.keys() - {"status", "model", "options", "sandbox_id", "last_active_at"}:
            raise TypeError(f"a transition cannot set {', '.join(sorted(unknown))}")
        rows = await self._write(
            f"UPDATE sessions SET {', '.join(f'{name} = ?' for name in changes)} "
            f"WHERE id = ? AND status IN ({_marks(len(allowed))}) RETURNING {_SESSION}",
            *changes.values(), id, *allowed,
        )  # fmt: skip
        return _session(rows[0]) if rows else None

    async def update_session(
        self, id: str, *, model: str | None = KEEP, options: Json | None = None, sandbox_id: str | None = None
    ) -> Session:  # fmt: skip
        """Change what is given and keep the rest; None for `model` goes back to the default."""
        sql = f"""
            UPDATE sessions SET model = CASE WHEN ? THEN model ELSE ? END, options = coalesce(?, options),
                sandbox_id = coalesce(?, sandbox_id)
            WHERE id = ? RETURNING {_SESSION}
        """
        kept = (True, None) if model is KEEP else (False, model)
        rows = await self._write(sql, *kept, None if options is None else _dump(options), sandbox_id, id)
        if not rows:
            raise SessionNotFound("Session not found")
        return _session(rows[0])

    async def fail_starting(self) -> int:
        """Mark the sessions whose start a dead server never finished. How many there were."""
        sql = "UPDATE sessions SET status = ? WHERE status = ? RETURNING id"
        return len(await self._write(sql, models.ERROR, models.STARTING))

    async def count_sessions(self) -> dict[str, int]:
        """By status, every status named."""
        counted = dict(await self._read("SELECT status, count(*) FROM sessions GROUP BY status"))
        return {status: counted.get(status, 0) for status in models.STATUSES}

    # Events

    async def append_events(self, batch: Sequence[tuple[str, Sequence[NewEvent]]], created_at: str, sync: bool) -> list[list[Event]]:
        """Append to the logs of several sessions at once: all or nothing, numbered without gaps, on disk when `sync`.

        Raises SessionNotFound when one of the sessions does not exist.
        """
        rows = [(session_id, event.type, _dump(event.data)) for session_id, events in batch for event in events]
        chunks = [rows[start : start + _ROWS_PER_STATEMENT] for start in range(0, len(rows), _ROWS_PER_STATEMENT)]
        if len(chunks) == 1:
            stored = await self._write(*_append(chunks[0], created_at), sync=sync)
        else:
            async with self.transaction(sync=sync) as writer:
                stored = [row for sql, *values in (_append(chunk, created_at) for chunk in chunks)
                          for row in await writer.execute_fetchall(sql, values)]  # fmt: skip
        return _numbered(batch, stored, created_at)

    async def read_events(
        self, session_id: str, *, after: int = 0, limit: int = 1000, types: Sequence[str] | None = None
    ) -> list[Event]:  # fmt: skip
        """In order, those with a number above `after`; only of `types` where they are given."""
        where = "session_id = ? AND seq > ?"
        if types is not None:
            where += f" AND type IN ({_marks(len(types))})"
            where += "".join(f" AND {index}" for index, covered in _INDEXES if covered.issuperset(types))
        sql = f"SELECT session_id, seq, type, data, created_at FROM events WHERE {where} ORDER BY seq LIMIT ?"
        rows = await self._read(sql, session_id, _bounded(after), *(types or ()), _bounded(limit))
        return [_event(row) for row in rows]

    async def list_messages(self, session_id: str, *, after: int = 0, limit: int = 100) -> list[tuple[int, Event]]:
        """The messages of a conversation, numbered from 1; those with a number above `after`."""
        first = max(0, _bounded(after))
        sql = f"""
            SELECT session_id, seq, type, data, created_at FROM events WHERE session_id = ? AND seq IN (
                SELECT seq FROM events WHERE session_id = ? AND {_IN_CONVERSATION} AND type IN ({_quoted(dialect.MESSAGE_TYPES)})
                ORDER BY seq LIMIT ? OFFSET ?
            ) ORDER BY seq
        """
        rows = await self._read(sql, session_id, session_id, _bounded(limit), first)
        return [(number, _event(row)) for number, row in enumerate(rows, first + 1)]

    async def last_seq(self, session_id: str) -> int:
        """0 when the log is empty."""
        [(seq,)] = await self._read("SELECT coalesce(max(seq), 0) FROM events WHERE session_id = ?", session_id)
        return int(seq)

    async def open_turns(self) -> list[tuple[str, str]]:
        """The session and id of each turn that was started and not ended. One turn runs at a time, so the last event of turns decides."""
        sql = f"""
            SELECT last.session_id, json_extract(events.data, '$.turnId')
            FROM (SELECT session_id, max(seq) AS seq, type FROM events WHERE {_IN_TURNS} GROUP BY session_id) AS last
            JOIN events USING (session_id, seq) WHERE last.type = ?
        """
        return [(session_id, turn_id) for session_id, turn_id in await self._read(sql, models.TURN_STARTED)]

    async def find_turn(self, session_id: str, until: int) -> tuple[int, str] | None:
        """The number of the newest start of a turn up to event `until`, and the turn's id. Its content is not read: it may be large."""
        sql = f"""
            SELECT seq, json_extract(data, '$.turnId') FROM events
            WHERE session_id = ? AND seq <= ? AND type = ? AND {_IN_TURNS} ORDER BY seq DESC LIMIT 1
        """
        rows = await self._read(sql, session_id, _bounded(until), models.TURN_STARTED)
        return (rows[0][0], rows[0][1]) if rows else None

    # API keys

    async def add_key(self, key: ApiKey, key_hash: str) -> None:
        await self._write(f"INSERT INTO api_keys ({_KEY}, key_hash) VALUES ({_marks(5)})", *key, key_hash, sync=True)

    async def find_key(self, key_hash: str) -> ApiKey | None:
        rows = await self._read(f"SELECT {_KEY} FROM api_keys WHERE key_hash = ?", key_hash)
        return ApiKey._make(rows[0]) if rows else None

    async def list_keys(self, tenant_id: str) -> list[ApiKey]:
        """The oldest first."""
        rows = await self._read(f"SELECT {_KEY} FROM api_keys WHERE tenant_id = ? ORDER BY created_at, rowid", tenant_id)
        return [ApiKey._make(row) for row in rows]

    async def delete_key(self, tenant_id: str, id: str) -> None:
        if not await self._write("DELETE FROM api_keys WHERE tenant_id = ? AND id = ? RETURNING id", tenant_id, id, sync=True):
            raise NotFound("API key not found")

    async def count_keys(self) -> int:
        [(count,)] = await self._read("SELECT count(*) FROM api_keys")
        return int(count)

    # Credentials

    async def add_credential(self, credential: Credential, sealed: bytes) -> None:
        values = (*credential, sealed)
        await self._write(f"INSERT INTO credentials ({_CREDENTIAL}, sealed) VALUES ({_marks(len(values))})", *values, sync=True)

    async def list_credentials(self, tenant_id: str) -> list[Credential]:
        """The oldest first."""
        rows = await self._read(f"SELECT {_CREDENTIAL} FROM credentials WHERE tenant_id = ? ORDER BY created_at, rowid", tenant_id)
        return [Credential._make(row) for row in rows]

    async def find_credentials(self, tenant_id: str, agent: str, id: str | None = None) -> list[tuple[Credential, bytes]]:
        """Those of the agent, and the one with this id, each with what is sealed."""
        sql = f"""
            SELECT {_CREDENTIAL}, CAST(sealed AS BLOB) FROM credentials
            WHERE tenant_id = ? AND (agent = ? OR id = ?) ORDER BY created_at, rowid
        """
        return [(Credential._make(row[:-1]), row[-1]) for row in await self._read(sql, tenant_id, agent, id)]

    async def touch_credentials(self, ids: Sequence[str]) -> None:
        """They are used now."""
        await self._write(f"UPDATE credentials SET last_used_at = ? WHERE id IN ({_marks(len(ids))})", models.now(), *ids)

    async def delete_credential(self, tenant_id: str, id: str) -> None:
        if not await self._write("DELETE FROM credentials WHERE tenant_id = ? AND id = ? RETURNING id", tenant_id, id, sync=True):
            raise CredentialNotFound("Credential not found")

    async def count_credentials(self) -> int:
        [(count,)] = await self._read("SELECT count(*) FROM credentials")
        return int(count)

    # Sandboxes

    async def save_sandbox(self, session_id: str, handle: SandboxHandle) -> None:
        sql = f"INSERT OR REPLACE INTO sandboxes (session_id, {_HANDLE}) VALUES ({_marks(1 + len(handle))})"
        await self._write(sql, session_id, *handle)

    async def delete_sandbox(self, sandbox_id: str) -> None:
        await self._write("DELETE FROM sandboxes WHERE id = ?", sandbox_id)

    async def list_sandboxes(self) -> list[tuple[str, SandboxHandle]]:
        return [(row[0], SandboxHandle._make(row[1:])) for row in await self._read(f"SELECT session_id, {_HANDLE} FROM sandboxes")]

    # Usage

    async def usage_totals(self, session_id: str | None = None) -> dict[str, int]:
        """Model calls and tokens, by kind, of one session or of all."""
        sums = ", ".join(f"coalesce(sum({kind}), 0)" for kind in TOKEN_KINDS)
        where, values = ("", ()) if session_id is None else ("WHERE session_id = ?", (session_id,))
        [row] = await self._read(f"SELECT count(*), {sums} FROM usage {where}", *values)
        return dict(zip(("model_calls", *TOKEN_KINDS), row, strict=True))


def _insert_session(session: Session) -> tuple[Any, ...]:
    values = {**session._asdict(), "options": _dump(session.options)}
    return (f"INSERT INTO sessions ({_SESSION}) VALUES ({_marks(len(values))})", *values.values())


def _append(rows: Sequence[tuple[str, str, str]], created_at: str) -> tuple[Any, ...]:
    counts: dict[str, int] = defaultdict(int)
    values: list[Any] = []
    for session_id, kind, data in rows:
        counts[session_id] += 1
        values += (session_id, counts[session_id], kind, data)
    return (_APPEND.format(rows=", ".join(["(?, ?, ?, ?)"] * len(rows))), *values, created_at)


def _numbered(batch: Sequence[tuple[str, Sequence[NewEvent]]], stored: list[Any], created_at: str) -> list[list[Event]]:
    """The new events with the numbers they got, which rise within each session in the order of the batch."""
    given: dict[str, list[int]] = defaultdict(list)
    for session_id, seq in stored:
        given[session_id].append(seq)
    numbers = {session_id: iter(sorted(seqs)) for session_id, seqs in given.items()}
    return [[Event(id, next(numbers[id]), event.type, event.data, created_at) for event in events] for id, events in batch]


def _event(row: Sequence[Any]) -> Event:
    return Event(row[0], row[1], row[2], json.loads(row[3]), row[4])


def _create_private(path: str) -> None:
    """The database holds the environment of agents and hashes of keys: nobody else may read it, nor the files SQLite puts beside it."""
    try:
        os.makedirs(os.path.dirname(path) or ".", 0o711, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise StoreFailed(f"The database cannot be opened in the data folder: {error.strerror}") from error


def _migrations() -> list[str]:
    """The scripts in the order of their numbers; read as resources, so that they are found inside a zip as well."""
    files = [file for file in resources.files("ash.sql").iterdir() if file.name.endswith(".sql")]
    return [file.read_text(encoding="utf-8") for file in sorted(files, key=lambda file: file.name)]


def _statements(script: str) -> Iterator[str]:
    """The statements of a script. Not sqlite3's executescript, which commits what is open before it starts."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
