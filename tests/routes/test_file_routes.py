"""/api/sessions/{id}/files and /workspace over HTTP: what a caller gets, and what nobody gets by any path."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import io
import os
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from urllib.parse import quote

import aiohttp
import pytest
from yarl import URL

from ash.errors import Overloaded
from ash.routes import files as routes
from ash.workspaces import MOST_OF_TENANT
from tests.harness import Server, eventually

Start = Callable[..., Awaitable[Server]]
WHOLE = b"print('hello')"
SECRET = "the server's own"


def workspace(server: Server, id: str) -> Path:
    return Path(server.parts.config.data_dir, "sessions", id, "workspace")


@pytest.fixture
async def id(server: Server) -> str:
    """A session with files, and links to a secret of the server's."""
    id = await server.session()
    folder, data = workspace(server, id), Path(server.parts.config.data_dir)
    (data / "secret").write_text(SECRET)
    (folder / "src").mkdir()
    (folder / "src/main.py").write_text("print('hello')")
    (folder / "node_modules").mkdir()
    (folder / "node_modules/x").write_text("")
    (folder / ".cache").mkdir()
    (folder / ".cache/y").write_text("")
    (folder / "link").symlink_to(data / "secret")
    (folder / "up").symlink_to("../../..")
    os.mkfifo(folder / "fifo")
    return id


def archive(**members: bytes) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return target.getvalue()


async def post(server: Server, path: str, body: bytes, type: str = "application/gzip") -> tuple[int, dict[str, object]]:
    async with server.http.post(server.url + path, data=io.BytesIO(body), headers={"Content-Type": type}) as answer:
        return answer.status, await answer.json()


