"""The offline model as a provider of the gateway: answered in this process, no network."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

from ash import offline
from ash.errors import StreamBroken
from ash.models import Json
from ash.providers import COUNT_TOKENS, Call, Reply, unreachable


class Local:
    def __init__(self, replies: list[Json] | None = None) -> None:
        self._player = offline.Player(replies)

    @asynccontextmanager
    async def send(self, call: Call) -> AsyncIterator[Reply]:
        if call.path == COUNT_TOKENS:
            request = offline.check(call.request, counting=True)
            yield _whole({"input_tokens": offline.count_request(request)}, request)
            return
        request = offline.check(call.request)
        answer = self._player.answer(request)
        try:
            await offline.wait(answer)
        except StreamBroken as error:
            raise unreachable("offline", error.message) from error
        if call.streams:
            yield Reply({**_id(request), "content-type": "text/event-stream; charset=utf-8"}, offline.play(request, answer))
        else:
            yield _whole(offline.message(request, answer), request)

    async def close(self) -> None:
        """Nothing is held open."""


def _whole(value: Json, request: Json) -> Reply:
    async def chunks() -> AsyncGenerator[bytes, None]:
        yield json.dumps(value).encode()

    return Reply({**_id(request), "content-type": "application/json"}, chunks())


def _id(request: Json) -> dict[str, str]:
    return {"request-id": "req_" + offline.fingerprint(request)[:24]}
