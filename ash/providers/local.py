"""The offline model as a provider of the gateway: answered in this process, no network; large requests in a thread, not in the loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import NamedTuple

from ash import offline
from ash.errors import StreamBroken
from ash.models import Json
from ash.providers import COUNT_TOKENS, Call, Reply, unreachable
from ash.providers.intake import LARGE_BYTES


class _Prepared(NamedTuple):
    """All that takes time in an answer. `answer` is None when only tokens were counted."""

    headers: dict[str, str]
    answer: offline.Answer | None
    whole: Json
    events: Iterable[Json]


class Local:
    def __init__(self, replies: list[Json] | None = None) -> None:
        self._player = offline.Player(replies)
        self._thread = ThreadPoolExecutor(1, "offline model")

    @asynccontextmanager
    async def send(self, call: Call) -> AsyncIterator[Reply]:
        if len(call.body) > LARGE_BYTES:
            prepared = await asyncio.get_running_loop().run_in_executor(self._thread, self._prepare, call)
        else:
            prepared = self._prepare(call)
        answer = prepared.answer
        try:
            if answer is not None:
                await offline.wait(answer)
        except StreamBroken as error:
            raise unreachable("offline", error.message) from error
        if answer is not None and call.streams:
            headers = {**prepared.headers, "content-type": "text/event-stream; charset=utf-8"}
            yield Reply(headers, offline.play(prepared.events, answer))
        else:
            yield Reply({**prepared.headers, "content-type": "application/json"}, _one(json.dumps(prepared.whole).encode()))

    def _prepare(self, call: Call) -> _Prepared:
        is_counting = call.path == COUNT_TOKENS
        request = offline.check(call.request, counting=is_counting)
        headers = {"request-id": "req_" + offline.fingerprint(request)[:24]}
        if is_counting:
            return _Prepared(headers, None, {"input_tokens": offline.count_request(request)}, ())
        answer = self._player.answer(request)
        if call.streams:
            return _Prepared(headers, answer, {}, list(offline.events(request, answer)))
        return _Prepared(headers, answer, offline.message(request, answer), ())

    async def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


async def _one(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body
