"""The offline model as a server of its own, so that other clients of the Messages API can use it. Takes any key, keeps nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from typing import Any

from aiohttp import web

from ash.errors import ModelRefused, StreamBroken
from ash.models import Json
from ash.offline import player, requests, script, stream, tokens

_MAX_BODY_BYTES = 64 * 1024 * 1024
_CREATED_AT = "2026-01-01T00:00:00Z"
_MODEL = {"type": "model", "id": stream.MODEL, "display_name": "Ash offline demo model", "created_at": _CREATED_AT}
_PLAYER = web.AppKey("player", script.Player)


def create_app(replies: list[Json] | None = None) -> web.Application:
    """The app; `replies` as `script.load` returns them."""
    app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[_errors])
    app[_PLAYER] = script.Player(replies)
    app.router.add_post("/v1/messages", _messages)
    app.router.add_post("/v1/messages/count_tokens", _count_tokens)
    app.router.add_get("/v1/models", _models)
    app.router.add_get("/v1/models/{id}", _model)
    return app


@web.middleware
async def _errors(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
    except ModelRefused as refusal:
        return web.json_response(stream.error_body(refusal), status=refusal.status, headers=refusal.headers)
    except web.HTTPRequestEntityTooLarge:
        return _error(413, "request_too_large", f"The request is larger than {_MAX_BODY_BYTES} bytes.")
    except web.HTTPException as error:
        return _error(error.status, "not_found_error", f"{request.method} {request.path} does not exist here.")
    except StreamBroken:
        if request.transport is not None:
            request.transport.abort()
        return web.Response()
    return response


def _error(status: int, kind: str, message: str) -> web.Response:
    return web.json_response({"type": "error", "error": {"type": kind, "message": message}}, status=status)


async def _body(request: web.Request) -> Any:
    try:
        return json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise requests.invalid(f"The request body is not valid JSON: {error}") from error


async def _messages(request: web.Request) -> web.StreamResponse:
    body = requests.check(await _body(request))
    answer = request.app[_PLAYER].answer(body)
    await player.wait(answer)
    headers = {"request-id": "req_" + stream.fingerprint(body)[:24]}
    if not body.get("stream"):
        return web.json_response(stream.message(body, answer), headers=headers)
    response = web.StreamResponse(headers={**headers, "content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"})
    await response.prepare(request)
    async for chunk in player.play(stream.events(body, answer), answer):
        await response.write(chunk)
    await response.write_eof()
    return response


async def _count_tokens(request: web.Request) -> web.Response:
    body = requests.check(await _body(request), counting=True)
    return web.json_response({"input_tokens": tokens.count_request(body)})


async def _models(request: web.Request) -> web.Response:
    return web.json_response({"data": [_MODEL], "has_more": False, "first_id": stream.MODEL, "last_id": stream.MODEL})


async def _model(request: web.Request) -> web.Response:
    if request.match_info["id"] != stream.MODEL:
        return _error(404, "not_found_error", f"model: {request.match_info['id']}")
    return web.json_response(_MODEL)


async def serve(host: str, port: int, replies: list[Json] | None, stop: asyncio.Event) -> None:
    """Listen until `stop` is set; the address is printed once it is there."""
    runner = web.AppRunner(create_app(replies), access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        bound = runner.addresses[0]
        shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        sys.stdout.write(f"Offline model listening on http://{shown}:{bound[1]}\n")
        sys.stdout.flush()
        await stop.wait()
    finally:
        await runner.cleanup()


def run(host: str, port: int, script_path: str | None = None) -> None:
    """Serve until SIGINT or SIGTERM. Raises ConfigError for a bad script and OSError when the address is taken."""
    replies = script.load(script_path) if script_path else None
    asyncio.run(_run(host, port, replies))


async def _run(host: str, port: int, replies: list[Json] | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # no signals outside the main thread
            loop.add_signal_handler(number, stop.set)
    await serve(host, port, replies, stop)
