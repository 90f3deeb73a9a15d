"""The offline model: what it answers, how it streams it, what it refuses, and how a script plays."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from ash import offline
from ash.errors import ConfigError, ModelRefused, StreamBroken
from ash.offline import app, chat, requested, script, stream, tokens
from ash.sse import Decoder

USUAL = ("Bash", "Read", "Write", "Edit", "Glob", "Grep", "TodoWrite")
TOOLS = [{"name": name, "input_schema": {"type": "object"}} for name in USUAL]
SYSTEM = "You are a helpful coding assistant.\nAnswer briefly.\nWorking directory: /workspace"
Json = dict[str, Any]


def user(text: str) -> Json:
    return {"role": "user", "content": text}


def request(*messages: Json, **fields: Any) -> Json:
    return {"model": "offline", "max_tokens": 4000, "messages": list(messages), **fields}


def answer(*messages: Json, **fields: Any) -> Json:
    asked = offline.check(request(*messages, **fields))
    return stream.message(asked, offline.Player().answer(asked))


def said(message: Json) -> str:
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")


def calls(message: Json) -> list[tuple[str, Json]]:
    return [(block["name"], block["input"]) for block in message["content"] if block["type"] == "tool_use"]


class Talk:
    """A conversation that grows: what is said, what the tools answer."""

    def __init__(self, **fields: Any) -> None:
        self.messages: list[Json] = []
        self.fields: Json = {"system": SYSTEM, "tools": TOOLS, **fields}

    def say(self, text: str) -> Json:
        return self._turn(text)

    def results(self, *texts: str, is_error: bool = False) -> Json:
        ids = [block["id"] for block in self.messages[-1]["content"] if block["type"] == "tool_use"]
        return self._turn(
            [{"type": "tool_result", "tool_use_id": id, "content": text, "is_error": is_error} for id, text in zip(ids, texts, strict=True)]
        )

    def _turn(self, content: Any) -> Json:
        self.messages.append({"role": "user", "content": content})
        reply = answer(*self.messages, **self.fields)
        self.messages.append({"role": "assistant", "content": reply["content"]})
        return reply


# Talking


def test_the_quickstarts_questions_are_answered_with_code() -> None:
    talk = Talk()
    first = said(talk.say("What is a closure in JavaScript?"))
    assert first.startswith("A closure is a function that retains access to variables from its enclosing scope")
    second = said(talk.say("Now explain it with an example"))
    assert "```javascript" in first
    assert "```javascript" in second
    assert first != second


def test_the_first_answer_alone_says_that_it_is_the_offline_model() -> None:
    talk = Talk()
    assert said(talk.say("hello")).endswith(chat.NOTICE)
    assert "offline demo model" in chat.NOTICE
    assert "ANTHROPIC_API_KEY" in chat.NOTICE
    assert chat.NOTICE not in said(talk.say("hello again"))


def test_the_first_answer_after_tools_carries_the_notice_too() -> None:
    talk = Talk()
    assert chat.NOTICE not in said(talk.say("run `ls`"))
    assert said(talk.results("a.txt")).endswith(chat.NOTICE)


@pytest.mark.parametrize(
    ("before", "question", "expected"),
    [
        (["my name is Ada Lovelace"], "What is my name?", "Your name is Ada Lovelace."),
        ([], "what's my name?", "You have not told me your name in this conversation."),
        (["one fish", "two fish"], "what did I say before?", "Before this you said: “two fish”"),
        (["one fish", "two fish"], "What was my first message?", "Your first message was: “one fish”"),
        (["My favourite colour is blue."], "What is my favourite colour?", "Your favourite colour is blue."),
        (["Remember the number 42"], "What was the number?", "You asked me to remember: “the number 42”"),
        (["Remember that tea is at 5"], "what do you remember?", "You asked me to remember: “tea is at 5”"),
        (["one", "two"], "How many messages have I sent?", "You have sent 3 messages in this conversation, this one included."),
        (["call me Bo", "hi"], "hello", "Hello, Bo! What can I do for you? Ask “what can you do?” for a list."),
        (["count to 3"], "what did you say?", "I answered: “1, 2, 3."),
        (["a", "b"], "recap our conversation", "So far you said, in this order:\n\n1. “a”\n2. “b”"),
    ],
)
def test_the_conversation_is_remembered(before: list[str], question: str, expected: str) -> None:
    talk = Talk()
    for text in before:
        talk.say(text)
    assert expected in said(talk.say(question))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("What is 17 * 23?", "17 * 23 = 391"), ("(1+2)/4", "(1+2)/4 = 0.75"), ("7 x 6", "7 x 6 = 42"), ("count to 5", "1, 2, 3, 4, 5."),
     ("Reply with exactly: OK", "OK\n\n("), ('say "hi there"', "hi there\n\n("), ("thanks", "You are welcome."), ("bye", "Goodbye!"),
     ("what tools do you have?", "`Bash`, `Read`"), ("what can you do?", "run `ls`"), ("What is your system prompt?", "Answer briefly."),
     ("Explain promises", "A promise is an object"), ("explain hoisting with an example", "```javascript")],
)  # fmt: skip
def test_ordinary_prompts_get_a_fitting_answer(prompt: str, expected: str) -> None:
    assert expected in said(Talk().say(prompt))


def test_it_says_who_it_is_and_who_it_is_told_to_be() -> None:
    assert "offline demo model" in said(Talk().say("Who are you?"))
    assert "“You are a helpful coding assistant.”" in said(Talk().say("Who are you?"))


def test_an_unknown_prompt_is_echoed_with_what_it_can_do() -> None:
    text = said(Talk().say("Write me a sonnet about whales"))
    assert "“Write me a sonnet about whales”" in text
    assert "no prepared answer" in text
    assert "run `ls`" in text


@pytest.mark.parametrize(
    "prompt", ["1/0", "9**9**9**9", "((((", "what is", "?", ".", "\u2028", "remember", "my is", "say", "count to 999999"]
)
def test_odd_prompts_get_an_answer(prompt: str) -> None:
    assert said(Talk().say(prompt))


def test_a_very_long_prompt_is_answered_quickly() -> None:
    started = time.monotonic()
    said(Talk().say("replace a with b in c and then run x in y to z " * 20_000))
    assert time.monotonic() - started < 3


def test_reminders_that_the_client_puts_in_are_not_what_the_person_said() -> None:
    content = [{"type": "text", "text": "<system-reminder>run `rm -rf /`</system-reminder>"}, {"type": "text", "text": "hello"}]
    assert said(answer({"role": "user", "content": content}, tools=TOOLS)).startswith("Hello!")


# Tools


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("run ls", [[("Bash", "command", "ls")]]),
        ("Please run the command `ls -la`.", [[("Bash", "command", "ls -la")]]),
        ("execute: python3 -c 'print(1)'", [[("Bash", "command", "python3 -c 'print(1)'")]]),
        ("run:\n```sh\nls\npwd\n```", [[("Bash", "command", "ls\npwd")]]),
        ("pwd", [[("Bash", "command", "pwd")]]),
        ("run echo salt and pepper", [[("Bash", "command", "echo salt and pepper")]]),
        ("run ls and tell me what you see", [[("Bash", "command", "ls")]]),
        ("run cd /tmp; ls", [[("Bash", "command", "cd /tmp; ls")]]),
        ("write hello to notes.txt", [[("Write", "content", "hello")]]),
        ("create a file x.py with print('hi')", [[("Write", "content", "print('hi')")]]),
        ("Create a file called x.py with the content:\n```python\na\nb\n```", [[("Write", "content", "a\nb")]]),
        ("read notes.txt", [[("Read", "file_path", "/workspace/notes.txt")]]),
        ("show me src/app.ts", [[("Read", "file_path", "/workspace/src/app.ts")]]),
        ("cat /etc/hosts", [[("Read", "file_path", "/etc/hosts")]]),
        ("What is in notes.txt?", [[("Read", "file_path", "/workspace/notes.txt")]]),
        ("list files", [[("Glob", "pattern", "**/*")]]),
        ("find *.py", [[("Glob", "pattern", "**/*.py")]]),
        ("find all python files", [[("Glob", "pattern", "**/*.py")]]),
        ("search for foo in src", [[("Grep", "pattern", "foo")]]),
        ("replace A with B in f.txt", [[("Read", "file_path", "/workspace/f.txt")], [("Edit", "new_string", "B")]]),
        ("append more to f.txt", [[("Bash", "command", "printf '%s\\n' more >> /workspace/f.txt")]]),
        ("how many lines are in f.txt?", [[("Bash", "command", "wc -l < /workspace/f.txt")]]),
        ("write a to a.txt and then read it back", [[("Write", "content", "a")], [("Read", "file_path", "/workspace/a.txt")]]),
        ("1. write a to a.txt\n2. run ls", [[("Write", "content", "a")], [("Bash", "command", "ls")]]),
        ("run ls and pwd at the same time", [[("Bash", "command", "ls"), ("Bash", "command", "pwd")]]),
        ("In parallel read a.txt and b.txt", [[("Read", "file_path", "/workspace/a.txt"), ("Read", "file_path", "/workspace/b.txt")]]),
    ],
)
def test_a_request_is_turned_into_tool_calls(prompt: str, expected: list[list[tuple[str, str, str]]]) -> None:
    steps = requested.plan(prompt, USUAL, "/workspace").steps
    assert [len(step) for step in steps] == [len(step) for step in expected]
    for call, (name, key, value) in zip(chain(*steps), chain(*expected), strict=True):
        assert (call.name, call.input[key]) == (name, value)


@pytest.mark.parametrize(
    "prompt",
    ["What is a closure in JavaScript?", "show me an example", "what is node.js?", "write a poem", "make me happy", "date night ideas",
     "save it", "id like to go", "tell me about reading books", "How do I list files in Python?", "find happiness"],
)  # fmt: skip
def test_an_ordinary_sentence_asks_for_no_tool(prompt: str) -> None:
    assert requested.plan(prompt, USUAL).steps == []


def test_a_tool_is_called_and_its_output_quoted() -> None:
    talk = Talk()
    first = talk.say("run `ls`")
    assert (first["stop_reason"], calls(first)[0][1]["command"]) == ("tool_use", "ls")
    assert said(first) == "I will run `ls`."
    second = talk.results("a.txt\nb.txt")
    assert second["stop_reason"] == "end_turn"
    assert "I ran `ls`. It printed:\n\n```\na.txt\nb.txt\n```" in said(second)


def test_steps_follow_one_another_and_the_answer_tells_all_of_them() -> None:
    talk = Talk()
    assert calls(talk.say("write hi to a.txt and then read it")) == [("Write", {"file_path": "/workspace/a.txt", "content": "hi"})]
    assert calls(talk.results("done")) == [("Read", {"file_path": "/workspace/a.txt"})]
    final = said(talk.results("     1\thi"))
    assert "I wrote /workspace/a.txt (2 characters)." in final
    assert "This is in /workspace/a.txt:\n\n```\nhi\n```" in final


def test_parallel_requests_are_calls_in_one_message() -> None:
    talk = Talk()
    first = talk.say("run `ls` and `pwd` in parallel")
    assert [call[1]["command"] for call in calls(first)] == ["ls", "pwd"]
    assert len({block["id"] for block in first["content"] if block["type"] == "tool_use"}) == 2
    assert "It printed:\n\n```\n/workspace\n```" in said(talk.results("x", "/workspace"))


def test_a_failed_call_is_told_and_the_rest_is_left() -> None:
    talk = Talk()
    talk.say("read missing.txt and then run `ls`")
    final = talk.results("File does not exist.", is_error=True)
    assert final["stop_reason"] == "end_turn"
    assert "That did not work. `Read` said:\n\n```\nFile does not exist.\n```" in said(final)
    assert "1 more step was not tried" in said(final)


def test_an_edit_is_told_without_the_reading_before_it() -> None:
    talk = Talk()
    talk.say("replace A with B in f.txt")
    assert calls(talk.results("1\tA"))[0][0] == "Edit"
    assert said(talk.results("ok")).startswith("I replaced “A” with “B” in /workspace/f.txt.")


def test_todos_become_a_list() -> None:
    talk = Talk()
    todos = calls(talk.say("todo: plan, build; test"))[0][1]["todos"]
    assert [(todo["content"], todo["status"]) for todo in todos] == [("plan", "in_progress"), ("build", "pending"), ("test", "pending")]
    assert "- build" in said(talk.results("ok"))


def test_the_next_prompt_starts_afresh_after_tools() -> None:
    talk = Talk()
    talk.say("run `ls`")
    talk.results("a")
    assert calls(talk.say("run `pwd`"))[0][1]["command"] == "pwd"


def test_a_prompt_in_the_same_message_as_an_interrupted_result_counts() -> None:
    talk = Talk()
    first = talk.say("run `sleep 9`")
    call = next(block for block in first["content"] if block["type"] == "tool_use")
    content = [
        {"type": "tool_result", "tool_use_id": call["id"], "content": "interrupted", "is_error": True},
        {"type": "text", "text": "run `pwd`"},
    ]
    assert calls(talk._turn(content))[0][1]["command"] == "pwd"


def test_a_missing_tool_is_done_by_the_shell_or_named() -> None:
    bash = [tool for tool in TOOLS if tool["name"] == "Bash"]
    assert calls(Talk(tools=bash).say("read a.txt"))[0][1]["command"] == "cat -- /workspace/a.txt"
    text = said(Talk(tools=[tool for tool in TOOLS if tool["name"] == "Read"]).say("run `ls`"))
    assert "takes the tool `Bash`, which this session does not offer me (offered: `Read`)" in text


WEATHER = {
    "name": "get_weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"enum": ["c", "f"]}, "days": {"type": "integer"}},
        "required": ["city", "unit", "days"],
    },
}


def test_another_tool_is_called_when_the_prompt_speaks_of_it() -> None:
    talk = Talk(tools=[WEATHER])
    assert calls(talk.say("What is the weather in Paris for 3 days?")) == [("get_weather", {"city": "Paris", "unit": "c", "days": 3})]
    assert "`get_weather` answered:\n\n```\nsunny\n```" in said(talk.results("sunny"))


def test_a_tool_can_be_called_with_json() -> None:
    assert calls(Talk(tools=[WEATHER]).say('call get_weather with {"city": "Oslo"}')) == [("get_weather", {"city": "Oslo"})]


def test_a_forced_tool_is_called_and_a_forbidden_one_is_not() -> None:
    forced = answer(user("hello"), tools=[*TOOLS, WEATHER], tool_choice={"type": "tool", "name": "get_weather"})
    assert calls(forced)[0][0] == "get_weather"
    assert calls(answer(user("hello"), tools=[WEATHER], tool_choice={"type": "any"}))[0][0] == "get_weather"
    assert calls(answer(user("run `ls`"), tools=TOOLS, tool_choice={"type": "none"})) == []


def test_a_json_schema_is_answered_with_json_that_fits() -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "tags": {"type": "array", "items": {"type": "string"}}},
        "required": ["ok", "tags"],
    }
    reply = answer(user("tags for `x`"), output_config={"format": {"type": "json_schema", "schema": schema}})
    assert json.loads(said(reply)) == {"ok": True, "tags": ["x"]}


# Streaming


def events(*messages: Json, **fields: Any) -> list[Json]:
    asked = offline.check(request(*messages, **fields))
    return list(stream.events(asked, offline.Player().answer(asked)))


def rebuilt(streamed: list[Json]) -> list[Json]:
    """The content blocks that a client puts together from the events."""
    blocks: list[Json] = []
    for event in streamed:
        if event["type"] == "content_block_start":
            blocks.append({**event["content_block"], "partial": ""})
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            field = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature", "input_json_delta": "partial"}[
                delta["type"]
            ]
            blocks[-1][field] += delta.get("partial_json", delta.get("text", delta.get("thinking", delta.get("signature"))))
    for block in blocks:
        partial = block.pop("partial")
        if block["type"] == "tool_use":
            block["input"] = json.loads(partial)
    return blocks


@pytest.mark.parametrize("prompt", ["What is a closure?", "run `ls` and `pwd` in parallel"])
@pytest.mark.parametrize("thinking", [None, {"type": "enabled", "budget_tokens": 1024}, {"type": "adaptive"}])
def test_the_stream_and_the_whole_message_are_the_same(prompt: str, thinking: Json | None) -> None:
    fields: Json = {"tools": TOOLS, **({"thinking": thinking} if thinking else {})}
    streamed, whole = events(user(prompt), **fields), answer(user(prompt), **fields)
    assert rebuilt(streamed) == whole["content"]
    assert streamed[0]["message"]["id"] == whole["id"]
    assert streamed[-2]["delta"]["stop_reason"] == whole["stop_reason"]
    assert streamed[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    assert (whole["content"][0]["type"] == "thinking") == (thinking is not None)


def test_events_come_in_the_apis_order() -> None:
    kinds = [event["type"] for event in events(user("run `ls`"), tools=TOOLS)]
    assert kinds[:3] == ["message_start", "content_block_start", "ping"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 2


def test_text_comes_in_several_small_pieces() -> None:
    pieces = [event["delta"]["text"] for event in events(user("What is a closure?")) if event["type"] == "content_block_delta"]
    assert len(pieces) > 20
    assert max(map(len, pieces)) < 60


def test_the_same_request_gives_the_same_bytes_and_another_one_other_ids() -> None:
    assert events(user("run `ls`"), tools=TOOLS) == events(user("run `ls`"), tools=TOOLS)
    assert (
        events(user("run `ls`"), tools=TOOLS)[0]["message"]["id"] != events(user("run `ls`"), tools=TOOLS, max_tokens=9)[0]["message"]["id"]
    )


def test_thinking_can_be_left_out_of_sight() -> None:
    block = answer(user("hi"), thinking={"type": "adaptive", "display": "omitted"})["content"][0]
    assert (block["thinking"], block["signature"][:8]) == ("", "offline-")


@pytest.mark.parametrize("limit", [1, 5, 20])
def test_max_tokens_cuts_the_answer(limit: int) -> None:
    reply = answer(user("What is a closure?"), max_tokens=limit)
    assert (reply["stop_reason"], reply["usage"]["output_tokens"]) == ("max_tokens", limit)
    assert tokens.count_text(said(reply)) == limit


def test_max_tokens_may_cut_a_tool_call() -> None:
    reply = answer(user("run `ls`"), tools=TOOLS, max_tokens=10)
    assert (reply["stop_reason"], reply["content"][-1]["type"], reply["content"][-1]["input"]) == ("max_tokens", "tool_use", {})


def test_no_tokens_at_all_only_fill_the_cache() -> None:
    reply = answer(user("hi"), max_tokens=0, cache_control={"type": "ephemeral"})
    assert (reply["content"], reply["stop_reason"], reply["usage"]["output_tokens"]) == ([], "max_tokens", 0)
    assert reply["usage"]["cache_creation_input_tokens"] > 0


def test_a_stop_sequence_ends_the_answer_before_it() -> None:
    reply = answer(user("count to 9"), stop_sequences=["7", ", 4"])
    assert (said(reply), reply["stop_reason"], reply["stop_sequence"]) == ("1, 2, 3", "stop_sequence", ", 4")


# Usage


def test_without_breakpoints_nothing_is_cached() -> None:
    usage = answer(user("hi"), system="be brief")["usage"]
    assert (usage["cache_creation_input_tokens"], usage["cache_read_input_tokens"]) == (0, 0)
    assert usage["input_tokens"] == tokens.count_request(request(user("hi"), system="be brief"))


def test_what_an_earlier_request_has_sent_is_read_from_the_cache() -> None:
    system = [{"type": "text", "text": "be brief " * 50, "cache_control": {"type": "ephemeral"}}]
    first = answer(user("hi"), system=system, tools=TOOLS)["usage"]
    last = {"role": "user", "content": [{"type": "text", "text": "more", "cache_control": {"type": "ephemeral"}}]}
    second = answer(user("hi"), {"role": "assistant", "content": "hello"}, last, system=system, tools=TOOLS)["usage"]
    assert (first["cache_read_input_tokens"], first["cache_creation_input_tokens"] > 100) == (0, True)
    assert second["cache_read_input_tokens"] == first["cache_creation_input_tokens"] + first["input_tokens"]
    assert (second["cache_creation_input_tokens"] > 0, second["input_tokens"]) == (True, 0)


# Refusals


def tool_use(id: str = "t1") -> Json:
    return {"role": "assistant", "content": [{"type": "tool_use", "id": id, "name": "Bash", "input": {}}]}


def tool_result(id: str = "t1", content: Any = "ok") -> Json:
    return {"role": "user", "content": [{"type": "tool_result", "tool_use_id": id, "content": content}]}


def without(name: str) -> Json:
    return {key: value for key, value in request(user("hi")).items() if key != name}


REFUSED: list[tuple[Any, str]] = [
    ([], "The request body must be a JSON object"),
    (without("max_tokens"), "max_tokens: Field required"),
    (without("messages"), "messages: Field required"),
    (without("model"), "model: Field required"),
    ({**request(user("hi")), "model": 5}, "model: Input should be a valid string"),
    ({**request(user("hi")), "max_tokens": "5"}, "max_tokens: Input should be a valid integer"),
    ({**request(user("hi")), "max_tokens": -1}, "max_tokens: Input should be greater"),
    ({**request(user("hi")), "sesion": 1}, "sesion: Extra inputs are not permitted"),
    ({**request(user("hi")), "system": 1}, "system: Input should be"),
    ({**request(user("hi")), "stop_sequences": [""]}, "stop_sequences"),
    (request(), "at least one message is required"),
    ({**request(), "messages": "hi"}, "messages: Input should be a valid list"),
    (request({"role": "bot", "content": "x"}), "messages.0.role"),
    (request({"content": "x"}), "messages.0.role: Field required"),
    (request({"role": "user"}), "messages.0.content: Field required"),
    (request({"role": "user", "content": "x", "id": 1}), "messages.0.id: Extra inputs"),
    (request({"role": "user", "content": ""}), "non-empty content"),
    (request({"role": "user", "content": []}), "non-empty content"),
    (request({"role": "user", "content": [{"type": "text", "text": ""}]}), "text content blocks must be non-empty"),
    (request({"role": "user", "content": [{"type": "text"}]}), "messages.0.content.0.text.text: Field required"),
    (request({"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "x", "input": {}}]}), "Input tag 'tool_use'"),
    (request({"role": "user", "content": [{"type": "nonsense"}]}), "Input tag 'nonsense'"),
    (request({"role": "user", "content": ["x"]}), "messages.0.content.0.type"),
    (request({"role": "assistant", "content": "x"}, user("hi")), 'first message must use the "user" role'),
    (request(user("hi"), {"role": "assistant", "content": "x"}), "does not support assistant message prefill"),
    (request(user("hi"), tool_result()), "unexpected `tool_use_id` found in `tool_result` blocks: t1"),
    (request(user("hi"), tool_use("a"), tool_result("b")), "unexpected `tool_use_id`"),
    (request(user("hi"), tool_use(), user("never mind")), "`tool_use` ids were found without `tool_result` blocks immediately after: t1"),
    (request(user("hi"), tool_use(), tool_result(), tool_use(), tool_result()), "ids must be unique"),
    (
        request(user("hi"), {"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}]}, user("x")),
        "thinking.signature: Field required",
    ),
    (request(user("hi"), tools=[{"name": "x"}]), "tools.0.custom.input_schema: Field required"),
    (request(user("hi"), tools=[{"name": "a b", "input_schema": {"type": "object"}}]), "String should match pattern"),
    (request(user("hi"), tools=[{"name": "x", "input_schema": {}}]), "Input should be 'object'"),
    (request(user("hi"), tools=[TOOLS[0], TOOLS[0]]), "Tool names must be unique"),
    (request(user("hi"), tool_choice={"type": "auto"}), "may only be specified while providing tools"),
    (request(user("hi"), tools=TOOLS, tool_choice={"type": "tool", "name": "Nope"}), "Tool 'Nope' not found"),
    (request(user("hi"), thinking={"type": "enabled", "budget_tokens": 10}), "greater than or equal to 1024"),
    (request(user("hi"), thinking={"type": "enabled", "budget_tokens": 5000}), "`max_tokens` must be greater than"),
    (request(user("hi"), thinking={"type": "maybe"}), "thinking: Input should"),
    (request(user("hi"), tools=TOOLS, thinking={"type": "adaptive"}, tool_choice={"type": "any"}), "Thinking may not be enabled"),
    (
        request(user("hi"), tools=[{**tool, "cache_control": {"type": "ephemeral"}} for tool in TOOLS[:5]]),
        "A maximum of 4 blocks with cache_control",
    ),
]


@pytest.mark.parametrize(("body", "words"), REFUSED, ids=[words[:40] for _, words in REFUSED])
def test_what_the_real_api_refuses_is_refused(body: Any, words: str) -> None:
    with pytest.raises(ModelRefused) as caught:
        offline.check(body)
    assert words in caught.value.message
    assert (caught.value.status, caught.value.kind) == (400, "invalid_request_error")


UNUSUAL: list[tuple[Any, str]] = [
    (request(user("hi"), tool_use(), tool_result(content=[1])), "messages.2.content.0.tool_result.content.0.type"),
    (request(user("hi"), tool_use(), tool_result(content=[{"type": "text"}])), "tool_result.content.0.text.text"),
    (request(user("hi"), system=[1]), "system.0: Input should be a text block"),
    (request(user("hi"), system=[{"type": "text"}]), "system.0: Input should be a text block"),
    (request(user("hi"), {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": [], "input": {}}]}, user("x")),
     "tool_use.name: Input should be a valid string"),
    (request(user("hi"), {"role": "assistant", "content": [{"type": "tool_use", "id": {}, "name": "x", "input": {}}]}, user("x")),
     "tool_use.id: Input should be a valid string"),
    (request(user("hi"), tools=TOOLS, tool_choice="any"), "tool_choice: Input should have"),
    (request(user("hi"), output_config=[1]), "output_config: Input should be an object"),
    (request(user("hi"), output_config={"format": "json"}), "output_config.format: Input should be an object"),
    (request(user("hi"), output_format=1), "output_format: Input should be an object"),
    (request(*[user("hi")] * 100_001), "at most 100000 messages are allowed, got 100001"),
    (request(user("hi"), metadata=json.loads("[" * 300 + "]" * 300)), "nested more than 200 deep"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "words"), UNUSUAL, ids=[words[:40] for _, words in UNUSUAL])
def test_values_of_another_type_are_refused(body: Any, words: str) -> None:
    with pytest.raises(ModelRefused) as caught:
        offline.check(body)
    assert words in caught.value.message


@pytest.mark.parametrize("name", USUAL)
@pytest.mark.parametrize("input", ["{}", '{"todos": 3, "command": 1, "file_path": null, "pattern": []}'])
def test_a_call_without_its_usual_input_is_made_all_the_same(name: str, input: str) -> None:
    talk = Talk()
    assert calls(talk.say(f"call {name} with {input}")) == [(name, json.loads(input))]
    assert said(talk.results("done"))
    only_bash = answer(user(f"call {name} with {input}"), tools=TOOLS[:1])
    assert said(only_bash)


@pytest.mark.parametrize(
    "messages",
    [
        [user("hi")] * 60_000,
        [user("hi"), *(message for number in range(20_000) for message in (tool_use(f"t{number}"), tool_result(f"t{number}")))],
        [user("<system-reminder>" * 200_000)],
    ],
    ids=["neighbours", "tool calls", "reminders"],
)
async def test_a_huge_conversation_takes_time_in_proportion(messages: list[Json]) -> None:
    assert (await asyncio.wait_for(asyncio.to_thread(answer, *messages), 5))["type"] == "message"


def test_names_repeated_in_a_schema_are_filled_once() -> None:
    schema: Json = {"type": "string"}
    for _ in range(8):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"] * 50}
    assert calls(answer(user("hi"), tools=[{"name": "x", "input_schema": schema}], tool_choice={"type": "any"}))


WORDS = st.sampled_from(
    ["hi", "run `ls`", "read a.txt", "call Read with {}", "what is 1/0?", "text", "object", "any", "enabled", "Bash", "t1"]
)
NAMES = st.sampled_from(
    ["type", "text", "name", "content", "input", "format", "schema", "properties", "required", "enum", "minimum", "items"]
)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=8,
)


@st.composite
def odd_requests(draw: st.DrawFn) -> Json:
    """A request that would be taken, with anything at all in a few of its places."""
    call = {
        "type": "tool_use",
        "id": "t1",
        "name": draw(st.sampled_from([*USUAL, "x"])),
        "input": draw(st.dictionaries(NAMES, ANY, max_size=3)),
    }
    result = {"type": "tool_result", "tool_use_id": "t1", "content": draw(st.just("ok") | ANY)}
    messages = [user(draw(WORDS)), {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    schema = {"type": "object", "properties": draw(ANY), "required": draw(ANY)}
    asked = request(*messages[: draw(st.sampled_from([1, 3]))], tools=[*TOOLS, {"name": "x", "input_schema": schema}])
    fields = (
        "system",
        "tool_choice",
        "output_config",
        "output_format",
        "thinking",
        "stop_sequences",
        "cache_control",
        "metadata",
        "max_tokens",
    )
    odd = draw(st.dictionaries(st.sampled_from(fields), ANY | st.just({"type": "tool", "name": "x"}), max_size=3))
    places = [*asked["messages"], call, result, *asked["tools"][-2:]] if draw(st.booleans()) else []
    for place in places[: draw(st.integers(0, 2))]:
        asked["tools"] = [dict(tool) for tool in asked["tools"]]
        place[draw(st.sampled_from(sorted(place)))] = draw(ANY)
    return {**asked, **odd}


@settings(max_examples=300, deadline=None)
@given(asked=odd_requests() | ANY)
def test_no_request_whatever_makes_the_model_fail(asked: Any) -> None:
    try:
        checked = offline.check(asked)
    except ModelRefused:
        return
    answered = offline.Player().answer(checked)
    json.dumps([stream.message(checked, answered), list(stream.events(checked, answered)), offline.count_request(checked)])


def test_neighbours_of_one_role_count_as_one_turn() -> None:
    offline.check(request(user("a"), user("b"), tool_use("x"), tool_use("y"), tool_result("x"), tool_result("y"), user("c")))


def test_other_kinds_of_input_are_taken() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aa"}}
    asked = request({"role": "user", "content": [image]}, tools=[{"type": "web_search_20250305", "name": "web_search"}], temperature=0.5)
    assert "cannot look at what you attached" in said(stream.message(asked, offline.Player().answer(offline.check(asked))))


# Scripts


def player(*replies: Json) -> script.Player:
    return script.Player(script.parse({"replies": list(replies)}))


def test_replies_come_in_order_by_the_turns_of_the_conversation() -> None:
    playing = player(
        {"text": "first"}, {"tools": [{"name": "Bash", "input": {"command": "ls"}}]}, {"text": "last", "stop_reason": "refusal"}
    )
    turns = [user("a"), {"role": "assistant", "content": "first"}, user("b"), tool_use(), tool_result()]
    heard = [stream.message(asked, playing.answer(asked)) for asked in (request(*turns[:1]), request(*turns[:3]), request(*turns))]
    assert [message["stop_reason"] for message in heard] == ["end_turn", "tool_use", "refusal"]
    assert (said(heard[0]), calls(heard[1]), said(heard[2])) == ("first", [("Bash", {"command": "ls"})], "last")


def test_after_its_end_the_demo_model_goes_on() -> None:
    asked = request(user("a"), {"role": "assistant", "content": "x"}, user("what is 2+2?"))
    assert said(stream.message(asked, player({"text": "x"}).answer(asked))) == "2+2 = 4"


def test_a_match_selects_a_reply_by_the_last_text_or_tool_result() -> None:
    playing = player({"text": "in order"}, {"match": "wea.her", "text": "sunny"}, {"match": "^ok$", "text": "seen"})
    assert playing.answer(request(user("the weather?"))).blocks[0]["text"] == "sunny"
    assert playing.answer(request(user("other"))).blocks[0]["text"] == "in order"
    assert playing.answer(request(user("weather"), tool_use(), tool_result())).blocks[0]["text"] == "seen"


def test_a_reply_has_thinking_then_text_then_tools_and_its_own_usage() -> None:
    asked = request(user("a"))
    scripted = {
        "thinking": "hm",
        "text": "well",
        "tools": [{"name": "Bash", "id": "toolu_1"}],
        "usage": {"input_tokens": 7, "output_tokens": 9},
    }
    message = stream.message(asked, player(scripted).answer(asked))
    assert [block["type"] for block in message["content"]] == ["thinking", "text", "tool_use"]
    assert message["content"][2]["id"] == "toolu_1"
    assert (message["usage"]["input_tokens"], message["usage"]["output_tokens"]) == (7, 9)
    assert list(stream.events(asked, player(scripted).answer(asked)))[-2]["usage"]["output_tokens"] == 9


def test_chunk_sets_the_size_of_the_deltas() -> None:
    asked = request(user("a"))
    streamed = stream.events(asked, player({"text": "abcdefg", "chunk": 3}).answer(asked))
    assert [event["delta"]["text"] for event in streamed if event["type"] == "content_block_delta"] == ["abc", "def", "g"]


async def played(asked: Json, answer: stream.Answer) -> list[Json]:
    async with aclosing(offline.play(stream.events(asked, answer), answer)) as chunks:
        return [frame.data for frame in Decoder().feed(b"".join([chunk async for chunk in chunks]))]


async def test_an_error_comes_as_often_as_it_says_for_each_request() -> None:
    playing = player({"text": "fine", "error": {"status": 529, "message": "busy", "times": 2}})
    for asked in (request(user("a")), request(user("b"))):
        refusals = [playing.answer(asked).refusal for _ in range(3)]
        told = [refusal and (refusal.status, refusal.kind, refusal.message) for refusal in refusals]
        assert told == [(529, "overloaded_error", "busy"), (529, "overloaded_error", "busy"), None]


async def test_an_error_without_times_comes_always_and_before_the_first_byte() -> None:
    playing = player({"error": {"status": 429, "message": "scripted", "headers": {"retry-after": "1"}}})
    for _ in range(3):
        answer = playing.answer(request(user("a")))
        assert answer.refusal is not None
        assert (answer.refusal.kind, answer.refusal.headers) == ("rate_limit_error", {"retry-after": "1"})
        with pytest.raises(ModelRefused, match="scripted"):
            await offline.wait(answer)


async def test_an_error_can_come_in_the_middle_of_the_stream() -> None:
    asked = request(user("a"))
    seen = await played(asked, player({"text": "words", "error": {"status": 529, "after": 2}}).answer(asked))
    assert [event["type"] for event in seen] == ["message_start", "content_block_start", "error"]
    assert seen[2]["error"]["type"] == "overloaded_error"


async def test_a_cut_breaks_the_stream_after_so_many_events() -> None:
    asked = request(user("a"))
    scripted = player({"text": "words", "cut": 4}).answer(asked)
    chunks = offline.play(stream.events(asked, scripted), scripted)
    assert len(list(Decoder().feed(await anext(chunks)))) == 4
    with pytest.raises(StreamBroken):
        await anext(chunks)
    with pytest.raises(StreamBroken):
        await offline.wait(player({"cut": 0}).answer(asked))


async def test_a_hang_sends_no_more() -> None:
    asked = request(user("a"))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(offline.wait(player({"hang": True}).answer(asked)), 0.02)
    scripted = player({"text": "words", "hang": 2}).answer(asked)
    await offline.wait(scripted)
    chunks = offline.play(stream.events(asked, scripted), scripted)
    assert b"content_block_start" in await anext(chunks)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(chunks), 0.02)


async def test_delays_are_kept() -> None:
    asked = request(user("a"))
    scripted = player({"text": "abcd", "chunk": 1, "delay": 0.03, "delta_delay": 0.01}).answer(asked)
    started = time.monotonic()
    await offline.wait(scripted)
    assert time.monotonic() - started >= 0.03
    assert [event["delta"]["text"] for event in await played(asked, scripted) if event["type"] == "content_block_delta"] == list("abcd")
    assert time.monotonic() - started >= 0.07


BAD_SCRIPTS: list[tuple[Any, str]] = [
    ([], 'must be an object with a list: {"replies": [...]}'),
    ({"replies": 1}, "must be an object with a list"),
    ({"replies": [], "loop": True}, "unknown field 'loop'"),
    ({"replies": [{}, "x"]}, 'replies[1] must be an object, got "x"'),
    ({"replies": [{"txt": "x"}]}, "replies[0].txt: there is no such field; the fields are match, text"),
    ({"replies": [{"text": 1}]}, "replies[0].text must be a text, got 1"),
    ({"replies": [{"delay": -1}]}, "replies[0].delay must be a number of seconds, got -1"),
    ({"replies": [{"delay": True}]}, "replies[0].delay must be a number of seconds, got true"),
    ({"replies": [{"chunk": 0}]}, "replies[0].chunk must be a whole number, 1 or more"),
    ({"replies": [{"cut": 1.5}]}, "replies[0].cut must be a whole number"),
    ({"replies": [{"hang": "yes"}]}, "replies[0].hang must be true, or the number of events"),
    ({"replies": [{"stop_reason": "bored"}]}, "replies[0].stop_reason must be one of end_turn"),
    ({"replies": [{"usage": {"input_tokens": "x"}}]}, "replies[0].usage must be an object of token counts"),
    ({"replies": [{"tools": [{}]}]}, "replies[0].tools[0].name is missing"),
    ({"replies": [{"tools": [{"name": "x", "input": []}]}]}, "replies[0].tools[0].input must be an object"),
    ({"replies": [{"tools": [{"name": "x", "args": {}}]}]}, "replies[0].tools[0].args: there is no such field"),
    ({"replies": [{"error": {"status": 200}}]}, "replies[0].error.status must be an HTTP status from 400 to 599"),
    ({"replies": [{"error": {"times": 0}}]}, "replies[0].error.times must be a whole number, 1 or more"),
    ({"replies": [{"match": "("}]}, "replies[0].match is not a valid regular expression"),
]


@pytest.mark.parametrize(("value", "words"), BAD_SCRIPTS, ids=[words[:45] for _, words in BAD_SCRIPTS])
def test_a_mistake_in_a_script_is_named(value: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps(value))
    with pytest.raises(ConfigError) as caught:
        offline.load(str(tmp_path / "s.json"))
    assert words in caught.value.message
    assert "s.json" in caught.value.message


def test_a_script_that_is_not_json_or_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        offline.load(str(tmp_path / "s.json"))
    with pytest.raises(ConfigError, match="No such file"):
        offline.load(str(tmp_path / "other.json"))


# The server


@asynccontextmanager
async def serving(*replies: Json) -> AsyncIterator[str]:
    runner = web.AppRunner(app.create_app(list(replies)), handler_cancellation=True, access_log=None, shutdown_timeout=0.2)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def fetch(url: str, method: str = "GET", **how: Any) -> tuple[int, Json]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session, session.request(method, url, **how) as response:
        return response.status, await response.json()


async def test_the_server_lists_its_model_and_refuses_other_paths() -> None:
    async with serving() as url:
        assert (await fetch(f"{url}/v1/models"))[1]["data"][0]["id"] == "offline"
        assert (await fetch(f"{url}/v1/models/offline"))[1]["type"] == "model"
        assert (await fetch(f"{url}/v1/models/other"))[0] == 404
        status, body = await fetch(f"{url}/v1/complete", "POST", json={})
        assert (status, body["type"], body["error"]["type"]) == (404, "error", "not_found_error")
        assert (await fetch(f"{url}/v1/messages", "POST", data=b"{"))[1]["error"]["type"] == "invalid_request_error"


async def test_a_cut_closes_the_connection_in_the_middle() -> None:
    async with (
        serving({"text": "words and more words", "cut": 4}) as url,
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/messages", json=request(user("a"), stream=True)) as response,
    ):
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()


async def test_a_scripted_error_has_its_status_and_headers() -> None:
    async with (
        serving({"error": {"status": 429, "headers": {"retry-after": "7"}}}) as url,
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/messages", json=request(user("a"))) as response,
    ):
        assert (response.status, response.headers["retry-after"]) == (429, "7")
