"""The bridge protocol: good lines pass unchanged, everything else is a ProtocolError and nothing worse."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash import protocol
from ash.errors import ProtocolError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@given(content=st.text(), turn=st.text())
def test_a_command_arrives_as_it_was_sent(content: str, turn: str) -> None:
    line = protocol.command("query", 3, turn_id=turn, content=content, options={})
    assert line.count(b"\n") == 1
    assert protocol.decode_command(line) == {"cmd": "query", "id": 3, "turn_id": turn, "content": content, "options": {}}


@given(noise=st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(ProtocolError):
        protocol.decode_event(noise)


@given(event=st.dictionaries(st.sampled_from(["ev", "n", "turn_id", "data", "status", "error"]), JSON))
def test_a_line_of_the_wrong_shape_is_refused_or_well_formed(event: dict[str, object]) -> None:
    try:
        decoded = protocol.decode_event(json.dumps(event).encode())
    except ProtocolError:
        return
    assert decoded["ev"] in protocol.EVENTS
    assert isinstance(decoded["n"], int)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"ev":"done","n":1,"turn_id":"t","status":"fine"}', "unknown status"),
        (b'{"ev":"done","n":true,"turn_id":"t","status":"completed"}', "whole number"),
        (b'{"ev":"message","n":1,"turn_id":"t","data":[]}', "data must be dict"),
        (b'{"ev":"fly","n":1}', "unknown ev"),
        (b"[" * 100_000, "not JSON"),
        (b'"' + b"x" * protocol.MAX_LINE_BYTES + b'"', "the limit is"),
    ],
)
def test_the_reason_is_named(line: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        protocol.decode_event(line)


def test_a_command_without_a_field_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="turn_id must be str"):
        protocol.command("interrupt", 1)