async def raw(server: Server, line: str) -> tuple[int, bytes]:
    """A request whose path is sent byte for byte: clients tidy up what they are given."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(f"GET {line} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return int(answer.split()[1]), answer


# Listing and reading


async def test_the_list_has_what_typed_clients_need(server: Server, id: str) -> None:
    answer = await server.call("GET", f"/api/sessions/{id}/files", expect=200)
    assert answer["source"] == "sandbox"
    assert [file["path"] for file in answer["files"]] == [".cache/y", "src/main.py"]
    assert answer["files"][1].keys() == {"path", "size", "modifiedAt"}
    assert answer["files"][1]["size"] == 14
    assert answer["files"][1]["modifiedAt"].endswith("Z")
    less = await server.call("GET", f"/api/sessions/{id}/files?includeHidden=false", expect=200)
    assert [file["path"] for file in less["files"]] == ["src/main.py"]


async def test_a_file_is_sent_as_it_is_and_always_to_be_saved(server: Server, id: str) -> None:
    async with server.http.get(f"{server.url}/api/sessions/{id}/files/src/main.py") as answer:
        assert (answer.status, await answer.read()) == (200, WHOLE)
        assert answer.headers["Content-Type"] == "text/x-python"
        assert answer.headers["Content-Disposition"] == "attachment; filename*=UTF-8''main.py"
        assert answer.headers["X-Ash-Source"] == "sandbox"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


async def test_a_file_as_json_and_its_limit(server: Server, id: str) -> None:
    found = await server.call("GET", f"/api/sessions/{id}/files/src/main.py?format=json", expect=200)
    assert found == {"path": "src/main.py", "content": "print('hello')", "size": 14, "source": "sandbox"}
    (workspace(server, id) / "large").write_bytes(b"x" * (routes._MAX_JSON + 1))
    refused = await server.call("GET", f"/api/sessions/{id}/files/large?format=json", expect=400)
    assert "File too large" in refused["error"]


@pytest.mark.parametrize(
    "name",
    ["a b", "ü.txt", "100%.txt", "a%2fb", 'quo"te', "semi;colon", "new\nline", "back\\slash", "<script>.html", "data:text,x", "..."],
)
async def test_a_file_of_any_name_can_be_fetched_and_its_name_breaks_no_header(server: Server, id: str, name: str) -> None:
    (workspace(server, id) / name).write_text("found")
    url = URL(f"{server.url}/api/sessions/{id}/files/{quote(name, safe='')}", encoded=True)
    async with server.http.get(url) as answer:
        assert (answer.status, await answer.text()) == (200, "found")
        assert answer.headers["Content-Disposition"].startswith("attachment; filename*=UTF-8''")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("link", 400), ("up/secret", 400), ("fifo", 400), ("src", 400), ("missing", 404), ("src/main.py/x", 404),
        ("../secret", 400), ("..%2f..%2fsecret", 400), ("%2e%2e/%2e%2e/%2e%2e/secret", 400), ("src/%2e%2e/%2e%2e/home/x", 400),
        ("/etc/passwd", 400), ("%2fetc%2fpasswd", 400), ("src/main.py%00", 400), ("%00", 400), ("src/", 400), ("%ff%fe", 404),
        ("src%5c..%5c..%5csecret", 404), ("%25%32%65%25%32%65/secret", 404), ("a" * 3000, 404), ("a/" * 2000 + "b", 404),
    ],
)  # fmt: skip
async def test_nothing_outside_and_nothing_but_files_is_read(server: Server, id: str, path: str, status: int) -> None:
    for query in ("", "?format=json"):
        found, answer = await raw(server, f"/api/sessions/{id}/files/{path}{query}")
        assert (found, SECRET.encode() in answer, b"root:" in answer) == (status, False, False), answer


async def test_paths_that_a_client_would_tidy_up_are_refused_or_reach_no_file(server: Server, id: str) -> None:
    for path in (f"/api/sessions/{id}/files/../../../../secret", f"/api/sessions/{id}/files/./../files/link"):
        status, answer = await raw(server, path)
        assert status in (400, 404)
        assert SECRET.encode() not in answer


async def test_the_unusable_is_said_in_the_one_shape(server: Server, id: str) -> None:
    for path, words in (("files/x?format=xml", "format must be one of raw, json"), ("files?includeHidden=x", "includeHidden")):
        assert words in (await server.call("GET", f"/api/sessions/{id}/{path}", expect=400))["error"]


# Ranges


@pytest.mark.parametrize(
    ("wanted", "status", "content", "part"),
    [
        ("bytes=0-3", 206, b"prin", "bytes 0-3/14"), ("bytes=6-", 206, b"'hello')", "bytes 6-13/14"),
        ("bytes=-4", 206, b"lo')", "bytes 10-13/14"),
        ("bytes=10-999", 206, b"lo')", "bytes 10-13/14"), ("bytes=-999", 200, WHOLE, None), ("bytes=0-", 200, WHOLE, None),
        ("bytes=5-2", 200, WHOLE, None), ("bytes=0-1,3-4", 200, WHOLE, None), ("lines=1", 200, WHOLE, None),
    ],
)  # fmt: skip
async def test_a_part_of_a_file_can_be_asked_for(
    server: Server, id: str, wanted: str, status: int, content: bytes, part: str | None
) -> None:
    url = f"{server.url}/api/sessions/{id}/files/src/main.py"
    async with server.http.get(url, headers={"Range": wanted}) as answer:
        assert (answer.status, await answer.read(), answer.headers.get("Content-Range")) == (status, content, part)
        assert answer.headers["Accept-Ranges"] == "bytes"


async def test_a_part_behind_the_end_is_refused(server: Server, id: str) -> None:
    refused = await server.call("GET", f"/api/sessions/{id}/files/src/main.py", expect=416, headers={"Range": "bytes=14-"})
    assert refused["code"] == "range_not_satisfiable"


async def test_a_part_of_a_file_that_was_changed_is_not_given_for_one_of_the_old(server: Server, id: str) -> None:
    url = f"{server.url}/api/sessions/{id}/files/src/main.py"
    async with server.http.get(url) as answer:
        tag = answer.headers["ETag"]
    for changes, status in ((False, 206), (True, 200)):
        if changes:
            (workspace(server, id) / "src/main.py").write_text("something else")
        async with server.http.get(url, headers={"Range": "bytes=0-3", "If-Range": tag}) as answer:
            assert answer.status == status


async def test_head_tells_the_size_and_sends_nothing(server: Server, id: str) -> None:
    async with server.http.head(f"{server.url}/api/sessions/{id}/files/src/main.py") as answer:
        assert (answer.status, answer.headers["Content-Length"], await answer.read()) == (200, "14", b"")
    async with server.http.head(f"{server.url}/api/sessions/{id}/workspace") as answer:
        assert answer.status == 405


async def test_a_file_that_shrinks_while_it_is_sent_breaks_the_answer(server: Server, id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    large = workspace(server, id) / "large"
    large.write_bytes(bytes(8 << 20))
    monkeypatch.setattr(routes, "_PIECE", 64 * 1024)
    async with server.http.get(f"{server.url}/api/sessions/{id}/files/large") as answer:
        await answer.content.readexactly(1000)
        large.write_bytes(b"")
        with pytest.raises(aiohttp.ClientError):
            await answer.read()


async def test_a_client_that_does_not_read_is_dropped_and_leaves_no_descriptor(
    server: Server, id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "TRANSFER_TIMEOUT", 0.1)
    (workspace(server, id) / "large").write_bytes(bytes(32 << 20))
    before = len(os.listdir("/proc/self/fd"))
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
    writer.write(f"GET /api/sessions/{id}/files/large HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    await eventually(lambda: len(os.listdir("/proc/self/fd")) <= before + 1, 10)  # our own end is still open
    writer.close()
    reader.feed_eof()


# Archives


async def test_a_workspace_comes_down_and_goes_up_again(server: Server, id: str) -> None:
    async with server.http.get(f"{server.url}/api/sessions/{id}/workspace") as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "application/gzip"
        assert answer.headers["Content-Disposition"] == f"attachment; filename*=UTF-8''{id}.tar.gz"
        content = await answer.read()
    assert SECRET.encode() not in gzip.decompress(content)
    other = await server.session()
    assert await post(server, f"/api/sessions/{other}/workspace", content) == (200, {"message": "Workspace restored", "files": 3})
    assert (workspace(server, other) / "src/main.py").read_text() == "print('hello')"
    assert not (workspace(server, other) / "link").exists()


@pytest.mark.parametrize("status", ["active", "paused", "stopped"])
async def test_an_archive_is_taken_as_body_and_as_base64_whatever_the_session_does(server: Server, id: str, status: str) -> None:
    if status != "active":
        await server.call("POST", f"/api/sessions/{id}/{'pause' if status == 'paused' else 'stop'}", expect=200)
    path = f"/api/sessions/{id}/workspace"
    for type in ("application/gzip", "application/x-tar", "application/octet-stream"):
        assert (await post(server, path, archive(a=type.encode()), type))[0] == 200
        assert (workspace(server, id) / "a").read_bytes() == type.encode()
    bundle = base64.b64encode(archive(b=b"2")).decode()
    assert await server.call("POST", path, {"bundle": bundle}, expect=200, headers={"Content-Type": "application/json"}) == {
        "message": "Workspace restored",
        "files": 1,
    }
    assert (workspace(server, id) / "b").read_bytes() == b"2"


async def test_an_ended_session_can_be_read_and_not_written(server: Server, id: str) -> None:
    await server.call("DELETE", f"/api/sessions/{id}", expect=200)
    await server.call("GET", f"/api/sessions/{id}/files/src/main.py", expect=200)
    status, answer = await post(server, f"/api/sessions/{id}/workspace", archive(a=b"1"))
    assert (status, answer["code"]) == (410, "session_ended")


@pytest.mark.parametrize(
    ("body", "type", "words"),
    [
        (b"", "application/gzip", "Empty bundle"), (b"no archive" * 100, "application/gzip", "no tar archive"),
        (b"{}", "application/json", "bundle is required"), (b'{"bundle": ""}', "application/json", "bundle must have"),
        (b'{"bundle": "?"}', "application/json", "bundle is not base64"), (b'{"bundle": "AAAA"}', "application/json", "no tar archive"),
        (b"x", "text/plain", "not valid JSON"),
    ],
)  # fmt: skip
async def test_what_is_no_archive_is_refused_with_what_is_wrong(server: Server, id: str, body: bytes, type: str, words: str) -> None:
    status, answer = await post(server, f"/api/sessions/{id}/workspace", body, type)
    assert status == 400
    assert words in str(answer["error"])


async def test_an_upload_beyond_the_limits_is_refused(start_server: Start) -> None:
    server = await start_server(max_body_mb=1, disk_mb=1)
    id = await server.session()
    status, answer = await post(server, f"/api/sessions/{id}/workspace", bytes(2 << 20))
    assert (status, "max_body_mb" in str(answer["error"])) == (413, True)

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(32):
            yield bytes(1 << 16)

    async with server.http.post(f"{server.url}/api/sessions/{id}/workspace", data=endless()) as chunked:
        assert chunked.status == 413
    status, answer = await post(server, f"/api/sessions/{id}/workspace", archive(a=bytes(2 << 20)))
    assert (status, "session's disk" in str(answer["error"])) == (413, True)
    assert list(workspace(server, id).iterdir()) == []


async def test_more_archives_than_the_server_takes_are_to_come_again(server: Server, id: str) -> None:
    server.parts.workspaces._archives = 10**6
    async with server.http.get(f"{server.url}/api/sessions/{id}/workspace") as answer:
        assert (answer.status, answer.headers["Retry-After"]) == (429, "5")
    server.parts.workspaces._archives = 0
    async with server.http.get(f"{server.url}/api/sessions/{id}/workspace") as answer:
        assert (answer.status, len(await answer.read()) > 0) == (200, True)
    await eventually(lambda: server.parts.workspaces._archives == 0)


async def test_archives_of_one_tenant_do_not_keep_out_those_of_another(server: Server, id: str) -> None:
    workspaces = server.parts.workspaces
    with contextlib.ExitStack() as slow:
        for _ in range(MOST_OF_TENANT):
            slow.enter_context(workspaces.archive("default"))
        with pytest.raises(Overloaded), workspaces.archive("default"):
            pass
        with workspaces.archive("another"):
            pass
    async with server.http.get(f"{server.url}/api/sessions/{id}/workspace") as answer:
        assert answer.status == 200


async def test_a_client_that_leaves_in_the_middle_of_an_upload_leaves_nothing(server: Server, id: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    head = (
        f"POST /api/sessions/{id}/workspace HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/gzip\r\nContent-Length: 99999\r\n\r\n"
    )
    writer.write(head.encode() + archive(a=b"1"))
    await writer.drain()
    await eventually(lambda: server.parts.workspaces._archives)
    writer.transport.abort()
    await eventually(lambda: not server.parts.workspaces._archives and len(os.listdir("/proc/self/fd")) <= before)
    assert not (workspace(server, id) / "a").exists()


async def test_another_tenant_finds_nothing(server: Server, id: str) -> None:
    _, key = await server.parts.keys.create("another", "test")
    headers = {"Authorization": f"Bearer {key}"}
    for path in ("files", "files/src/main.py", "workspace"):
        answer = await server.call("GET", f"/api/sessions/{id}/{path}", expect=404, headers=headers)
        assert answer["code"] == "session_not_found"
    async with server.http.post(f"{server.url}/api/sessions/{id}/workspace", data=archive(a=b"1"), headers=headers) as refused:
        assert refused.status == 404
    assert not (workspace(server, id) / "a").exists()


async def test_a_session_without_a_folder_says_so(server: Server, id: str) -> None:
    folder = workspace(server, id)
    folder.rename(folder.with_name("moved"))
    for path in ("files", "files/x", "workspace"):
        answer = await server.call("GET", f"/api/sessions/{id}/{path}", expect=404)
        assert answer["error"] == "No workspace available for this session"
