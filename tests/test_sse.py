"""The event-stream codec: what is written can be read, however the bytes are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash import sse

DATA = st.dictionaries(st.text(), st.text() | st.integers() | st.none())


@given(frames=st.lists(st.tuples(st.sampled_from(["message", "done"]), DATA), max_size=5), cut=st.integers(1, 40))
def test_frames_survive_any_cut_of_the_bytes(frames: list[tuple[str, dict[str, object]]], cut: int) -> None:
    stream = b"".join(sse.encode(name, data, id=n) + sse.KEEPALIVE for n, (name, data) in enumerate(frames, 1))
    decoder = sse.Decoder()
    got = [frame for start in range(0, len(stream), cut) for frame in decoder.feed(stream[start : start + cut])]
    assert [(frame.event, frame.data) for frame in got] == frames
    assert [frame.id for frame in got] == [str(n) for n in range(1, len(frames) + 1)]


def test_no_character_in_the_data_can_end_a_line_for_any_reader() -> None:
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\ng\rh"
    encoded = sse.encode("message", {"text": text}).decode("ascii")
    assert len(encoded.splitlines()) == 3, "event, data and the empty line"


def test_data_stands_directly_behind_its_event() -> None:
    assert sse.encode("done", {"a": 1}, id=7) == b'id: 7\nevent: done\ndata: {"a":1}\n\n'


@pytest.mark.parametrize("bad", ["x\n\nid: 9\nevent: done", "x\r", "é", "x\x00", "\u2028"])
def test_a_name_or_id_that_could_end_its_line_is_refused(bad: str) -> None:
    for name, id in ((bad, 1), ("message", bad)):
        with pytest.raises(ValueError, match="printable ASCII"):
            sse.encode(name, {}, id)


def test_other_senders_line_endings_and_several_data_lines_are_read() -> None:
    frames = list(sse.Decoder().feed(b"event: x\r\ndata: [1,\r\ndata: 2]\r\n\r\n:note\n\ndata: plain\n\n"))
    assert [(frame.event, frame.data) for frame in frames] == [("x", [1, 2]), ("message", "plain")]


def test_a_frame_without_an_end_cannot_grow_for_ever() -> None:
    decoder = sse.Decoder(max_bytes=1000)
    list(decoder.feed(b"data: " + b"x" * 900))
    with pytest.raises(ValueError, match="1000 bytes"):
        list(decoder.feed(b"x" * 200))
