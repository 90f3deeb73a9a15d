"""Bedrock and Vertex through the real `anthropic` package and the real credential libraries, against a loopback endpoint."""

from __future__ import annotations

import base64
import binascii
import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from ash.config import load_config
from ash.gateway import Gateway, ModelAccess
from ash.providers import Timing
from ash.providers.cloud import bedrock_model, vertex_model
from ash.sse import Decoder

SECRET, TOKEN = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "session-token-0123456789"
ASK = {"model": "claude-sonnet-4-5", "max_tokens": 5, "stream": True, "messages": [{"role": "user", "content": "private words"}]}
EVENTS: list[dict[str, Any]] = [
    {"type": "message_start", "message": {"model": "claude-x", "usage": {"input_tokens": 3, "output_tokens": 1}}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "héllo", "new_field": [1]}},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 4}},
    {"type": "message_stop", "amazon-bedrock-invocationMetrics": {"inputTokenCount": 3}},
]


class Seen:
    def __init__(self) -> None:
        self.path, self.calls = "", 0
        self.headers: dict[str, str] = {}
        self.body: dict[str, Any] = {}


def aws_frame(event: dict[str, Any], kind: str = "chunk") -> bytes:
    """One message of AWS' event-stream encoding."""
    payload = (
        json.dumps({"bytes": base64.b64encode(json.dumps(event).encode()).decode()}).encode()
        if kind == "chunk"
        else json.dumps(event).encode()
    )
    names = {":event-type": kind, ":message-type": "event"} if kind == "chunk" else {":exception-type": kind, ":message-type": "exception"}
    headers = b"".join(
        bytes([len(name)]) + name.encode() + b"\x07" + struct.pack(">H", len(value)) + value.encode()
        for name, value in {**names, ":content-type": "application/json"}.items()
    )
    prelude = struct.pack(">II", 16 + len(headers) + len(payload), len(headers))
    message = prelude + struct.pack(">I", binascii.crc32(prelude)) + headers + payload
    return message + struct.pack(">I", binascii.crc32(message))


@asynccontextmanager
async def endpoint(status: int = 200, body: bytes = b"", content_type: str = "application/json") -> AsyncIterator[tuple[str, Seen]]:
    seen = Seen()

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path == "/token":
            return web.json_response({"access_token": "google-token", "expires_in": 3600})
        seen.calls += 1
        seen.path, seen.headers, seen.body = request.raw_path, dict(request.headers), json.loads(await request.read())
        return web.Response(status=status, body=body, headers={"content-type": content_type, "x-amzn-RequestId": "aws-1"})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", seen
    finally:
        await runner.cleanup()


@asynccontextmanager
async def gateway(folder: Path, variable: str, usage: list[dict[str, Any]]) -> AsyncIterator[str]:
    async def on_usage(session_id: str, counts: dict[str, Any]) -> None:
        usage.append(counts)

    timing = Timing(connect=2, idle=3, retries=1, retry_budget=2)
    async with Gateway(load_config(None, {variable: "1"}), on_usage=on_usage, timing=timing) as running:
        await running.open("sb", str(folder / "g.sock"))
        running.bind("sb", ModelAccess("s", "default", "m"))
        yield str(folder / "g.sock")


