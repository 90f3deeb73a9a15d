"""The proxy as a hostile program inside meets it: what it may reach, what it is told, and what it cannot do to the server."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress

import pytest

from ash.egress import Egress, EgressAccess, EgressPolicy, dial, front, proxy, streams
from ash.errors import SandboxFailed, StoreFailed
from ash.models import Json
from tests.egress.network import LOOPBACK, OPEN, Table, Way, answering, echo, free_port, host, open_way, status
from tests.harness import eventually

HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


# What is let through


async def test_a_tunnel_carries_bytes_both_ways_and_closes_both_ends(way: Way) -> None:
    async with host(echo) as port:
        head, reader, writer = await way.tunnel(f"web.test:{port}")
        assert status(head) == 200
        writer.write(b"x" * 300_000)
        writer.write_eof()
        async with asyncio.timeout(5):
            assert len(await reader.read(-1)) == 300_000
        writer.close()
    assert way.egress.live("s1") == {"hosts": {"web.test": {"connections": 1, "bytesUp": 300_000, "bytesDown": 300_000}}, "refused": 0}


async def test_what_was_sent_before_the_tunnel_was_open_is_not_lost(way: Way) -> None:
    async with host(echo) as port:
        reader, writer = await way.connect()
        writer.write(f"CONNECT web.test:{port} HTTP/1.1\r\nHost: web.test\r\n\r\nearly".encode())
        async with asyncio.timeout(5):
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(5) == b"early"
        writer.close()


async def test_the_name_is_resolved_once_and_that_address_is_connected_to(way: Way) -> None:
    """DNS rebinding: the second answer would be another one."""
    way.table.answers["turn.test"] = [["127.0.0.1"], ["10.0.0.1"]]
    async with host(answering(HELLO)) as port:
        assert status(await way.get(f"http://turn.test:{port}/")) == 200
        assert way.table.asked == ["turn.test"]
        assert status(await way.get(f"http://turn.test:{port}/")) == 403


async def test_another_address_of_the_name_is_tried_when_one_does_not_answer(way: Way) -> None:
    async with host(answering(HELLO), "127.0.0.2") as port:
        way.table.answers["two.test"] = [["127.0.0.1", "127.0.0.2"]]
        assert status(await way.get(f"http://two.test:{port}/")) == 200


# What is refused


@pytest.mark.parametrize("bind", [False, True])
async def test_without_a_session_or_a_rule_everything_is_refused(data_dir: str, bind: bool) -> None:
    async with open_way(data_dir) as way:
        if bind:
            way.bind()
        assert status(await way.get("http://web.test/")) == 403
        head, _, writer = await way.tunnel("web.test:443")
        assert status(head) == 403
        writer.close()
        assert way.table.asked == []


async def test_a_refusal_says_what_and_which_setting_in_body_and_status_line(way: Way) -> None:
    way.policy = OPEN._replace(allow=("other.test",))
    answer = await way.get("http://web.test/")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.splitlines()[0] == b"HTTP/1.1 403 web.test:80 is not allowed by the operator's policy"
    assert b"Ash-Egress: not_allowed" in head
    assert body.decode() == (
        "Ash: web.test:80 is not allowed by the operator's policy.\n"
        'Add "web.test" to `allow` under [egress] in the operator\'s policy.toml.\n'
    )


@pytest.mark.parametrize(
    "target",
    ["169.254.169.254:80", "[fd00:ec2::254]:80", "10.0.0.1:443", "[::ffff:127.0.0.1]:443",
     "[::ffff:169.254.169.254]:80", "[64:ff9b::a9fe:a9fe]:80", "[2002:a9fe:a9fe::1]:80",
     "[::1]:443", "0.0.0.0:443", "[::]:443", "100.64.0.1:443", "metadata.test:80", "inner.test:443", "mixed.test:443"],
)  # fmt: skip
async def test_a_forbidden_address_is_refused_whatever_leads_to_it(way: Way, target: str) -> None:
    way.table.answers["metadata.test"] = [["169.254.169.254"]]
    way.bind("*:*", "0.0.0.0/0:*", "[::]/0:*")
    way.policy = OPEN._replace(allow=("*:*", "0.0.0.0/0:*", "[::]/0:*"))
    head, _, writer = await way.tunnel(target)
    writer.close()
    assert status(head) == 403
    assert b"Ash-Egress: address" in head


@pytest.mark.parametrize(
    "host_text", ["2130706433", "0x7f000001", "0x7f.1", "127.1", "017700000001", "0177.0.0.1", "127.0.0.1%00.test", "a b"]
)
async def test_odd_spellings_of_addresses_are_refused_before_anybody_resolves_them(way: Way, host_text: str) -> None:
    async with host(answering(HELLO)) as port:
        assert status(await way.get(f"http://{host_text}:{port}/")) == 400
        head = await way.say(f"CONNECT {host_text}:{port} HTTP/1.1\r\nHost: a\r\n\r\n")
        assert status(head) == 400
    assert way.table.asked == []


async def test_the_loopback_attack_would_work_if_the_policy_said_so(way: Way) -> None:
    """The same request, with and without the exception: it is the rule that stops it."""
    async with host(answering(HELLO)) as port:
        way.bind(f"127.0.0.1:{port}")
        way.policy = OPEN._replace(allow=(f"127.0.0.1:{port}",))
        assert status(await way.get(f"http://127.0.0.1:{port}/")) == 200
        way.policy = way.policy._replace(allow_private=())
        assert status(await way.get(f"http://127.0.0.1:{port}/")) == 403


async def test_the_servers_own_port_is_refused_even_where_loopback_is_allowed(way: Way) -> None:
    async with host(answering(HELLO)) as port:
        assert status(await way.get(f"http://web.test:{port}/")) == 200
        way.egress.protect(port)
        answer = await way.get(f"http://web.test:{port}/")
        assert status(answer) == 403
        assert b"Ash-Egress: server" in answer


async def test_the_servers_own_port_is_refused_by_whatever_address_it_is_reached(way: Way) -> None:
    """The kernel takes 0.0.0.0 for loopback."""
    way.policy = OPEN._replace(allow_private=("0.0.0.0/0", "::/0"))
    for number, address in enumerate(("0.0.0.0", "::ffff:127.0.0.1")):
        way.table.answers[f"own{number}.test"] = [[address]]
        async with host(answering(HELLO)) as port:
            assert status(await way.get(f"http://own{number}.test:{port}/")) == 200
            way.egress.protect(port)
            assert b"Ash-Egress: server" in await way.get(f"http://own{number}.test:{port}/")


async def test_a_network_is_denied_in_its_ipv6_form_too(way: Way) -> None:
    way.policy = OPEN._replace(deny=("127.0.0.1",), allow_private=("::/0",))
    way.table.answers["mapped.test"] = [["::ffff:127.0.0.1"]]
    assert b"Ash-Egress: denied" in await way.get("http://mapped.test/")


async def test_no_more_than_some_addresses_of_a_name_are_looked_at(way: Way) -> None:
    way.table.answers["many.test"] = [["127.0.0.1"] + [f"127.0.{number}.1" for number in range(dial.MAX_ANSWERS)] + ["10.0.0.1"]]
    async with host(answering(HELLO)) as port:
        assert status(await way.get(f"http://many.test:{port}/")) == 200


async def test_a_look_up_keeps_its_place_until_the_resolver_is_done(way: Way) -> None:
    """A thread that waits for a hostile name server does not stop because nobody waits for it any more."""
    asked, answer = list[str](), asyncio.Event()

    async def resolve(name: str) -> list[str]:
        asked.append(name)
        await answer.wait()
        return ["127.0.0.1"]

    way.policy = OPEN._replace(connect_seconds=0.05)
    way.egress._dialer._resolve = resolve
    for number in range(proxy._LOOKUPS + 2):
        assert status(await way.get(f"http://slow{number}.test/")) == 504
    assert len(asked) == proxy._LOOKUPS
    answer.set()
    await eventually(lambda: way.egress._gates["box"].lookups._value == proxy._LOOKUPS)


async def test_a_denied_network_is_refused_for_a_name_that_leads_there(way: Way) -> None:
    async with host(answering(HELLO)) as port:
        way.policy = OPEN._replace(deny=("127.0.0.1",))
        answer = await way.get(f"http://web.test:{port}/")
        assert status(answer) == 403
        assert b"Ash-Egress: denied" in answer


async def test_hosts_that_cannot_be_reached_are_502_and_hosts_that_do_not_answer_504(way: Way) -> None:
    assert status(await way.get("http://unknown.test/")) == 502
    assert status(await way.get(f"http://web.test:{free_port()}/")) == 502

    async def never(name: str) -> list[str]:
        await asyncio.Event().wait()
        return []

    way.policy = OPEN._replace(connect_seconds=0.05)
    way.egress._dialer._resolve = never
    assert status(await way.get("http://slow.test/")) == 504
    assert way.refusals() == []


async def test_a_new_policy_holds_at_once_and_ends_tunnels_that_it_forbids(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "POLICY_SECONDS", 0.02)
    async with host(echo) as port:
        head, reader, writer = await way.tunnel(f"web.test:{port}")
        assert status(head) == 200
        way.policy = EgressPolicy(allow=("other.test",), allow_private=(LOOPBACK,))
        async with asyncio.timeout(5):
            assert await reader.read(-1) == b""
        writer.close()
        assert status(await way.get(f"http://web.test:{port}/")) == 403


# Events and counts


async def test_refusals_become_events_of_the_session_once_and_are_all_counted(way: Way) -> None:
    way.bind("web.test")
    for _ in range(5):
        assert status(await way.get("http://evil.test/")) == 403
    await eventually(way.refusals)
    (event,) = way.refusals()
    assert (event["host"], event["port"], event["reason"]) == ("evil.test", 80, "not_asked")
    assert "sandbox.network.allowedDomains" in event["hint"]
    assert way.events[0][0] == "s1"
    assert (way.egress.live("s1") or {})["refused"] == 5
    assert way.egress.status()["refused"] == {"not_asked": 5}


async def test_a_log_that_cannot_be_written_changes_no_answer(data_dir: str) -> None:
    async def broken(session: str, kind: str, data: Json) -> None:
        raise StoreFailed("the disk is full")

    async with Egress(policy_of=lambda tenant, agent: OPEN, record=broken, resolve=Table()) as egress:
        await egress.open("box", data_dir)
        egress.bind("box", EgressAccess("s1", "default", "helper"))
        way = Way(egress, data_dir, [], Table())
        assert status(await way.get("http://evil.test/")) == 403


async def test_at_the_end_of_a_sandbox_what_it_used_is_recorded(way: Way) -> None:
    async with host(answering(HELLO)) as port:
        await way.get(f"http://web.test:{port}/")
    await way.egress.close("box")
    ((session, kind, data),) = way.events
    assert (session, kind, data["refused"]) == ("s1", "egress.recorded", 0)
    assert data["hosts"]["web.test"]["connections"] == 1
    assert way.egress.live("s1") is None


async def test_a_sandbox_that_used_nothing_records_nothing(way: Way) -> None:
    await way.egress.close("box")
    assert way.events == []


async def test_each_socket_speaks_for_its_own_session(way: Way, data_dir: str) -> None:
    other = os.path.join(data_dir, "other")
    os.mkdir(other)
    await way.egress.open("box2", other)
    way.bind(session="s2", sandbox="box2")
    second = Way(way.egress, other, way.events, way.table)
    async with host(answering(HELLO)) as port:
        assert status(await way.get(f"http://web.test:{port}/")) == 200
        assert status(await second.get(f"http://web.test:{port}/")) == 403
    assert (way.egress.live("s1") or {})["refused"] == 0
    assert (way.egress.live("s2") or {})["refused"] == 1


# Limits


async def test_connections_beyond_the_limit_are_refused_until_one_ends(way: Way) -> None:
    way.policy = OPEN._replace(connections=3)
    async with host(echo) as port:
        held = [await way.tunnel(f"web.test:{port}") for _ in range(3)]
        assert [status(head) for head, _, _ in held] == [200] * 3
        assert [status(await way.get(f"http://web.test:{port}/")) for _ in range(5)] == [429] * 5
        held[0][2].close()
        await eventually(lambda: way.egress._gates["box"].admitted == 2)
        head, _, writer = await way.tunnel(f"web.test:{port}")
        assert status(head) == 200
        for each in (writer, *(writer for _, _, writer in held)):
            each.close()
    await eventually(way.refusals)
    assert [(event["host"], event["reason"]) for event in way.refusals()] == [("", "busy")]


async def test_all_sessions_together_have_a_limit_too(way: Way, data_dir: str) -> None:
    way.policy = OPEN._replace(total_connections=1)
    os.mkdir(os.path.join(data_dir, "other"))
    await way.egress.open("box2", os.path.join(data_dir, "other"))
    way.bind("*:*", session="s2", sandbox="box2")
    async with host(echo) as port:
        _, _, writer = await way.tunnel(f"web.test:{port}")
        second = Way(way.egress, os.path.join(data_dir, "other"), way.events, way.table)
        assert status(await second.get(f"http://web.test:{port}/")) == 429
        writer.close()


async def test_bytes_are_held_to_the_bandwidth(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    async def pay(meter: streams.Meter) -> None:
        waited.append(meter._owed)

    monkeypatch.setattr(streams.Meter, "pay", pay)
    way.policy = OPEN._replace(bandwidth_mb_per_second=1.0)
    async with host(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n" + b"x" * 3_000_000)) as port:
        assert len(await way.get(f"http://web.test:{port}/")) > 3_000_000
    assert max(waited) > 2.0  # what is owed grows when nobody really waits: 3 MB at 1 MiB/s


async def test_the_volume_ends_the_transfer_and_refuses_the_next(way: Way) -> None:
    way.policy = OPEN._replace(total_mb=1)
    async with host(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n" + b"x" * 3_000_000)) as port:
        assert len(await way.get(f"http://web.test:{port}/")) < 2_000_000
        answer = await way.get(f"http://web.test:{port}/")
    assert status(answer) == 403
    assert b"Ash-Egress: volume" in answer


@pytest.mark.parametrize("limit", ["idle_seconds", "tunnel_seconds"])
async def test_a_half_open_tunnel_ends_by_itself(way: Way, limit: str) -> None:
    way.policy = OPEN._replace(idle_seconds=0.1) if limit == "idle_seconds" else OPEN._replace(tunnel_seconds=0.1)
    async with host(echo) as port:
        head, reader, writer = await way.tunnel(f"web.test:{port}")
        assert status(head) == 200
        async with asyncio.timeout(5):
            with suppress(ConnectionError):
                assert await reader.read(-1) == b""
        writer.close()
    await eventually(lambda: way.egress.status()["open"] == 0)


async def test_a_host_that_sends_more_than_the_program_reads_is_made_to_wait(way: Way) -> None:
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        with suppress(ConnectionError):
            while True:
                writer.write(b"x" * 65536)
                sent += 65536
                await writer.drain()

    async with host(flood) as port:
        head, _, writer = await way.tunnel(f"web.test:{port}")
        assert status(head) == 200
        last = -1
        while sent != last:
            last = sent
            await asyncio.sleep(0.1)
        assert sent < 64 << 20  # what all the buffers on the way hold, kernel's and ours
        writer.transport.abort()
    await eventually(lambda: way.egress.status()["open"] == 0)


async def test_a_flood_of_connections_waits_in_the_kernel(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "ARRIVALS_PER_SECOND", 10)
    callers = []
    for _ in range(60):
        caller = socket.socket(socket.AF_UNIX)
        caller.setblocking(False)
        with suppress(BlockingIOError):
            caller.connect(way.path)
        callers.append(caller)
    await asyncio.sleep(0.05)
    gate = way.egress._gates["box"]
    assert len(gate.visits) < 20
    assert gate.pause is not None
    for caller in callers:
        caller.close()


# Broken and hostile requests


async def test_a_head_that_never_ends_is_given_up(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow headers: a byte now and then must not hold a place for ever."""
    monkeypatch.setattr(front, "HEAD_SECONDS", 0.1)
    assert status(await way.say("GET http://web.test/ HTTP/1.1\r\nHost: a\r\nX: ")) == 408
    assert await way.say("") == b""


