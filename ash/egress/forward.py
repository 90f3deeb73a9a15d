"""Plain HTTP through the proxy: one request written anew towards its host, and the answer written anew towards the sandbox.

Nothing is passed on as it came but the bodies' bytes: both sides are framed by h11, so that no two readers see different requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import h11

from ash.egress.front import Front, Target, next_event
from ash.egress.rules import shown
from ash.egress.streams import CHUNK, Pair, Watch, give_way, watched
from ash.errors import InvalidRequest, UpstreamError

MAX_ANSWER_HEAD = 128 * 1024
_HOP_BY_HOP = frozenset((
    b"connection", b"proxy-connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer",
    b"transfer-encoding", b"upgrade", b"expect",
))  # fmt: skip

Headers = list[tuple[bytes, bytes]]


async def forward(front: Front, request: h11.Request, target: Target, outside: Pair, watching: Watch) -> bool:
    """Send the request and pass its answer on. False when the connection to the sandbox cannot be used further."""
    exchange = _Exchange(front, outside)
    await exchange.write(_request(request, target))
    async with watched(watching) as group:
        upload = group.create_task(exchange.upload())
        await exchange.download()
        if not upload.done():  # answered before all was sent: nobody wants the rest
            upload.cancel()
    return exchange.is_complete and front.next_cycle()


def _request(request: h11.Request, target: Target) -> h11.Request:
    headers = passed_on(request.headers)
    host = shown(target.host, None if target.port == 80 else target.port).encode("ascii")
    framing = [(b"Transfer-Encoding", b"chunked")] if any(name == b"transfer-encoding" for name, _ in request.headers) else []
    kept = [(name, value) for name, value in headers if name.lower() != b"host"]
    return h11.Request(
        method=request.method, target=target.path, headers=[(b"Host", host), *kept, *framing, (b"Connection", b"close")]
    )  # fmt: skip


def passed_on(headers: Any) -> Headers:
    """Headers as they were spelled, without those that are for one hop only."""
    named = _named_by_connection(headers)
    return [(name, value) for name, value in headers.raw_items() if name.lower() not in _HOP_BY_HOP | named]


def _named_by_connection(headers: Iterable[tuple[bytes, bytes]]) -> frozenset[bytes]:
    """Headers that Connection declares to be for one hop. Those that frame the body are never taken for such."""
    words = {word.strip().lower() for name, value in headers if name == b"connection" for word in value.split(b",")}
    return frozenset(words - {b"content-length", b"host"})


class _Exchange:
    """One request and its answer under way."""

    def __init__(self, front: Front, outside: Pair) -> None:
        self._front = front
        self._reader, self._writer = outside
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_ANSWER_HEAD)
        self.is_complete = False

    async def write(self, event: Any) -> None:
        data = self._http.send(event)
        if data:
            self._writer.write(data)
            await self._writer.drain()

    async def upload(self) -> None:
        """The request's body."""
        if self._front.http.they_are_waiting_for_100_continue:
            await self._front.send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))
        while True:
            event = await self._front.event()
            if isinstance(event, h11.Data):
                await self.write(h11.Data(data=event.data))
                await give_way()
            elif isinstance(event, h11.EndOfMessage):
                await self.write(h11.EndOfMessage())
                return
            else:
                raise InvalidRequest("the request broke off")

    async def download(self) -> None:
        """The answer. Raises UpstreamError for one that is none."""
        while True:
            event = await self._event()
            if isinstance(event, h11.Response):
                await self._front.send(_response(event))
            elif isinstance(event, h11.Data):
                await self._front.send(h11.Data(data=event.data))
                await give_way()
            elif isinstance(event, h11.EndOfMessage):
                await self._front.send(h11.EndOfMessage())
                self.is_complete = True
                return
            elif isinstance(event, h11.InformationalResponse):
                await give_way()
            else:
                raise UpstreamError("the host closed the connection without an answer")

    async def _event(self) -> Any:
        try:
            while (event := next_event(self._http)) is h11.NEED_DATA:
                self._http.receive_data(await self._reader.read(CHUNK))
        except h11.RemoteProtocolError as error:
            raise UpstreamError(f"the host's answer is not HTTP: {error}") from error
        return event


def _response(response: h11.Response) -> h11.Response:
    is_chunked = any(name == b"transfer-encoding" for name, _ in response.headers)
    headers = [
        (name, value) for name, value in passed_on(response.headers) if not (is_chunked and name.lower() == b"content-length")
    ]  # fmt: skip
    return h11.Response(status_code=response.status_code, headers=headers, reason=response.reason)
