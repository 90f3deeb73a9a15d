"""A server in this process, the requests that tests make of it, and the one way to wait for something. No fixtures.

The server runs under its own AppRunner: aiohttp's TestServer cancels handlers of clients that leave, which ours does not.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from ash import models, sse
from ash.config import Config
from ash.routes.parts import PARTS, Parts
from ash.web import create_app
from tests import fakes

Frame = sse.Frame
NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as another user")


@contextmanager
def as_nobody(code: str) -> Iterator[subprocess.Popen[bytes]]:
    """A child that runs `code` as another user; its interpreter starts as us, and may load nothing more afterwards."""
    become = f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})"
    script = f"import os, socket, http.client, encodings.idna\n{become}\n{code}"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
        yield child


class Server:
    """A running server, and the requests that tests make of it. `parts` are its insides."""

    def __init__(self, app: web.Application, runner: web.AppRunner, http: aiohttp.ClientSession) -> None:
        self.app, self.runner, self.http = app, runner, http
        self.port: int = runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def parts(self) -> Parts:
        return self.app[PARTS]

    @property
    def sandboxes(self) -> fakes.FakeSandboxes:
        assert isinstance(self.parts.sandboxes, fakes.FakeSandboxes)
        return self.parts.sandboxes

    async def call(self, method: str, path: str, body: Any = None, *, expect: int | None = None, **options: Any) -> Any:
        """The decoded answer; with `expect`, its status must be that."""
        async with self.http.request(method, self.url + path, data=encoded(body), **options) as answer:
            decoded = await answer.json() if answer.content_type == "application/json" else await answer.text()
            assert expect is None or answer.status == expect, (answer.status, decoded)
            return decoded

    async def deploy(self, name: str = "helper") -> models.Json:
        body = {"name": name, "systemPrompt": "You are a helper."}
        return dict((await self.call("POST", "/api/agents", body, expect=201))["agent"])

    async def session(self, **options: Any) -> str:
        """The id of a new session on a freshly deployed agent."""
        await self.deploy()
        return str((await self.call("POST", "/api/sessions", {"agent": "helper", **options}, expect=201))["session"]["id"])

    async def frames(self, id: str, content: Any = "Hello", **options: Any) -> list[Frame]:
        """All frames of a turn."""
        body = {"content": content, **options}
        async with self.http.post(f"{self.url}/api/sessions/{id}/messages", data=encoded(body)) as answer:
            assert answer.status == 200, await answer.text()
            return await read_frames(answer)


def encoded(body: Any) -> io.BytesIO | None:
    return None if body is None else io.BytesIO(json.dumps(body).encode())


async def read_frames(answer: aiohttp.ClientResponse, until: str | None = None) -> list[Frame]:
    """Frames up to the end of the stream, or up to the first one named `until`."""
    decoder, frames = sse.Decoder(), []
    async with asyncio.timeout(5):
        async for chunk in answer.content.iter_any():
            for frame in decoder.feed(chunk):
                frames.append(frame)
                if frame.event == until:
                    return frames
    return frames


async def eventually(claim: Callable[[], Any], seconds: float = 5.0) -> Any:
    """What `claim` gives once it is true; it may be a coroutine function. Fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        found = claim()
        if isinstance(found, Awaitable):
            found = await found
        if found:
            return found
        assert time.monotonic() < deadline, f"{claim} did not come true within {seconds} s"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(config: Config) -> AsyncIterator[Server]:
    """A server with `config` on a free port of 127.0.0.1, until the block ends."""
    runner = web.AppRunner(create_app(config), access_log=None, shutdown_timeout=2.0)
    try:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with aiohttp.ClientSession() as http:
            yield Server(runner.app, runner, http)
    finally:
        await runner.cleanup()
