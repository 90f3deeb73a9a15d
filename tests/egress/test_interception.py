"""Credentials that are put in at egress, over real TLS: what reaches the host, what comes back, and what a hostile program tries."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests.egress.hosts import PLACEHOLDER, SECRET, Inside, inside
from tests.egress.network import status
from tests.harness import eventually


@pytest.fixture
async def there(data_dir: str) -> AsyncIterator[Inside]:
    async with inside(data_dir) as found:
        yield found


def sent(there: Inside, header: str = "Authorization") -> str | None:
    """What the host got in the header at last."""
    return there.host.heard[-1][2].get(header)


# What is put in


async def test_the_placeholder_is_swapped_wherever_it_stands_in_the_header(there: Inside) -> None:
    for shape in ("Bearer {}", "token {}", "{}", 'Digest a="{}", b="{}"'):
        answer = await there.get(headers={"Authorization": shape.replace("{}", PLACEHOLDER)})
        assert answer.status == 200
        assert sent(there) == shape.replace("{}", SECRET)


async def test_the_placeholder_is_swapped_inside_basic_authentication(there: Inside) -> None:
    answer = await there.get(headers={"Authorization": aiohttp.encode_basic_auth("x-access-token", PLACEHOLDER)})
    assert answer.status == 200
    assert base64.b64decode((sent(there) or "").removeprefix("Basic ")).decode() == f"x-access-token:{SECRET}"


async def test_without_the_header_nothing_is_put_in(there: Inside) -> None:
    """git asks without it first, and again when it is told to."""
    assert (await there.get()).status == 200
    assert sent(there) is None


@pytest.mark.parametrize(
    ("template", "expected"),
    [("Bearer {value}", f"Bearer {SECRET}"), ("Basic me:{value}", "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode())],
)
async def test_a_template_sets_the_header_whatever_was_sent(data_dir: str, template: str, expected: str) -> None:
    async with inside(data_dir, template=template) as there:
        for headers in ({}, {"Authorization": "Bearer somebody-elses"}, {"authorization": PLACEHOLDER}):
            assert (await there.get(headers=headers)).status == 200
            assert sent(there) == expected


async def test_another_header_can_be_bound(data_dir: str) -> None:
    async with inside(data_dir, header="PRIVATE-TOKEN") as there:
        await there.get(headers={"private-token": PLACEHOLDER, "Authorization": "Bearer own"})
        assert (sent(there, "private-token"), sent(there)) == (SECRET, "Bearer own")


# What is not


@pytest.mark.parametrize("value", ["Bearer a-key-of-its-own", "Basic " + base64.b64encode(b"a:b").decode(), "Basic !!", ""])
async def test_a_key_of_its_own_is_refused_for_a_host_with_a_credential(there: Inside, value: str) -> None:
    answer = await there.get(headers={"Authorization": value})
    assert answer.status == 403
    assert "$TOKEN" in await answer.text()
    assert there.host.heard == []


async def test_another_host_never_gets_the_credential(there: Inside) -> None:
    url = f"https://other.test:{there.other.port}/echo"
    async with there.http.get(url, proxy=there.proxy, headers={"Authorization": PLACEHOLDER}) as answer:
        assert answer.status == 200
    assert there.other.heard[-1][2]["Authorization"] == PLACEHOLDER


async def test_a_redirect_to_another_host_does_not_carry_the_credential(there: Inside) -> None:
    target = f"https://other.test:{there.other.port}/echo"
    answer = await there.get(f"/away?to={target}", headers={"Authorization": PLACEHOLDER})
    assert answer.status == 200
    assert sent(there) == SECRET
    assert SECRET not in str(there.other.heard)


async def test_a_host_header_for_another_name_is_refused(there: Inside) -> None:
    """On a shared server it would steer the credential to somebody else's site."""
    port = there.host.port
    for name in ("other.test", f"other.test:{port}", f"api.test:{port + 1}", f"api.test.other.test:{port}", f"api.test:{port}, other.test"):
        answer = await there.say("GET /echo HTTP/1.1", f"Host: {name}", f"Authorization: {PLACEHOLDER}")
        assert status(answer) == 421, name
    assert there.host.heard == []


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (("GET https://other.test/ HTTP/1.1", "Host: api.test"), 400),
        (("GET / HTTP/1.1", "Host: api.test", "Host: other.test"), 400),
        (("GET / HTTP/1.1",), 400),
        (("POST / HTTP/1.1", "Host: api.test", "Content-Length: 5", "Transfer-Encoding: chunked"), 400),
        (("POST / HTTP/1.1", "Host: api.test", "Content-Length: 5", "Content-Length: 6"), 400),
        (("POST / HTTP/1.1", "Host: api.test", "Transfer-Encoding: gzip, chunked"), 501),
        (("GET / HTTP/1.1", "Host: api.test", "X: " + "x" * 200_000), 431),
        (("TRACE / HTTP/1.1", "Host: api.test"), 400),
        (("CONNECT other.test:443 HTTP/1.1", "Host: api.test"), 400),
        (("\x16\x03\x01 nonsense",), 400),
    ],
)
async def test_what_could_be_read_in_two_ways_never_reaches_the_host(there: Inside, lines: tuple[str, ...], expected: int) -> None:
    assert status(await there.say(*lines)) == expected
    assert there.host.heard == []


async def test_a_header_that_connection_names_cannot_take_the_credential_away(data_dir: str) -> None:
    async with inside(data_dir, template="Bearer {value}") as there:
        await there.get(headers={"Connection": "Authorization, keep-alive"})
        assert sent(there) == f"Bearer {SECRET}"