async def test_a_head_of_very_many_lines_is_refused_before_it_is_parsed(way: Way) -> None:
    lines = b"a:\r\n" * front.MAX_LINES
    answer = await way.say(b"GET http://web.test/ HTTP/1.1\r\nHost: a\r\n" + lines + b"\r\n")
    assert (status(answer), b"more than 300 headers" in answer) == (400, True)
    async with host(answering(HELLO)) as port:
        head = f"POST http://web.test:{port}/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 1000\r\n\r\n"
        assert status(await way.say(head.encode() + b"\n" * 1000)) == 200
    async with host(answering(b"HTTP/1.1 200 OK\r\n" + lines + b"Content-Length: 0\r\n\r\n")) as port:
        assert status(await way.get(f"http://web.test:{port}/")) == 502


async def test_a_head_beyond_the_limit_is_refused(way: Way) -> None:
    answer = await way.get("http://web.test/", *(f"X-{number}: {'x' * 1000}" for number in range(50)))
    assert status(answer) == 400


@pytest.mark.parametrize(
    "head",
    [
        "POST http://web.test/ HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x HTTP/1.1",
        "POST http://web.test/ HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        "POST http://web.test/ HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST http://web.test/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        "POST http://web.test/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        "GET http://web.test/ HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        "GET http://web.test/ HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n",
        "CONNECT web.test:443 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc",
        "CONNECT web.test HTTP/1.1\r\nHost: a\r\n\r\n",
        "CONNECT web.test:0 HTTP/1.1\r\nHost: a\r\n\r\n",
        "CONNECT user@web.test:443 HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: web.test\r\n\r\n",
        "OPTIONS * HTTP/1.1\r\nHost: web.test\r\n\r\n",
        "GET https://web.test/ HTTP/1.1\r\nHost: web.test\r\n\r\n",
        "GET ftp://web.test/ HTTP/1.1\r\nHost: web.test\r\n\r\n",
        "GET http://user:secret@web.test/ HTTP/1.1\r\nHost: web.test\r\n\r\n",
        "GET http:///x HTTP/1.1\r\nHost: web.test\r\n\r\n",
        "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + "\r\n\r\n",
        "SSH-2.0-OpenSSH\r\n\r\n",
    ],
)
async def test_what_could_be_read_in_two_ways_or_is_not_for_a_proxy_is_refused(way: Way, head: str) -> None:
    answer = await way.say(head.encode("latin-1"))
    assert status(answer) in (400, 501)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert way.table.asked == []