async def ask(socket_path: str, body: dict[str, Any] = ASK, path: str = "/v1/messages", **headers: str) -> tuple[int, bytes]:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    timeout = aiohttp.ClientTimeout(total=30)
    connector = aiohttp.UnixConnector(socket_path)
    async with (
        aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
        session.post(f"http://gateway{path}", json=body, headers=sent) as response,
    ):
        return response.status, await response.read()


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("g")


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    pytest.importorskip("boto3", reason="boto3 is not installed: pip install 'anthropic[bedrock]'")
    for name in ("AWS_PROFILE", "AWS_DEFAULT_REGION", "AWS_BEARER_TOKEN_BEDROCK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    return monkeypatch


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    pytest.importorskip("google.auth.transport.requests", reason="google-auth is not installed: pip install 'anthropic[vertex]'")
    monkeypatch.setenv("CLOUD_ML_REGION", "europe-west1")
    monkeypatch.setenv("ANTHROPIC_VERTEX_PROJECT_ID", "project-1")
    return monkeypatch


def service_account(url: str, path: Path) -> str:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode()
    account = {
        "type": "service_account",
        "client_email": "a@b.test",
        "token_uri": f"{url}/token",
        "private_key": pem,
        "private_key_id": "1",
    }
    (path / "account.json").write_text(json.dumps({**account, "project_id": "project-1", "client_id": "1"}))
    return str(path / "account.json")


# Bedrock


async def test_bedrock_streams_signed_and_the_events_arrive_unchanged(aws: pytest.MonkeyPatch, folder: Path) -> None:
    usage: list[dict[str, Any]] = []
    body = b"".join(aws_frame(event) for event in EVENTS)
    async with endpoint(body=body, content_type="application/vnd.amazon.eventstream") as (url, seen):
        aws.setenv("ANTHROPIC_BEDROCK_BASE_URL", url)
        async with gateway(folder, "CLAUDE_CODE_USE_BEDROCK", usage) as socket_path:
            status, answer = await ask(socket_path, anthropic_beta="b1,b2")
    assert status == 200
    assert [frame.data for frame in Decoder().feed(answer)] == EVENTS
    assert usage == [{"model": "claude-x", "input_tokens": 3, "output_tokens": 4}]
    assert seen.path == "/model/global.anthropic.claude-sonnet-4-5-20250929-v1:0/invoke-with-response-stream"
    assert seen.headers["Authorization"].startswith("AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/")
    assert "/eu-west-1/bedrock/aws4_request" in seen.headers["Authorization"]
    assert seen.body["anthropic_version"] == "bedrock-2023-05-31"
    assert seen.body["anthropic_beta"] == ["b1", "b2"]
    assert not {"model", "stream"} & set(seen.body)


async def test_bedrock_answers_whole_messages(aws: pytest.MonkeyPatch, folder: Path) -> None:
    message = {"type": "message", "model": "claude-x", "usage": {"input_tokens": 1, "output_tokens": 2}}
    usage: list[dict[str, Any]] = []
    async with endpoint(body=json.dumps(message).encode()) as (url, seen):
        aws.setenv("ANTHROPIC_BEDROCK_BASE_URL", url)
        async with gateway(folder, "CLAUDE_CODE_USE_BEDROCK", usage) as socket_path:
            status, answer = await ask(socket_path, {**ASK, "model": "arn:aws:bedrock:eu-west-1:1:inference-profile/x", "stream": False})
    assert (status, json.loads(answer)) == (200, message)
    assert usage[0]["output_tokens"] == 2
    assert seen.path.endswith("/invoke")


async def test_a_refused_signature_is_told_without_what_was_signed(aws: pytest.MonkeyPatch, folder: Path) -> None:
    told = f"The request signature we calculated does not match. The Canonical String was 'POST x-amz-security-token:{TOKEN}'"
    async with endpoint(403, json.dumps({"message": told}).encode()) as (url, _):
        aws.setenv("ANTHROPIC_BEDROCK_BASE_URL", url)
        async with gateway(folder, "CLAUDE_CODE_USE_BEDROCK", []) as socket_path:
            status, answer = await ask(socket_path)
    assert status == 403
    assert b"does not match" in answer
    assert b"Set AWS_REGION" in answer
    assert TOKEN.encode() not in answer
    assert SECRET.encode() not in answer


async def test_bedrock_throttling_is_tried_again(aws: pytest.MonkeyPatch, folder: Path) -> None:
    async with endpoint(429, b'{"message": "Too many tokens"}') as (url, seen):
        aws.setenv("ANTHROPIC_BEDROCK_BASE_URL", url)
        async with gateway(folder, "CLAUDE_CODE_USE_BEDROCK", []) as socket_path:
            status, answer = await ask(socket_path)
    assert (status, json.loads(answer)["error"]["type"], seen.calls) == (429, "rate_limit_error", 2)
    assert b"Too many tokens" in answer


async def test_an_error_in_bedrocks_stream_arrives_as_an_error_event(aws: pytest.MonkeyPatch, folder: Path) -> None:
    body = aws_frame(EVENTS[0]) + aws_frame({"message": "slow down"}, "throttlingException")
    async with endpoint(body=body, content_type="application/vnd.amazon.eventstream") as (url, _):
        aws.setenv("ANTHROPIC_BEDROCK_BASE_URL", url)
        async with gateway(folder, "CLAUDE_CODE_USE_BEDROCK", []) as socket_path:
            _, answer = await ask(socket_path)
    events = [frame.data for frame in Decoder().feed(answer)]
    assert events[0] == EVENTS[0]
    assert (events[1]["type"], events[1]["error"]["message"]) == ("error", "slow down")


async def test_bedrock_without_a_region_says_what_to_set(aws: pytest.MonkeyPatch, folder: Path) -> None:
    aws.delenv("AWS_REGION")
    async with gateway(folder, "CLAUDE_CODE_USE_BEDROCK", []) as socket_path:
        status, answer = await ask(socket_path)
    message = json.loads(answer)["error"]["message"]
    assert status == 401
    assert "No AWS region" in message
    assert "Set AWS_REGION" in message


async def test_bedrock_without_credentials_says_what_to_set(aws: pytest.MonkeyPatch, folder: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        aws.delenv(name)
    aws.setenv("AWS_REGION", "sa-east-1")
    async with gateway(folder, "CLAUDE_CODE_USE_BEDROCK", []) as socket_path:
        status, answer = await ask(socket_path)
    assert status == 401
    assert "credentials" in json.loads(answer)["error"]["message"]


async def test_bedrock_cannot_count_tokens_and_says_so(aws: pytest.MonkeyPatch, folder: Path) -> None:
    async with gateway(folder, "CLAUDE_CODE_USE_BEDROCK", []) as socket_path:
        status, answer = await ask(socket_path, {"model": "m", "messages": []}, "/v1/messages/count_tokens")
    assert (status, json.loads(answer)["error"]["message"]) == (404, "Amazon Bedrock cannot count tokens.")


async def test_a_bedrock_that_is_not_there_is_named(aws: pytest.MonkeyPatch, folder: Path) -> None:
    aws.setenv("ANTHROPIC_BEDROCK_BASE_URL", "http://127.0.0.1:9")
    async with gateway(folder, "CLAUDE_CODE_USE_BEDROCK", []) as socket_path:
        status, answer = await ask(socket_path)
    assert status == 502
    assert "Amazon Bedrock could not be reached" in json.loads(answer)["error"]["message"]


# Vertex


async def test_vertex_streams_with_a_token_from_the_service_account(google: pytest.MonkeyPatch, folder: Path) -> None:
    usage: list[dict[str, Any]] = []
    body = b"".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in EVENTS)
    async with endpoint(body=body, content_type="text/event-stream") as (url, seen):
        google.setenv("ANTHROPIC_VERTEX_BASE_URL", f"{url}/v1")
        google.setenv("GOOGLE_APPLICATION_CREDENTIALS", service_account(url, folder))
        async with gateway(folder, "CLAUDE_CODE_USE_VERTEX", usage) as socket_path:
            status, answer = await ask(socket_path, anthropic_beta="b1")
    assert status == 200
    assert [frame.data for frame in Decoder().feed(answer)] == EVENTS
    assert usage == [{"model": "claude-x", "input_tokens": 3, "output_tokens": 4}]
    path = "/v1/projects/project-1/locations/europe-west1/publishers/anthropic/models/claude-sonnet-4-5@20250929:streamRawPredict"
    assert seen.path.replace("%40", "@") == path
    assert seen.headers["Authorization"] == "Bearer google-token"
    assert seen.headers["anthropic-beta"] == "b1"
    assert seen.body["anthropic_version"] == "vertex-2023-10-16"


async def test_vertex_counts_tokens(google: pytest.MonkeyPatch, folder: Path) -> None:
    async with endpoint(body=b'{"input_tokens": 5}') as (url, seen):
        google.setenv("ANTHROPIC_VERTEX_BASE_URL", f"{url}/v1")
        google.setenv("GOOGLE_APPLICATION_CREDENTIALS", service_account(url, folder))
        async with gateway(folder, "CLAUDE_CODE_USE_VERTEX", []) as socket_path:
            answer = await ask(socket_path, {"model": "claude-opus-5-5", "messages": []}, "/v1/messages/count_tokens")
    assert answer == (200, b'{"input_tokens": 5}')
    assert seen.path.endswith("/models/count-tokens:rawPredict")
    assert seen.body["model"] == "claude-opus-5-5"


async def test_vertex_without_credentials_says_what_to_set(google: pytest.MonkeyPatch, folder: Path) -> None:
    google.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(folder / "missing.json"))
    async with gateway(folder, "CLAUDE_CODE_USE_VERTEX", []) as socket_path:
        status, answer = await ask(socket_path)
    message = json.loads(answer)["error"]["message"]
    assert status == 401
    assert message.startswith("Vertex AI cannot be used: ")
    assert "GOOGLE_APPLICATION_CREDENTIALS" in message


