-- The first schema. Times are RFC 3339 text in UTC, ids are UUIDs, JSON is compact text.

CREATE TABLE agents (
    id          TEXT PRIMARY KEY,
    tenant_id   TEXT NOT NULL,
    name        TEXT NOT NULL,
    version     INTEGER NOT NULL,
    digest      TEXT NOT NULL,
    env         TEXT NOT NULL,
    config      TEXT NOT NULL,
    created_at  TEXT NOT NULL,
    updated_at  TEXT NOT NULL,
    UNIQUE (tenant_id, name)
);

CREATE TABLE agent_versions (
    tenant_id   TEXT NOT NULL,
    agent_name  TEXT NOT NULL,
    version     INTEGER NOT NULL,
    digest      TEXT NOT NULL,
    created_at  TEXT NOT NULL,
    PRIMARY KEY (tenant_id, agent_name, version),
    FOREIGN KEY (tenant_id, agent_name) REFERENCES agents (tenant_id, name) ON DELETE CASCADE
) WITHOUT ROWID;

CREATE TRIGGER agent_versions_are_immutable BEFORE UPDATE ON agent_versions
BEGIN
    SELECT RAISE(ABORT, 'a version of an agent never changes');
END;

-- No reference to agents: deleting an agent keeps its sessions and their history.
CREATE TABLE sessions (
    id                  TEXT PRIMARY KEY,
    tenant_id           TEXT NOT NULL,
    agent_name          TEXT NOT NULL,
    agent_version       INTEGER NOT NULL,
    agent_digest        TEXT NOT NULL,
    status              TEXT NOT NULL,
    model               TEXT,
    options             TEXT NOT NULL,
    parent_session_id   TEXT,
    sandbox_id          TEXT NOT NULL,
    created_at          TEXT NOT NULL,
    last_active_at      TEXT NOT NULL
);
CREATE INDEX sessions_by_tenant ON sessions (tenant_id, created_at);
CREATE INDEX sessions_by_agent ON sessions (tenant_id, agent_name, created_at);
CREATE INDEX sessions_by_status ON sessions (status, agent_digest);

CREATE TABLE events (
    session_id  TEXT NOT NULL REFERENCES sessions (id),
    seq         INTEGER NOT NULL,
    type        TEXT NOT NULL,
    data        TEXT NOT NULL,
    created_at  TEXT NOT NULL,
    PRIMARY KEY (session_id, seq)
) WITHOUT ROWID;

-- What a conversation is rebuilt from and listed by, without walking over the deltas. The store repeats this list literally.
CREATE INDEX events_of_conversations ON events (session_id, seq, type)
    WHERE type IN ('turn.started', 'assistant.message', 'user.message', 'result.recorded');
CREATE INDEX events_of_turns ON events (session_id, seq, type)
    WHERE type IN ('turn.started', 'turn.ended');

CREATE TABLE api_keys (
    id          TEXT PRIMARY KEY,
    tenant_id   TEXT NOT NULL,
    label       TEXT NOT NULL,
    created_at  TEXT NOT NULL,
    key_hash    TEXT NOT NULL UNIQUE
);

-- Handles of living sandboxes. No reference to sessions: one may be saved before it belongs to any.
CREATE TABLE sandboxes (
    id          TEXT PRIMARY KEY,
    session_id  TEXT NOT NULL,
    pid         INTEGER NOT NULL,
    start_time  INTEGER NOT NULL,
    cgroup      TEXT,
    run_dir     TEXT NOT NULL,
    session_dir TEXT NOT NULL,
    uid         INTEGER
);

CREATE TABLE usage (
    id                          INTEGER PRIMARY KEY,
    session_id                  TEXT NOT NULL REFERENCES sessions (id),
    model                       TEXT NOT NULL,
    input_tokens                INTEGER NOT NULL,
    output_tokens               INTEGER NOT NULL,
    cache_creation_input_tokens INTEGER NOT NULL,
    cache_read_input_tokens     INTEGER NOT NULL,
    created_at                  TEXT NOT NULL
);
CREATE INDEX usage_by_session ON usage (session_id);

-- What a model call cost is an event; the table for the sums follows from it, in the same commit.
CREATE TRIGGER usage_follows_events AFTER INSERT ON events WHEN new.type = 'usage.recorded'
BEGIN
    INSERT INTO usage (session_id, model, input_tokens, output_tokens, cache_creation_input_tokens, cache_read_input_tokens, created_at)
    VALUES (
        new.session_id,
        coalesce(json_extract(new.data, '$.model'), ''),
        coalesce(json_extract(new.data, '$.input_tokens'), 0),
        coalesce(json_extract(new.data, '$.output_tokens'), 0),
        coalesce(json_extract(new.data, '$.cache_creation_input_tokens'), 0),
        coalesce(json_extract(new.data, '$.cache_read_input_tokens'), 0),
        new.created_at
    );
END;

-- A session was active when a turn began or ended; saying so costs no commit of its own.
CREATE TRIGGER sessions_are_touched_by_turns AFTER INSERT ON events WHEN new.type IN ('turn.started', 'turn.ended')
BEGIN
    -- A fork copies old turns; they do not make it look older than it is.
    UPDATE sessions SET last_active_at = new.created_at WHERE id = new.session_id AND last_active_at < new.created_at;
END;