async def test_a_program_that_leaves_in_the_middle_leaves_nothing_behind(way: Way) -> None:
    async with host(echo) as port:
        for request in (b"", b"GET http://we", b"CONNECT web.test:1 HTTP/1.1\r\n"):
            _, writer = await way.connect()
            writer.write(request)
            writer.transport.abort()
        _, _, writer = await way.tunnel(f"web.test:{port}")
        writer.transport.abort()
    await eventually(lambda: way.egress.status()["open"] == 0)


async def test_closing_a_sandbox_ends_its_connections_and_frees_its_socket(way: Way) -> None:
    async with host(echo) as port:
        _, reader, writer = await way.tunnel(f"web.test:{port}")
        await way.egress.close("box")
        async with asyncio.timeout(5):
            with suppress(ConnectionError):
                assert await reader.read(-1) == b""
        writer.close()
    with pytest.raises(ConnectionRefusedError):
        await way.connect()
    await way.egress.close("box")


async def test_without_a_connection_there_is_no_task(data_dir: str) -> None:
    before = asyncio.all_tasks()
    async with open_way(data_dir) as way:
        way.bind("*:*")
        assert asyncio.all_tasks() == before


async def test_a_folder_that_is_not_there_is_said(data_dir: str) -> None:
    async with open_way(data_dir) as way:
        with pytest.raises(SandboxFailed, match="egress proxy cannot listen"):
            await way.egress.open("box2", os.path.join(data_dir, "missing"))


async def test_a_sandbox_that_is_gone_is_not_bound(data_dir: str) -> None:
    async with open_way(data_dir) as way:
        assert way.egress.bind("gone", EgressAccess("s9", "default", "helper", ("*",))) == {}
        assert way.egress.live("s9") is None
