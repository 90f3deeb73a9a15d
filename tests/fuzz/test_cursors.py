"""Cursors of streams, of any text: refused with 400, or a stream that begins where they say; never a failure of the server."""

from __future__ import annotations

import random

import pytest
from yarl import URL

from tests.harness import Server

_ODD = [
    "0",
    "1",
    "3",
    "4",
    "-1",
    "+1",
    " 1 ",
    "1.0",
    "1e3",
    "0x1",
    "\u0663",
    "\uff11",
    "9" * 15,
    "9" * 16,
    "9" * 5000,
    "null",
    "",
    " ",
    "\u00e9",
    "1,2",
    "1 2",
    "NaN",
    "%00",
    "'",
]


def texts() -> list[str]:
    """The odd ones, and some without any sense; the same every time."""
    source = random.Random(3)
    alphabet = "0123456789+-.eExX _\t\u00e9\u0663"
    return _ODD + ["".join(source.choices(alphabet, k=source.randint(1, 20))) for _ in range(40)]


@pytest.fixture
async def id(server: Server) -> str:
    """An ended session: its streams end by themselves."""
    id = await server.session()
    await server.frames(id, "Hi")
    await server.call("DELETE", f"/api/sessions/{id}", expect=200)
    return id


async def test_any_cursor_in_the_query_is_refused_or_right(server: Server, id: str) -> None:
    last = await server.parts.store.last_seq(id)
    for text in texts():
        url = URL(f"{server.url}/api/sessions/{id}/stream").with_query(after=text)
        async with server.http.get(url) as answer:
            await check(answer.status, await answer.read(), text, last)


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_any_last_event_id_is_refused_or_right(server: Server, id: str, method: str) -> None:
    last = await server.parts.store.last_seq(id)
    for text in texts():
        if not text.strip():
            continue  # as if there were none
        url = f"{server.url}/api/sessions/{id}/{'stream' if method == 'GET' else 'messages'}"
        async with server.http.request(method, url, headers={"Last-Event-ID": text}) as answer:
            await check(answer.status, await answer.read(), text, last)


async def check(status: int, content: bytes, text: str, last: int) -> None:
    assert status in (200, 204, 400), (status, text)
    plain = text.strip()
    is_usable = plain.isascii() and plain.isdigit() and int(plain[:20]) <= last
    assert (status != 400) == is_usable or (status == 400 and plain != text), (status, text)
    if status == 200:
        ids = [int(line[4:]) for line in content.split(b"\n") if line.startswith(b"id: ")]
        assert ids == sorted(set(ids))
        assert all(seq > int(plain or 0) for seq in ids)
