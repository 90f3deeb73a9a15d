"""Plain HTTP through the proxy: what the host hears and what the program inside gets back."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from ash.tasks import Tasks
from tests.egress.network import Way, answering, host, status
from tests.harness import eventually

HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


async def test_the_host_header_is_the_urls_whatever_the_program_says(way: Way) -> None:
    """A forged Host would choose another virtual host behind the same address."""
    heard: list[bytes] = []
    async with host(answering(HELLO, heard=heard)) as port:
        await way.say(f"GET http://web.test:{port}/path?q=1 HTTP/1.1\r\nHost: evil.test\r\nConnection: close\r\n\r\n")
    assert heard[0].startswith(b"GET /path?q=1 HTTP/1.1\r\n")
    assert f"\r\nHost: web.test:{port}\r\n".encode() in heard[0]
    assert b"evil" not in heard[0]


async def test_headers_for_one_hop_and_the_proxys_own_do_not_go_on(way: Way) -> None:
    heard: list[bytes] = []
    dropped = ("Proxy-Authorization: Basic c2VjcmV0", "Proxy-Connection: keep-alive", "Keep-Alive: 5", "TE: trailers", "Upgrade: h2c",
               "X-Hop: secret")  # fmt: skip
    async with host(answering(HELLO, heard=heard)) as port:
        await way.say(
            f"GET http://web.test:{port}/ HTTP/1.1\r\nHost: a\r\nConnection: close, X-Hop\r\n"
            + "".join(f"{header}\r\n" for header in dropped)
            + "Authorization: Bearer mine\r\nX-Kept: yes\r\n\r\n"
        )
    for name in ("Proxy", "Keep-Alive", "TE:", "Upgrade", "X-Hop", "secret"):
        assert name.encode() not in heard[0]
    assert b"X-Kept: yes" in heard[0]
    assert b"Authorization: Bearer mine" in heard[0]


async def test_connection_cannot_take_the_length_away(way: Way) -> None:
    heard: list[bytes] = []
    async with host(answering(HELLO, heard=heard)) as port:
        head = f"POST http://web.test:{port}/ HTTP/1.1\r\nHost: a\r\nConnection: close, content-length, host\r\nContent-Length: 2\r\n\r\nab"
        assert status(await way.say(head)) == 200
    assert b"Content-Length: 2" in heard[0]
    assert b"Host: web.test" in heard[0]


@pytest.mark.parametrize(
    "body", ["Content-Length: 5\r\n\r\nhello", "Transfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;ext=1\r\nlo\r\n0\r\nTrailer: x\r\n\r\n"]
)
async def test_bodies_arrive_whole_however_they_are_framed(way: Way, body: str) -> None:
    got = b""

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal got
        head = await reader.readuntil(b"\r\n\r\n")
        while not got.endswith(b"hello" if b"Content-Length" in head else b"0\r\n\r\n"):
            got += await reader.read(100)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")
        writer.close()

    async with host(take) as port:
        answer = await way.say(f"PUT http://web.test:{port}/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{body}")
    assert answer.endswith(b"\r\n\r\n2\r\nok\r\n0\r\n\r\n")
    assert b"hel" in got
    assert b"Trailer" not in got


async def test_one_connection_serves_several_requests_to_several_hosts(way: Way) -> None:
    way.table.answers["two.test"] = [["127.0.0.1"]]
    async with host(answering(HELLO)) as port:
        answer = await way.say(
            f"GET http://web.test:{port}/ HTTP/1.1\r\nHost: a\r\n\r\n"
            f"GET http://two.test:{port}/ HTTP/1.1\r\nHost: a\r\n\r\n"
            "GET http://10.0.0.1/ HTTP/1.1\r\nHost: a\r\n\r\n"
        )
    assert answer.count(b"HTTP/1.1 200") == 2
    assert answer.count(b"HTTP/1.1 403") == 1
    hosts = (way.egress.live("s1") or {})["hosts"]
    assert {name: counts["connections"] for name, counts in hosts.items()} == {"web.test": 1, "two.test": 1}


async def test_a_program_that_waits_to_send_its_body_is_told_to_go_on(way: Way) -> None:
    heard: list[bytes] = []
    async with host(answering(HELLO, heard=heard)) as port:
        reader, writer = await way.connect()
        writer.write(f"POST http://web.test:{port}/ HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n".encode())
        async with asyncio.timeout(5):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
            writer.write(b"ab")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        writer.close()
    assert b"Expect" not in heard[0]


async def test_a_body_of_tiny_pieces_leaves_others_their_turn(way: Way) -> None:
    """Thousands of them arrive at once, and nobody waits for the network in between."""
    turns = 0

    async def another() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def reading(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n0\r\n\r\n")
        writer.write(HELLO)
        writer.close()

    pieces = b"1\r\nx\r\n" * 5000 + b"0\r\n\r\n"
    async with Tasks() as tasks:
        _ = tasks.start(another(), "another")
        async with host(answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + pieces)) as port:
            assert (await way.get(f"http://web.test:{port}/")).endswith(b"0\r\n\r\n")
        assert turns >= 5000
        before = turns
        async with host(reading) as port:
            head = f"POST http://web.test:{port}/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
            assert status(await way.say(head, pieces)) == 200
        assert turns - before >= 5000


async def test_a_host_that_answers_before_it_has_all_is_heard(way: Way) -> None:
    async with host(answering(b"HTTP/1.1 413 Too much\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")) as port:
        head = f"POST http://web.test:{port}/ HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n"
        assert status(await way.say(head, b"x" * 1000)) == 413


@pytest.mark.parametrize(
    "answer", [b"", b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", b"HTTP/1.1 101 Switching\r\n\r\n"]
)
async def test_a_host_that_does_not_speak_http_is_502(way: Way, answer: bytes) -> None:
    async with host(answering(answer)) as port:
        assert status(await way.get(f"http://web.test:{port}/")) == 502


async def test_half_an_answer_ends_as_half_an_answer(way: Way) -> None:
    async with host(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")) as port:
        answer = await way.get(f"http://web.test:{port}/")
    assert answer.endswith(b"half")
    assert answer.count(b"HTTP/1.1") == 1
    await eventually(lambda: way.egress.status()["open"] == 0)


async def test_an_answer_with_two_lengths_reaches_the_program_with_one(way: Way) -> None:
    both = b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"
    async with host(answering(both)) as port:
        answer = await way.get(f"http://web.test:{port}/")
    assert b"999" not in answer
    assert answer.endswith(b"2\r\nhi\r\n0\r\n\r\n")


@pytest.mark.parametrize(
    ("method", "answer"),
    [("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"), ("GET", b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n"),
     ("GET", b"HTTP/1.0 200 OK\r\n\r\nuntil the end"), ("DELETE", b"HTTP/1.1 204 No Content\r\n\r\n")],
)  # fmt: skip
async def test_answers_without_a_length_of_their_own_end(way: Way, method: str, answer: bytes) -> None:
    async with host(answering(answer)) as port:
        got = await way.say(f"{method} http://web.test:{port}/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert status(got) == status(answer)


async def test_a_program_that_does_not_read_its_answer_makes_the_host_wait(way: Way) -> None:
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        with suppress(ConnectionError):
            while True:
                writer.write(b"x" * 65536)
                sent += 65536
                await writer.drain()

    async with host(flood) as port:
        _, writer = await way.connect()
        writer.write(f"GET http://web.test:{port}/ HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        last = -1
        while sent != last or not sent:
            last = sent
            await asyncio.sleep(0.1)
        assert sent < 64 << 20
        writer.transport.abort()
    await eventually(lambda: way.egress.status()["open"] == 0)
