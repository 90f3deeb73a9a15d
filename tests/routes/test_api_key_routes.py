"""/api/api-keys over HTTP."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

from tests.harness import Server


async def test_a_new_key_works_is_listed_without_its_text_and_is_worthless_once_deleted(
    start_server: Callable[..., Awaitable[Server]],
) -> None:
    server = await start_server(auth="always")
    _, first = await server.parts.keys.create("default", "first")
    own = {"Authorization": f"Bearer {first}"}
    made = await server.call("POST", "/api/api-keys", {"label": "ci"}, expect=201, headers=own)
    assert re.fullmatch(r"ash_[A-Za-z0-9_-]{32}", made["key"])
    new = {"Authorization": f"Bearer {made['key']}"}
    listed = (await server.call("GET", "/api/api-keys", expect=200, headers=new))["keys"]
    assert {"id": made["id"], "label": "ci", "keyPrefix": "••••••••"}.items() <= listed[-1].items()
    assert made["key"] not in str(listed)
    assert await server.call("DELETE", f"/api/api-keys/{made['id']}", expect=200, headers=own) == {"ok": True}
    assert (await server.call("GET", "/api/api-keys", expect=401, headers=new))["error"] == "Invalid API key"
    assert (await server.call("DELETE", f"/api/api-keys/{made['id']}", expect=404, headers=own))["error"] == "API key not found"


async def test_a_key_without_a_label_gets_one(server: Server) -> None:
    made = await server.call("POST", "/api/api-keys", expect=201)
    labels = {key["id"]: key["label"] for key in (await server.call("GET", "/api/api-keys"))["keys"]}
    assert labels[made["id"]] == "dashboard-key"


async def test_another_tenants_key_cannot_be_seen_or_deleted(server: Server) -> None:
    theirs, _ = await server.parts.keys.create("other", "theirs")
    assert theirs.id not in str(await server.call("GET", "/api/api-keys"))
    await server.call("DELETE", f"/api/api-keys/{theirs.id}", expect=404)
