"""Hosts over TLS that want credentials, and programs inside that speak to them through the proxy and an interceptor. All on loopback."""

from __future__ import annotations

import asyncio
import gzip
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from ash.config import Secret
from ash.egress.authority import Authority, upstream_context
from ash.egress.interception import BoundCredential, Interceptor
from tests.egress.network import Table, Way, open_way

SECRET = "s3cr3t/Token+Value=="
PLACEHOLDER = "ash-placeholder-0123456789abcdef"


def bound(host: str, **fields: Any) -> BoundCredential:
    given = {"id": "c1", "header": "Authorization", "template": None, "placeholder": PLACEHOLDER, "variable": "TOKEN", **fields}
    return BoundCredential(host=host, secret=Secret(given.pop("secret", SECRET)), **given)


class SecretHost:
    """A host that shows what it was sent. `heard` has each request's method, path and headers."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str, dict[str, str]]] = []
        self.received = 0
        self.port = 0

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30)
        routes = {"/echo": self._echo, "/count": self._count, "/big": self._big, "/gzip": self._gzip, "/br": self._brotli}
        for path, handler in {**routes, "/drip": self._drip, "/ws": self._websocket, "/away": self._redirect, "/": self._echo}.items():
            app.router.add_route("*", path, handler)
        return app

    def _hear(self, request: web.Request) -> str:
        self.heard.append((request.method, request.path, dict(request.headers)))
        return request.headers.get("Authorization", "none")

    async def _echo(self, request: web.Request) -> web.Response:
        """An `httpbin`: the headers in the body, and one in a header."""
        given = self._hear(request)
        return web.json_response(dict(request.headers), headers={"X-Echo": given}, reason=f"OK {given}")

    async def _count(self, request: web.Request) -> web.Response:
        self._hear(request)
        self.received = 0
        async for chunk in request.content.iter_any():
            self.received += len(chunk)
        return web.Response(text=str(self.received))

    async def _big(self, request: web.Request) -> web.StreamResponse:
        self._hear(request)
        answer = web.StreamResponse()
        await answer.prepare(request)
        for _ in range(16):
            await answer.write(b"x" * (1 << 20))
        return answer

    async def _gzip(self, request: web.Request) -> web.Response:
        given = self._hear(request)
        return web.Response(body=gzip.compress(given.encode() * 1000), headers={"Content-Encoding": "gzip"})

    async def _brotli(self, request: web.Request) -> web.Response:
        return web.Response(body=b"\x0b\x02\x80hello\x03", headers={"Content-Encoding": "br"})

    async def _drip(self, request: web.Request) -> web.StreamResponse:
        """The credential byte by byte."""
        answer = web.StreamResponse()
        await answer.prepare(request)
        for byte in self._hear(request).encode():
            await answer.write(bytes((byte,)))
        return answer

    async def _websocket(self, request: web.Request) -> web.WebSocketResponse:
        given = self._hear(request)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str(f"welcome {given}")
        async for message in socket:
            await socket.send_str(f"you said {message.data}")
        return socket

    async def _redirect(self, request: web.Request) -> web.Response:
        self._hear(request)
        raise web.HTTPFound(request.query["to"])


@asynccontextmanager
async def secret_host(authority: Authority, name: str) -> AsyncIterator[SecretHost]:
    host = SecretHost()
    runner = web.AppRunner(host.app(), access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=authority.context(name))
    await site.start()
    host.port = runner.addresses[0][1]
    try:
        yield host
    finally:
        await runner.cleanup()


@asynccontextmanager
async def relay(path: str) -> AsyncIterator[int]:
    """A port that leads to the proxy's socket, as the one inside a sandbox does."""

    async def pipe(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                target.write(data)
                await target.drain()
        except ConnectionError:
            pass
        finally:
            target.close()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner = await asyncio.open_unix_connection(path)
        await asyncio.gather(pipe(reader, inner[1]), pipe(inner[0], writer))

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        port: int = server.sockets[0].getsockname()[1]
        yield port
    finally:
        server.close()


class Inside:
    """A program in a sandbox whose session has credentials for `api.test`, and the hosts around it."""

    def __init__(self, way: Way, host: SecretHost, other: SecretHost, http: aiohttp.ClientSession, proxy: str, ca: str) -> None:
        self.way, self.host, self.other, self.http, self.proxy, self.ca = way, host, other, http, proxy, ca
        self.url, self.target = f"https://api.test:{host.port}", f"api.test:{host.port}"

    async def get(self, path: str = "/echo", **options: Any) -> aiohttp.ClientResponse:
        return await self.call("GET", path, **options)

    async def call(self, method: str, path: str, **options: Any) -> aiohttp.ClientResponse:
        async with asyncio.timeout(20):
            answer = await self.http.request(method, self.url + path, proxy=self.proxy, **options)
            await answer.read()
            return answer

    async def tls(self, target: str = "") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection behind CONNECT, as a program that writes HTTP by itself has it."""
        target = target or self.target
        head, reader, writer = await self.way.tunnel(target)
        assert b" 200 " in head, head
        await writer.start_tls(ssl.create_default_context(cafile=self.ca), server_hostname=target.partition(":")[0])
        return reader, writer

    async def say(self, *lines: str, body: bytes = b"") -> bytes:
        reader, writer = await self.tls()
        writer.write("".join(f"{line}\r\n" for line in (*lines, "")).encode() + body)
        async with asyncio.timeout(10):
            try:
                return await reader.read(-1)
            finally:
                writer.close()


@asynccontextmanager
async def inside(folder: str, **fields: Any) -> AsyncIterator[Inside]:
    """`api.test` has the credential, `other.test` has none; both are signed by a private authority that the server was told of."""
    authority = Authority(["api.test", "other.test"])
    own_ca = Path(folder, "own-ca.pem")
    own_ca.write_bytes(authority.pem)
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        host, other = await enter(secret_host(authority, "api.test")), await enter(secret_host(authority, "other.test"))
        table = Table(api_test=["127.0.0.1"], other_test=["127.0.0.1"])
        trusted = fields.pop("trusted", str(own_ca))
        way = await enter(open_way(
            folder, table, interceptors=lambda access, folder: Interceptor(access.session_id, access.credentials, folder, trusted)
        ))  # fmt: skip
        credentials = fields.pop("credentials", None)
        credential = (bound(f"api.test:{host.port}", **fields),) if credentials is None else credentials(host.port)
        access = way.access("*:*", credentials=credential)
        way.egress.bind("box", access)
        await way.egress.prepare("box")
        both = Path(folder, "both.pem")
        both.write_bytes(Path(folder, "ca.pem").read_bytes() + authority.pem)
        proxy = f"http://127.0.0.1:{await enter(relay(way.path))}"
        connector = aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=str(both)))
        http = await enter(aiohttp.ClientSession(connector=connector))
        yield Inside(way, host, other, http, proxy, str(both))
    upstream_context.cache_clear()


def tool_environment(there: Inside, home: str) -> dict[str, str]:
    names = ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy")
    variables = there.way.egress._gates["box"].interceptor.environment()  # type: ignore[union-attr]
    here = {name: there.ca if value == "/run/ash/ca.pem" else value for name, value in variables.items()}
    return {"PATH": os.environ["PATH"], "HOME": home, "NODE_USE_ENV_PROXY": "1", **dict.fromkeys(names, there.proxy), **here}
