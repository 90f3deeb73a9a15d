"""The real `anthropic` client, unmodified, against the offline model in a process of its own, over loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

anthropic = pytest.importorskip("anthropic", reason="the anthropic package is not installed: pip install anthropic")

ROOT = Path(__file__).resolve().parents[2]
TOOL: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather in a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
BASH: dict[str, Any] = {"name": "Bash", "input_schema": {"type": "object", "properties": {"command": {"type": "string"}}}}


ASK: dict[str, Any] = {"model": "offline", "max_tokens": 100, "messages": [{"role": "user", "content": "a"}]}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


@contextmanager
def offline_model(script: Path | None = None) -> Iterator[str]:
    code = "import sys; from ash.offline import run; run('127.0.0.1', 0, sys.argv[1] if len(sys.argv) > 1 else None)"
    command = [sys.executable, "-W", "error", "-c", code, *([str(script)] if script else [])]
    environ = {"PYTHONPATH": str(ROOT), "PATH": os.environ.get("PATH", "")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip().removeprefix("Offline model listening on ")
        finally:
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (0, "")


@contextmanager
def connected(script: Path | None = None, **options: Any) -> Iterator[Any]:
    with offline_model(script) as url, anthropic.Anthropic(api_key="any", base_url=url, **options) as client:
        yield client


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with connected(max_retries=0) as client:
        yield client


@pytest.fixture
def scripted(tmp_path: Path) -> Any:
    def write(*replies: dict[str, Any]) -> Path:
        (tmp_path / "script.json").write_text(json.dumps({"replies": list(replies)}))
        return tmp_path / "script.json"

    return write


def test_text_streams_in_pieces_and_adds_up(client: Any) -> None:
    with client.messages.stream(model="offline", max_tokens=1000, messages=[user("What is a closure?")]) as stream:
        pieces = list(stream.text_stream)
        message = stream.get_final_message()
    assert len(pieces) > 10
    assert message.content[0].text == "".join(pieces)
    assert message.content[0].text.startswith("A closure is a function")
    assert (message.model, message.stop_reason) == ("offline", "end_turn")
    assert message.usage.output_tokens > 50


def test_a_tool_is_called_in_a_stream_and_its_result_used(client: Any) -> None:
    messages = [user("What is the weather in Paris?")]
    with client.messages.stream(model="offline", max_tokens=500, tools=[TOOL], messages=messages) as stream:
        kinds = [event.type for event in stream]
        first = stream.get_final_message()
    call = first.content[-1]
    assert "input_json" in kinds
    assert (first.stop_reason, call.name, call.input) == ("tool_use", "get_weather", {"city": "Paris"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "21 degrees"}
    messages += [first.to_param(), {"role": "user", "content": [result]}]
    second = client.messages.create(model="offline", max_tokens=500, tools=[TOOL], messages=messages)
    assert "21 degrees" in second.content[0].text
    assert second.stop_reason == "end_turn"


def test_parallel_calls_arrive_in_one_message(client: Any) -> None:
    message = client.messages.create(model="offline", max_tokens=500, tools=[BASH], messages=[user("run `ls` and `pwd` in parallel")])
    assert [block.input["command"] for block in message.content if block.type == "tool_use"] == ["ls", "pwd"]


def test_thinking_streams_with_a_signature(client: Any) -> None:
    thinking = {"type": "adaptive"}
    with client.messages.stream(model="offline", max_tokens=2000, thinking=thinking, messages=[user("hello")]) as stream:
        message = stream.get_final_message()
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].thinking.startswith("The user asks")
    assert message.content[0].signature


def test_cache_breakpoints_show_in_the_usage(client: Any) -> None:
    system = [{"type": "text", "text": "You are brief. " * 40, "cache_control": {"type": "ephemeral"}}]
    first = client.messages.create(model="offline", max_tokens=500, system=system, messages=[user("hello")])
    assert first.usage.cache_creation_input_tokens > 100
    more = [user("hello"), first.to_param(), user("thanks")]
    assert client.messages.create(model="offline", max_tokens=500, system=system, messages=more).usage.cache_read_input_tokens > 100


def test_tokens_are_counted_and_models_listed(client: Any) -> None:
    short = client.messages.count_tokens(model="offline", messages=[user("hello")]).input_tokens
    assert 0 < short < client.messages.count_tokens(model="offline", messages=[user("hello " * 50)]).input_tokens
    assert [model.id for model in client.models.list()] == ["offline"]


def test_structured_output_fits_its_schema(client: Any) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
    config = {"format": {"type": "json_schema", "schema": schema}}
    message = client.messages.create(model="offline", max_tokens=100, output_config=config, messages=[user("give me 7")])
    assert json.loads(message.content[0].text) == {"n": 7}


def test_a_bad_request_raises_the_clients_own_error(client: Any) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(model="offline", max_tokens=10, messages=[])
    assert caught.value.type == "invalid_request_error"
    assert caught.value.api_message == "messages: at least one message is required"


def test_the_beta_endpoint_is_the_same(client: Any) -> None:
    message = client.beta.messages.create(model="offline", max_tokens=500, messages=[user("hello")], betas=["x-2026-01-01"])
    assert message.content[0].text.startswith("Hello!")


@pytest.mark.parametrize(
    ("status", "error"), [(401, "AuthenticationError"), (404, "NotFoundError"), (429, "RateLimitError"), (529, "OverloadedError")]
)
def test_scripted_errors_raise_the_clients_own_errors(scripted: Any, status: int, error: str) -> None:
    script = scripted({"error": {"status": status, "message": "as scripted"}})
    with connected(script, max_retries=0) as client, pytest.raises(getattr(anthropic, error), match="as scripted"):
        client.messages.create(model="offline", max_tokens=10, messages=[user("a")])


def test_the_client_retries_over_errors_that_pass(scripted: Any) -> None:
    script = scripted({"text": "fine", "error": {"status": 529, "times": 2, "headers": {"retry-after-ms": "1"}}})
    with connected(script, max_retries=2) as client:
        assert client.messages.create(model="offline", max_tokens=10, messages=[user("a")]).content[0].text == "fine"


def test_a_cut_stream_is_an_error_and_not_a_short_answer(scripted: Any) -> None:
    import httpx2

    script = scripted({"text": "a long answer that breaks off", "cut": 4})
    broken = pytest.raises((httpx2.RemoteProtocolError, anthropic.APIConnectionError))
    with connected(script, max_retries=0) as client, client.messages.stream(**ASK) as stream, broken:
        stream.until_done()


def test_an_error_inside_the_stream_raises(scripted: Any) -> None:
    script = scripted({"text": "words", "error": {"status": 529, "message": "mid-stream", "after": 3}})
    refused = pytest.raises(anthropic.APIStatusError, match="mid-stream")
    with connected(script, max_retries=0) as client, client.messages.stream(**ASK) as stream, refused:
        stream.until_done()


def test_a_bad_script_stops_the_start_with_the_reason(scripted: Any) -> None:
    from ash.errors import ConfigError
    from ash.offline import run

    with pytest.raises(ConfigError, match=r"replies\[0\]\.txt: there is no such field"):
        run("127.0.0.1", 0, str(scripted({"txt": "x"})))
