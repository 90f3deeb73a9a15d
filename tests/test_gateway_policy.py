"""The gateway against a hostile sandbox: keys, headers and paths of its own, models and features that the policy does not allow."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from ash.errors import Forbidden
from ash.policy import Policy
from ash.providers.intake import LARGE_BYTES
from ash.providers.reach import find_features, find_models
from tests.test_gateway import ASK, KEY, WHOLE, Answer, Rig, Upstream, connected, rigged, stream

BLOCK = {"type": "text", "text": "hi"}
Request = dict[str, Any]


def saying(*blocks: Request) -> Request:
    return {**ASK, "messages": [{"role": "user", "content": [BLOCK, *blocks]}]}


def image(source: Request) -> Request:
    return {"type": "image", "source": source}


@asynccontextmanager
async def governed(policy: Policy) -> AsyncIterator[tuple[Rig, Upstream]]:
    async with connected(stream(WHOLE)) as (rig, upstream):
        rig.gateway._policy = lambda: policy
        yield rig, upstream


def assert_refused(answer: Answer, upstream: Upstream, *words: str) -> None:
    assert (answer.status, answer.error["type"]) == (403, "permission_error")
    assert all(word in answer.error["message"] for word in words), answer.error
    assert answer.headers["x-should-retry"] == "false"
    assert upstream.requests == [], "the provider was not asked"


# Keys and headers


@pytest.mark.parametrize(("name", "value"), [
    ("x-api-key", "sk-ant-of-the-agent"), ("X-Api-Key", "sk-ant-of-the-agent"), ("authorization", "Bearer of-the-agent"),
    ("anthropic-organization", "org-of-the-agent"), ("anthropic-organization-id", "org-of-the-agent"), ("cookie", "session=of-the-agent"),
    ("x-forwarded-for", "of-the-agent"), ("x-forwarded-host", "of-the-agent"), ("x-forwarded-proto", "of-the-agent"),
    ("forwarded", "for=of-the-agent"), ("x-http-method-override", "of-the-agent"), ("x-original-url", "/of-the-agent"),
    ("x-rewrite-url", "/of-the-agent"), ("anthropic-dangerous-direct-browser-access", "of-the-agent"), ("user-agent", "of-the-agent"),
    ("anthropic-user-profile-id", "of-the-agent"), ("anthropic-workspace-id", "of-the-agent"), ("proxy-authorization", "of-the-agent"),
    ("content-type", "text/plain; of-the-agent"), ("accept-encoding", "of-the-agent"), ("traceparent", "of-the-agent"),
    ("idempotency-key", "of-the-agent"), ("referer", "http://of-the-agent"), ("origin", "http://of-the-agent"),
    ("x-stainless-lang", "of-the-agent"),
])  # fmt: skip
async def test_no_header_of_a_sandbox_reaches_the_provider(name: str, value: str) -> None:
    async with connected(stream(WHOLE)) as (rig, upstream):
        answer = await rig.ask(**{name.replace("-", "_"): value})
    assert answer.status == 200
    ((_, headers, _),) = upstream.requests
    assert "of-the-agent" not in json.dumps(headers)
    assert headers["x-api-key"] == KEY
    assert headers["content-type"] == "application/json"
    assert headers.keys() <= {
        "host", "accept", "accept-encoding", "user-agent", "x-api-key", "anthropic-version", "content-type", "content-length"
    }  # fmt: skip


async def test_the_host_a_sandbox_names_does_not_matter() -> None:
    async with connected(stream(WHOLE)) as (rig, upstream):
        assert (await rig.ask(host="of-the-agent.example.com")).status == 200
    assert upstream.requests[0][1]["host"] == upstream.url.removeprefix("http://")


async def test_beta_values_are_passed_on_as_the_one_choice_of_a_caller() -> None:
    async with connected(stream(WHOLE)) as (rig, upstream):
        assert (await rig.ask(anthropic_beta="context-1m-2025-08-07,mcp-client-2025-11-20")).status == 200
    assert upstream.requests[0][1]["anthropic-beta"] == "context-1m-2025-08-07,mcp-client-2025-11-20", "alone it leads nowhere"


# Paths


async def raw(rig: Rig, head: str, body: bytes = json.dumps(ASK).encode()) -> bytes:
    """The answer to a request whose head is sent exactly so."""
    reader, writer = await asyncio.open_unix_connection(rig.path())
    try:
        writer.write(f"{head}\r\nHost: gateway\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        async with asyncio.timeout(5):
            return await reader.read()
    finally:
        writer.close()


@pytest.mark.parametrize("line", [
    "POST /v1/messages/../files", "POST /v1/messages/..%2ffiles", "POST /v1/messages/%2e%2e/files", "POST //v1/messages",
    "POST /v1//messages", "POST /v1/messages/", "POST /v1/messages%2fbatches", "POST /v1/messages/batches", "POST /v1%2fmessages/x",
    "POST /v1/messages;x=/../files", "POST /V1/MESSAGES", "POST /v1/messages%00", "POST /v1/messages%0d%0aHost:%20x",
    "POST /v1/./messages/x", "POST /v1/complete", "POST /v1/files", "POST /v1/skills", "POST /v1/organizations/me", "POST /v1/models",
    "GET /v1/messages", "PUT /v1/messages", "DELETE /v1/messages", "PATCH /v1/messages", "OPTIONS /v1/messages", "TRACE /v1/messages",
    "POST *", "CONNECT api.example.com:443", "POST http://api.example.com/v1/files", "GET http://169.254.169.254/latest/meta-data",
])  # fmt: skip
async def test_no_other_path_and_no_other_method_reaches_the_provider(line: str) -> None:
    async with connected(stream(WHOLE)) as (rig, upstream):
        answer = await raw(rig, f"{line} HTTP/1.1")
        assert upstream.requests == []
    assert answer.split(b" ")[1:2] in ([b"404"], [b"400"], [b"405"]), answer[:80]


@pytest.mark.parametrize("line", [
    "POST http://other.example.com/v1/messages", "POST http://user:pass@other.example.com:99/v1/messages",
    "POST /v1/messages?url=http://other.example.com", "POST /v1/%6dessages", "POST /v1/./messages", "POST /x/../v1/messages",
])  # fmt: skip
async def test_however_the_one_path_is_written_the_provider_is_asked_at_its_own_address(line: str) -> None:
    async with connected(stream(WHOLE)) as (rig, upstream):
        answer = await raw(rig, f"{line} HTTP/1.1")
        asked = [(path, headers["host"]) for path, headers, _ in upstream.requests]
        is_passed = answer.startswith(b"HTTP/1.1 200")
    assert asked == ([("/v1/messages", upstream.url.removeprefix("http://"))] if is_passed else [])


async def test_a_second_request_cannot_be_smuggled_behind_the_first() -> None:
    smuggled = b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    body = json.dumps(ASK).encode()
    async with connected(stream(WHOLE)) as (rig, upstream):
        both = f"POST /v1/messages HTTP/1.1\r\nTransfer-Encoding: chunked\r\nX: {len(body)}"
        _ = await raw(rig, both, body + smuggled)
        _ = await raw(rig, "POST /v1/messages HTTP/1.1\r\nContent-Length: 5", body + smuggled)
        assert [path for path, _, _ in upstream.requests] in ([], ["/v1/messages"])


# Models


async def test_a_model_that_is_not_allowed_is_refused_with_its_name_and_the_key_of_the_policy() -> None:
    async with governed(Policy(models=("claude-sonnet-*", "claude-x"))) as (rig, upstream):
        assert_refused(await rig.ask({**ASK, "model": "claude-opus-5-5"}), upstream, "'claude-opus-5-5'", "`allow` under [models]")
        assert_refused(await rig.ask({"model": "claude-opus-5-5", "messages": []}, "/v1/messages/count_tokens"), upstream)
        assert (await rig.ask()).status == 200


@pytest.mark.parametrize("model", ["opus", "claude-opus-5-5"])
async def test_a_short_name_is_written_out_before_it_is_checked(model: str) -> None:
    async with governed(Policy(models=("opus", "claude-sonnet-*"))) as (rig, upstream):
        assert_refused(await rig.ask({**ASK, "model": model}), upstream, "'claude-opus-5-5'")
        assert (await rig.ask({**ASK, "model": "sonnet"})).status == 200
        assert (await rig.ask({**ASK, "model": "default"})).status == 200, "which is claude-sonnet-5-5"


async def test_the_offline_model_has_to_be_on_the_list_too() -> None:
    async with governed(Policy(models=("claude-*",))) as (rig, upstream):
        assert_refused(await rig.ask({**ASK, "model": "offline"}), upstream, "'offline'")
    async with governed(Policy(models=("offline",))) as (rig, upstream):
        assert (await rig.ask({**ASK, "model": "offline"})).status == 200
        assert upstream.requests == []


@pytest.mark.parametrize("more", [
    {"fallbacks": [{"model": "claude-opus-5-5"}]},
    {"fallbacks": "default"},
    {"tools": [{"type": "advisor_20260301", "name": "advisor", "model": "claude-opus-5-5"}]},
    saying({"type": "tool_addition", "tool": {"type": "advisor_20260301", "model": "claude-opus-5-5"}}),
])  # fmt: skip
async def test_a_model_that_another_field_names_is_checked_too(more: Request) -> None:
    everything = Policy(models=("claude-x",), provider_features=("*",))
    async with governed(everything) as (rig, upstream):
        assert_refused(await rig.ask({**ASK, **more}), upstream, "is not allowed here")
    async with governed(everything._replace(models=("*",))) as (rig, _):
        assert (await rig.ask({**ASK, **more})).status == 200


@pytest.mark.parametrize("body", [
    b'{"model": "claude-opus-5-5", "max_tokens": 5, "messages": [], "model": "claude-x"}',
    b'{"model": "claude-x", "max_tokens": 5, "messages": [], "mod\\u0065l": "claude-x"}',
    b'{"model": "claude-x", "messages": [], "tools": [{"type": "web_fetch_20250910", "name": "a", "type": "custom"}]}',
])  # fmt: skip
@pytest.mark.parametrize("padding", [0, LARGE_BYTES])
async def test_a_key_that_is_there_twice_cannot_show_two_faces(body: bytes, padding: int) -> None:
    async with governed(Policy(models=("claude-x",))) as (rig, upstream):
        answer = await rig.ask(body + b" " * padding)
        assert upstream.requests == []
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")


async def test_the_policy_in_force_is_the_one_of_the_moment() -> None:
    policies = [Policy(models=("nothing",)), Policy()]
    async with connected(stream(WHOLE)) as (rig, _):
        rig.gateway._policy = lambda: policies[0]
        assert (await rig.ask()).status == 403
        policies.pop(0)
        assert (await rig.ask()).status == 200


async def test_sessions_ask_beforehand() -> None:
    async with rigged({}) as rig:
        rig.gateway._policy = lambda: Policy(models=("claude-*",))
        rig.gateway.require_allowed("opus")
        with pytest.raises(Forbidden, match="'offline' is not allowed here"):
            rig.gateway.require_allowed(None)  # without a provider the default is the offline one
        with pytest.raises(Forbidden, match="'url_source'"):
            rig.gateway.require_allowed_content([image({"type": "url", "url": "http://x"})])
        rig.gateway.require_allowed_content([image({"type": "base64", "data": ""})])
        rig.gateway.require_allowed_content("text")


# What the provider would do beyond answering

FEATURES = [
    ({"mcp_servers": [{"type": "url", "url": "https://of-the-agent.example.com"}]}, "mcp_servers"),
    ({"container": "container_of_another_session"}, "container"),
    ({"container": {"skills": []}}, "container"),
    ({"thread": {"type": "continue", "previous_message_id": "msg_1"}}, "thread"),
    ({"inference_geo": "us"}, "inference_geo"),
    ({"workspace_id": "w"}, "workspace_id"),
    ({"anthropic_beta": ["web-fetch-2025-09-10"]}, "anthropic_beta"),
    ({"something_new": None}, "something_new"),
    ({"tools": [{"type": "web_fetch_20250910", "name": "web_fetch"}]}, "web_fetch_20250910"),
    ({"tools": [{"name": "a", "input_schema": {}}, {"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
    ({"tools": [{"type": "code_execution_20250825", "name": "code_execution"}]}, "code_execution_20250825"),
    ({"tools": [{"type": "mcp_toolset", "mcp_server_name": "x"}]}, "mcp_toolset"),
    ({"tools": {"type": "web_fetch_20250910"}}, "web_fetch_20250910"),
    (saying(image({"type": "url", "url": "https://of-the-agent.example.com/?secret"})), "url_source"),
    (saying({"type": "document", "source": {"type": "url", "url": "https://x"}}), "url_source"),
    (saying({"type": "document", "source": {"type": "file", "file_id": "file_1"}}), "file_source"),
    (saying({"type": "document", "source": {"type": "content", "content": [image({"type": "url"})]}}), "url_source"),
    (saying({"type": "tool_result", "tool_use_id": "t", "content": [image({"type": "url"})]}), "url_source"),
    (saying({"type": "tool_result", "content": [{"type": "tool_result", "content": [image({"type": "url"})]}]}), "url_source"),
    (saying({"type": "web_fetch_tool_result", "content": {"type": "web_fetch_result", "content": image({"type": "url"})}}), "url_source"),
    (saying({"type": "container_upload", "file_id": "file_1"}), "container_upload"),
    (saying({"type": "tool_addition", "tool": {"type": "web_fetch_20250910"}}), "tool_addition"),
    ({"system": [image({"type": "url"})]}, "url_source"),
    ({"messages": {"role": "user", "content": image({"type": "url"})}}, "url_source"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "feature"), FEATURES)
@pytest.mark.parametrize("padding", ["", "x" * LARGE_BYTES], ids=["small", "large"])
async def test_a_way_out_through_the_provider_is_refused_unless_the_policy_names_it(more: Request, feature: str, padding: str) -> None:
    request = {**ASK, "stop_sequences": [padding], **more}
    async with governed(Policy()) as (rig, upstream):
        assert_refused(await rig.ask(request), upstream, f"'{feature}'", "`provider_features` under [models]")
        assert_refused(await rig.ask(request, "/v1/messages/count_tokens"), upstream)
    async with governed(Policy(provider_features=("web_*", "code_execution_*", feature))) as (rig, upstream):
        assert (await rig.ask(request)).status == 200, "so it is the policy that refused it"
        assert json.loads(upstream.requests[0][2]) == request


async def test_a_tool_added_in_the_conversation_is_checked_as_any_other() -> None:
    async with governed(Policy(provider_features=("tool_addition",))) as (rig, upstream):
        added = saying({"type": "tool_addition", "tool": {"type": "web_fetch_20250910"}})
        assert_refused(await rig.ask(added), upstream, "'web_fetch_20250910'")


def test_what_an_agent_needs_passes_without_a_word_of_the_operator() -> None:
    tool_input = {"source": {"type": "url"}, "content": [{"type": "web"}]}
    request = {
        **ASK, "system": [BLOCK], "metadata": {"user_id": "u"}, "thinking": {"type": "adaptive"}, "output_config": {"effort": "low"},
        "tools": [{"name": "Bash", "input_schema": {}}, {"type": "custom", "name": "x"}, {"type": "bash_20250124"}, {"type": None}],
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": [{"type": "thinking"}, {"type": "tool_use", "id": "t", "name": "Bash", "input": tool_input}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [BLOCK, image({"type": "base64"})]}]},
            {"role": "user", "content": [{"type": "document", "source": {"type": "text"}}, {"type": "search_result", "content": [BLOCK]}]},
        ],
    }  # fmt: skip
    assert find_features(request) == []
    assert find_models(request) == ["claude-x"]


@pytest.mark.parametrize("odd", [
    {"messages": 5}, {"messages": [5, None, "x", []]}, {"messages": [{"content": 5}]}, {"messages": [{"role": "user", "content": [[[5]]]}]},
    {"tools": "x"}, {"tools": [5]}, {"system": 5}, {"fallbacks": 7},
    {"messages": [{"role": [], "content": [{"type": ["url"], "source": 5}]}]},
])  # fmt: skip
def test_requests_of_any_shape_can_be_looked_at(odd: Request) -> None:
    assert find_models({**ASK, **odd})[0] == "claude-x"
    _ = find_features({**ASK, **odd})


def test_depth_is_no_way_around() -> None:
    block: Request = image({"type": "url"})
    for _ in range(50_000):
        block = {"type": "tool_result", "content": [block]}
    assert find_features(saying(block)) == ["url_source"]