async def test_vertex_without_a_region_says_what_to_set(google: pytest.MonkeyPatch, folder: Path) -> None:
    google.delenv("CLOUD_ML_REGION")
    async with gateway(folder, "CLAUDE_CODE_USE_VERTEX", []) as socket_path:
        status, answer = await ask(socket_path)
    assert status == 401
    assert "Set CLOUD_ML_REGION" in json.loads(answer)["error"]["message"]


# Names


@pytest.mark.parametrize(
    ("name", "bedrock", "vertex"),
    [
        ("claude-sonnet-5-5", "global.anthropic.claude-sonnet-5-5", "claude-sonnet-5-5"),
        ("claude-opus-4-6", "global.anthropic.claude-opus-4-6-v1", "claude-opus-4-6"),
        ("claude-haiku-4-5", "global.anthropic.claude-haiku-4-5-20251001-v1:0", "claude-haiku-4-5@20251001"),
        ("claude-opus-4-5-20251101", "global.anthropic.claude-opus-4-5-20251101-v1:0", "claude-opus-4-5@20251101"),
        ("us.anthropic.claude-opus-5-5", "us.anthropic.claude-opus-5-5", "us.anthropic.claude-opus-5-5"),
    ],
)
def test_models_get_the_platforms_names(name: str, bedrock: str, vertex: str) -> None:
    assert (bedrock_model(name), vertex_model(name)) == (bedrock, vertex)
