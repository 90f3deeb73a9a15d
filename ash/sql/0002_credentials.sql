-- Secrets used upstream. `sealed` is AES-256-GCM under the master key, which is not in here; all other columns but last_used_at are
-- sealed with it as associated data, so that a row that was changed opens no more.

CREATE TABLE credentials (
    id           TEXT PRIMARY KEY,
    tenant_id    TEXT NOT NULL,
    type         TEXT NOT NULL,
    label        TEXT NOT NULL,
    agent        TEXT,
    host         TEXT,
    header       TEXT,
    template     TEXT,
    variable     TEXT,
    created_at   TEXT NOT NULL,
    last_used_at TEXT,
    sealed       BLOB NOT NULL
);
CREATE INDEX credentials_by_tenant ON credentials (tenant_id, created_at);
-- What an agent's tools send, and where it is swapped, must be unambiguous.
CREATE UNIQUE INDEX credentials_of_agents ON credentials (tenant_id, agent, host, lower(header)) WHERE agent IS NOT NULL AND host IS NOT NULL;
CREATE UNIQUE INDEX variables_of_agents ON credentials (tenant_id, agent, variable) WHERE agent IS NOT NULL AND variable IS NOT NULL;
CREATE UNIQUE INDEX model_keys_of_agents ON credentials (tenant_id, agent) WHERE agent IS NOT NULL AND host IS NULL;
