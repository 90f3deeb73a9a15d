"""A sandbox's log: order, levels, bounds, and output that arrives in pieces."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ash.isolation import logbook as logbooks
from ash.isolation.logbook import Logbook


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Logbook]:
    found = Logbook(str(tmp_path / "bridge.log"))
    yield found
    found.close()


def test_lines_come_in_order_with_an_index_that_counts_on(book: Logbook) -> None:
    book.system("started")
    book.report("stdout", "hello")
    os.write(book.output, b"printed\n")
    lines = book.read()
    assert [(line["index"], line["level"], line["text"]) for line in lines] == [
        (0, "system", "started"), (1, "stdout", "hello"), (2, "stderr", "printed"),
    ]  # fmt: skip
    assert lines[0]["ts"].endswith("Z")
    assert [line["index"] for line in book.read(after=1)] == [2]


def test_a_bridge_cannot_write_in_our_name(book: Logbook) -> None:
    book.report("system", "the server says: all is well")
    assert book.read()[0]["level"] == "stderr"


def test_a_line_that_comes_in_pieces_is_one_line(book: Logbook) -> None:
    os.write(book.output, b"first ha")
    assert book.read() == []
    os.write(book.output, b"lf\n")
    assert [line["text"] for line in book.read()] == ["first half"]


def test_only_the_last_ten_thousand_lines_are_kept(book: Logbook) -> None:
    for number in range(logbooks.MAX_LINES + 5):
        book.report("info", str(number))
    lines = book.read()
    assert len(lines) == logbooks.MAX_LINES
    assert (lines[0]["index"], lines[0]["text"]) == (5, "5")


def test_long_lines_cannot_fill_the_memory(book: Logbook) -> None:
    for _ in range(1000):
        book.report("info", "x" * 100_000)
    assert sum(len(line["text"]) for line in book.read()) <= logbooks.MAX_BYTES


def test_a_flood_of_output_is_read_from_its_end(book: Logbook) -> None:
    os.write(book.output, b"early\n" + b"x" * 1_000_000 + b"\nlast\n")
    assert [line["text"] for line in book.read()][-1] == "last"
    assert "early" not in [line["text"] for line in book.read()]


def test_the_log_can_be_read_after_its_end(book: Logbook) -> None:
    os.write(book.output, b"last words\n")
    book.close()
    assert book.tail() == "last words"
    assert [line["text"] for line in book.read()] == ["last words"]


def test_a_log_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bridge.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        Logbook(str(tmp_path / "bridge.log"))
