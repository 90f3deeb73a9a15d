"""The JSON of requests: large bodies hold up nobody, and none becomes more objects than the server has memory for."""

from __future__ import annotations

import io
import json
import threading
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash.routes import requests
from tests.harness import Server

_TEXT = st.text(st.sampled_from('a,[{"\\\n é'), max_size=12)
_VALUES = st.recursive(st.none() | _TEXT, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(_TEXT, inner, max_size=5))


def marks(value: Any) -> int:
    """How many of `[`, `{` and `,` a JSON text has outside its strings."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if items is None else max(1, len(items)) + sum(map(marks, items))


@given(value=_VALUES, piece=st.integers(1, 9))
def test_marks_in_strings_are_no_marks_however_the_body_is_cut(value: Any, piece: int) -> None:
    with mock.patch.object(requests, "_PIECE", piece):
        outside = b"".join(requests._outside_strings(json.dumps(value, ensure_ascii=False).encode()))
    assert sum(map(outside.count, (b"[", b"{", b","))) == marks(value)
    assert not set(outside) - set(b" []{},:null")


async def post(server: Server, config: bytes) -> tuple[int, Any]:
    body = io.BytesIO(b'{"name": "a", "systemPrompt": "x", "unknown": ' + config + b"}")
    async with server.http.post(server.url + "/api/agents", data=body) as answer:
        return answer.status, await answer.json()


@pytest.mark.parametrize("values", [b"[" + b"0," * 2_000_000 + b"0]", b"[" + b"[]," * 1_000_000 + b"[]]"])
async def test_a_body_of_too_many_values_is_refused_in_words(server: Server, values: bytes) -> None:
    status, answer = await post(server, values)
    assert (status, answer["code"]) == (413, "payload_too_large")
    assert "more than 2,000,000 values" in answer["error"]


async def test_a_long_string_is_one_value_whatever_it_holds(server: Server) -> None:
    assert (await post(server, b'"' + b',[{\\"' * 1_000_000 + b'"'))[0] == 201


@pytest.mark.parametrize(("size", "is_apart"), [(1000, False), (2 * requests.MIB, True)])
async def test_only_large_bodies_are_parsed_in_a_thread(server: Server, monkeypatch: pytest.MonkeyPatch, size: int, is_apart: bool) -> None:
    seen, real = list[bool](), requests._parse

    def watched(body: bytes) -> Any:
        seen.append(threading.current_thread() is not threading.main_thread())
        return real(body)

    monkeypatch.setattr(requests, "_parse", watched)
    assert (await post(server, b'"' + b"x" * size + b'"'))[0] == 201
    assert seen == [is_apart]


async def test_half_a_character_in_raw_bytes_is_refused(server: Server) -> None:
    status, answer = await post(server, b'"\xed\xa0\xbd"')
    assert status == 400
    assert "not UTF-8" in answer["error"]