async def test_plain_http_to_the_same_host_carries_nothing(there: Inside) -> None:
    answer = await there.way.get(f"http://api.test:{there.host.port}/echo", f"Authorization: {PLACEHOLDER}")
    assert SECRET.encode() not in answer
    assert SECRET not in str(there.host.heard)


async def test_a_host_with_a_wrong_certificate_gets_nothing_and_the_program_is_told_why(data_dir: str) -> None:
    async with inside(data_dir, trusted="") as there:
        answer = await there.get(headers={"Authorization": PLACEHOLDER})
        assert answer.status == 502
        assert "its certificate is not valid" in await answer.text()
        assert there.host.heard == []


async def test_a_host_that_the_policy_forbids_is_refused_and_reported(there: Inside) -> None:
    there.way.policy = there.way.policy._replace(allow_private=())
    answer = await there.get(headers={"Authorization": PLACEHOLDER})
    assert answer.status == 403
    assert "loopback" in await answer.text()
    assert [refusal["reason"] for refusal in there.way.refusals()] == ["address"]


async def test_a_credential_that_was_deleted_is_used_no_more_on_open_connections(data_dir: str) -> None:
    is_deleted = False
    async with inside(data_dir, is_revoked=lambda: is_deleted) as there:
        assert (await there.get(headers={"Authorization": PLACEHOLDER})).status == 200
        is_deleted = True
        answer = await there.get(headers={"Authorization": PLACEHOLDER})
        assert answer.status == 403
        assert "deleted" in await answer.text()
        assert len(there.host.heard) == 1


# What comes back


@pytest.mark.parametrize("template", [None, "Basic me:{value}"])
async def test_a_host_that_repeats_the_secret_does_not_give_it_away(data_dir: str, template: str | None) -> None:
    async with inside(data_dir, template=template) as there:
        answer = await there.get(headers={"Authorization": f"Bearer {PLACEHOLDER}"})
        shown = f"{answer.reason} {answer.headers} {await answer.text()}"
        assert sent(there)  # it did get it
        assert SECRET not in shown
        assert (sent(there) or "").split()[1][8:] not in shown
        assert "*****" in answer.headers["X-Echo"]
        assert answer.content_length == len(await answer.read())


@pytest.mark.parametrize("path", ["/drip", "/gzip"])
async def test_a_secret_that_comes_in_pieces_or_compressed_is_found(there: Inside, path: str) -> None:
    answer = await there.get(path, headers={"Authorization": f"Bearer {PLACEHOLDER}"})
    assert sent(there, "Accept-Encoding") == "identity"
    text = await answer.text()
    assert text.startswith("Bearer ****")
    assert SECRET not in text


async def test_an_answer_that_cannot_be_looked_into_is_refused(there: Inside) -> None:
    answer = await there.get("/br")
    assert answer.status == 502
    assert "compresses" in await answer.text()


async def test_large_bodies_stream_both_ways_with_length_and_without(there: Inside) -> None:
    size = 8 << 20

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(size >> 20):
            yield b"y" * (1 << 20)

    for body in (io.BytesIO(b"y" * size), chunks()):
        assert await (await there.call("POST", "/count", data=body)).text() == str(size)
    assert len(await (await there.get("/big")).read()) == 16 << 20


async def test_one_connection_serves_many_requests(there: Inside) -> None:
    reader, writer = await there.tls()
    for number in range(5):
        writer.write(f"GET /echo?{number} HTTP/1.1\r\nHost: {there.target}\r\nAuthorization: {PLACEHOLDER}\r\n\r\n".encode())
    async with asyncio.timeout(5):
        for _ in range(5):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            _ = await reader.readexactly(length)
    writer.close()
    assert [headers["Authorization"] for _, _, headers in there.host.heard] == [SECRET] * 5
    assert there.way.egress.live("s1")["hosts"]["api.test"]["connections"] == 1  # type: ignore[index]


async def test_answers_without_a_body_end_where_they_should(there: Inside) -> None:
    for _ in range(2):
        answer = await there.call("HEAD", "/echo")
        assert answer.status == 200
        assert (answer.content_length or 0) > 0


async def test_a_program_that_waits_to_continue_is_told_to(there: Inside) -> None:
    assert await (await there.call("POST", "/count", data=b"z" * 1000, expect100=True)).text() == "1000"


async def test_a_websocket_gets_the_credential_and_keeps_the_secret(there: Inside) -> None:
    async with (
        asyncio.timeout(10),
        there.http.ws_connect(there.url + "/ws", proxy=there.proxy, headers={"Authorization": f"Bearer {PLACEHOLDER}"}) as socket,
    ):
        assert (await socket.receive_str()).startswith("welcome Bearer ****")
        await socket.send_str("hello s")
        assert await socket.receive_str() == "you said hello s"
    assert sent(there) == f"Bearer {SECRET}"


async def test_a_program_that_leaves_in_the_middle_ends_its_connection_to_the_host(there: Inside) -> None:
    reader, writer = await there.tls()
    writer.write(f"GET /big HTTP/1.1\r\nHost: {there.target}\r\n\r\n".encode())
    async with asyncio.timeout(5):
        _ = await reader.readexactly(1000)
    writer.transport.abort()
    await eventually(lambda: not there.way.egress.status()["open"])


async def test_a_half_sent_body_is_not_passed_on_as_a_whole(there: Inside) -> None:
    _, writer = await there.tls()
    writer.write(f"POST /count HTTP/1.1\r\nHost: {there.target}\r\nContent-Length: 1000\r\n\r\nshort".encode())
    await writer.drain()
    writer.close()
    await eventually(lambda: not there.way.egress.status()["open"])
    assert there.host.received < 1000
