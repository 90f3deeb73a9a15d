"""Text from outside cannot steer the terminal, however it is cut; streams that are no terminals get it unchanged."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash.cli.terminal import Sanitizer, Terminal, clean, shorten


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


HOSTILE = [
    ("\x1b[31mred\x1b[0m", "red"),
    ("\x1b]0;title\x07x", "x"),
    ("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
    ("\x1bP1$r\x1b\\x", "x"),
    ("a\x1b[2Jb\x1b[1;1Hc", "abc"),
    ("\x9b31mx", "x"),
    ("a\rb\x08c\x00d\x7f", "abcd"),
    ("\x1bc\x1b(0x", "x"),
    ("safe\u202eexe.txt\u2066", "safeexe.txt"),
    ("line\n\ttab é 漢 🙂", "line\n\ttab é 漢 🙂"),
]


@pytest.mark.parametrize(("text", "expected"), HOSTILE)
def test_escape_sequences_and_controls_are_taken_out(text: str, expected: str) -> None:
    assert clean(text) == expected


@pytest.mark.parametrize(("text", "expected"), HOSTILE)
def test_also_when_they_are_cut_into_single_characters(text: str, expected: str) -> None:
    sanitizer = Sanitizer()
    assert "".join(sanitizer.feed(character) for character in text) == expected


@given(st.lists(st.text(alphabet="a\x1b[]\x07\\0;m\x9b(c\r\u202e\n", max_size=12)))
def test_no_escape_character_ever_gets_through(pieces: list[str]) -> None:
    sanitizer = Sanitizer()
    shown = "".join(sanitizer.feed(piece) for piece in pieces)
    assert not set(shown) & set("\x1b\x9b\x07\r\u202e")


def test_an_endless_escape_sequence_does_not_grow_memory() -> None:
    sanitizer = Sanitizer()
    for _ in range(100):
        sanitizer.feed("\x1b]" + "x" * 1000)
    assert len(sanitizer._held) <= 4096


def test_a_terminal_gets_clean_text_and_a_pipe_gets_it_unchanged() -> None:
    screen, pipe = Screen(), io.StringIO()
    Terminal(out=screen, err=io.StringIO()).answer("\x1b[31mred")
    Terminal(out=pipe, err=io.StringIO()).answer("\x1b[31mred")
    assert (screen.getvalue(), pipe.getvalue()) == ("red", "\x1b[31mred")


def test_notes_are_clean_everywhere_and_coloured_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured, plain = (Screen(), False, "\x1b[36mtool\x1b[0m\n"), (Screen(), True, "tool\n")
    for err, no_color, expected in (coloured, plain, (io.StringIO(), False, "tool\n")):
        Terminal(out=io.StringIO(), err=err, no_color=no_color).note("\x1b]0;x\x07tool", "36")
        assert err.getvalue() == expected


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert Terminal(err=Screen(), out=io.StringIO()).has_colors is False


def test_a_note_does_not_land_in_the_middle_of_the_answer() -> None:
    screen = Screen()
    terminal = Terminal(out=screen, err=screen, no_color=True)
    terminal.answer("Let me look")
    terminal.note("→ Bash: ls")
    terminal.answer("Done")
    terminal.end_answer()
    assert screen.getvalue() == "Let me look\n→ Bash: ls\nDone\n"


def test_progress_is_for_terminals_and_goes_away() -> None:
    pipe, screen = io.StringIO(), Screen()
    for err in (pipe, screen):
        terminal = Terminal(out=io.StringIO(), err=err, no_color=True)
        terminal.progress("Uploading x", 512, 1024)
        terminal.note("done")
    assert pipe.getvalue() == "done\n"
    assert screen.getvalue() == "\rUploading x  50 % of 1.0 KiB\ndone\n"


def test_shorten_marks_what_it_leaves_out() -> None:
    assert [shorten("abc", 3), shorten("abcd", 3), shorten("a\nb", 3)] == ["abc", "ab…", "a…"]
