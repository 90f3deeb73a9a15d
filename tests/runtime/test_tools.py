"""The tools, each called directly at a bench on plain folders."""

from __future__ import annotations

import base64
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ash.runtime.interrupt import Interrupt, Interrupted
from ash.runtime.patterns import Glob, _accepts, _tokens, translate
from ash.runtime.tools import TOOLS, Outcome, ToolError, Workbench, check
from tests.runtime.fakes import WAIT, until


def call(bench: Workbench, name: str, interrupt: Interrupt | None = None, **given: Any) -> Outcome:
    tool = TOOLS[name]
    return tool.run(bench, check(tool, given), interrupt or Interrupt())


def content(bench: Workbench, name: str, **given: Any) -> str:
    found = call(bench, name, **given).content
    assert isinstance(found, str)
    return found


def refused(bench: Workbench, name: str, **given: Any) -> str:
    with pytest.raises(ToolError) as caught:
        call(bench, name, **given)
    return str(caught.value)


def only_block(outcome: Outcome) -> dict[str, Any]:
    assert isinstance(outcome.content, list)
    (block,) = outcome.content
    return block


@pytest.fixture
def work(bench: Workbench) -> Path:
    return Path(bench.paths.workspace)


# Bash


def test_bash_gives_both_streams_in_order(bench: Workbench) -> None:
    assert content(bench, "Bash", command="echo a; echo b >&2; echo c") == "a\nb\nc"


def test_bash_that_fails_says_its_exit_code(bench: Workbench) -> None:
    outcome = call(bench, "Bash", command="echo oops; exit 3")
    assert outcome.is_error
    assert outcome.content == "Exit code 3\noops"
    assert outcome.detail["exitCode"] == 3


def test_bash_that_prints_nothing_says_so(bench: Workbench) -> None:
    assert "printed nothing" in content(bench, "Bash", command="true")


def test_bash_has_an_empty_input(bench: Workbench) -> None:
    assert content(bench, "Bash", command="cat; echo end") == "end"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("cd /usr", "pwd", "/usr"),
        ("export A='x y\nz'", 'echo "$A"', "x y\nz"),
        ("export A=1; exit 0", "echo $A", "1"),
        ("export A=1; false", "echo $A", "1"),
        ("export A=1; unset HOME", "echo $A${HOME-none}", "1none"),
        ("export PATH=/nowhere", "echo $PATH", "/nowhere"),
        ("f() { echo hi; }; export -f f", "f", "hi"),
        ("A=1", "echo [$A]", "[]"),
        ("mkdir 'a\nb'; cd 'a\nb'", 'basename "$PWD"', "a\nb"),
        ("exec 250>&-; cd /usr", "pwd", None),
        ("exec 9>lock; export A=1; cd /usr", "pwd", "/usr"),
        ("kill -9 $$", "echo fine", "fine"),
        ("echo 'unbalanced", "echo fine", "fine"),
    ],
)
def test_what_the_shell_keeps_between_calls(bench: Workbench, work: Path, first: str, second: str, expected: str | None) -> None:
    call(bench, "Bash", command=first)
    assert content(bench, "Bash", command=second) == (expected if expected is not None else str(work))


def test_a_file_that_a_script_opens_gets_nothing_of_the_shell_s_state(bench: Workbench, work: Path) -> None:
    call(bench, "Bash", command="exec 9>lock 3>other; flock -n 9; cd /usr")
    assert (work / "lock").read_bytes() == (work / "other").read_bytes() == b""


def test_a_folder_that_was_removed_is_left_for_the_workspace(bench: Workbench, work: Path) -> None:
    call(bench, "Bash", command="mkdir gone; cd gone; rmdir ../gone")
    assert "no longer exists" in content(bench, "Bash", command="pwd")
    assert content(bench, "Bash", command="pwd") == str(work)


def test_bash_beyond_its_time_is_ended_with_what_it_started(bench: Workbench) -> None:
    outcome = call(bench, "Bash", command="echo begun; sleep 60 & echo $!; sleep 60", timeout=200)
    assert outcome.is_error
    assert isinstance(outcome.content, str)
    assert "longer than 0.2 s" in outcome.content
    pid = outcome.content.split()[-1]
    until(lambda: not os.path.exists(f"/proc/{pid}/fd"), "the child is gone")


def test_bash_is_ended_by_an_interrupt(bench: Workbench) -> None:
    interrupt = Interrupt()
    threading.Timer(0.1, interrupt.set).start()
    started = time.monotonic()
    outcome = call(bench, "Bash", interrupt, command="trap '' TERM; echo begun; while :; do sleep 0.05; done")
    assert time.monotonic() - started < 2
    assert outcome.detail["interrupted"]
    assert "begun" in outcome.content


def test_a_background_child_does_not_hold_the_call_and_survives(bench: Workbench, work: Path) -> None:
    started = time.monotonic()
    content(bench, "Bash", command="(sleep 0.4; echo late; echo later; touch done) &")
    assert time.monotonic() - started < 0.4
    until((work / "done").exists, "the child goes on printing")


def test_long_output_loses_its_middle(bench: Workbench) -> None:
    found = content(bench, "Bash", command="echo first; head -c 1000000 /dev/zero | tr '\\0' x; echo; echo last")
    assert found.startswith("first\n")
    assert found.endswith("last")
    assert "characters left out" in found
    assert len(found) < 31_000


def test_output_that_is_no_text_does_no_harm(bench: Workbench) -> None:
    assert "\ufffd" in content(bench, "Bash", command="printf '\\377\\376'")


def test_a_command_that_is_too_long_is_refused(bench: Workbench) -> None:
    assert "longer than" in refused(bench, "Bash", command="x" * 200_000)


# Read


def test_read_numbers_lines_as_cat_does(bench: Workbench, work: Path) -> None:
    (work / "a").write_text("one\n\ntwo")
    assert content(bench, "Read", file_path=str(work / "a")) == "     1\tone\n     2\t\n     3\ttwo"


def test_read_shows_a_range_and_says_how_to_go_on(bench: Workbench, work: Path) -> None:
    (work / "a").write_text("".join(f"{n}\n" for n in range(1, 11)))
    found = content(bench, "Read", file_path="a", offset=3, limit=2)
    assert found == "     3\t3\n     4\t4\n[More lines follow. Continue with offset=5.]"
    assert content(bench, "Read", file_path="a", offset=9) == "     9\t9\n    10\t10"


def test_read_cuts_long_lines_and_long_files(bench: Workbench, work: Path) -> None:
    (work / "a").write_text("x" * 5_000_000 + "\nend\n")
    first, second = content(bench, "Read", file_path="a").split("\n")
    assert len(first) < 2100
    assert second == "     2\tend"
    (work / "b").write_text("y" * 1000 + "\n" * 1 + ("z" * 1000 + "\n") * 5000)
    assert "Continue with offset=" in content(bench, "Read", file_path="b", limit=5000)


def test_read_names_what_is_wrong(bench: Workbench, work: Path) -> None:
    (work / "bin").write_bytes(b"ab\0cd")
    os.mkfifo(work / "fifo")
    assert "No such file" in refused(bench, "Read", file_path="none")
    assert "is a directory" in refused(bench, "Read", file_path=".")
    assert "binary file of 5 bytes" in refused(bench, "Read", file_path="bin")
    assert "not a regular file" in refused(bench, "Read", file_path="fifo")
    assert "null" in refused(bench, "Read", file_path="a\0b")


def test_read_of_nothing_says_so(bench: Workbench, work: Path) -> None:
    (work / "empty").touch()
    (work / "short").write_text("a\n")
    assert "empty" in content(bench, "Read", file_path="empty")
    assert "only 1 lines" in content(bench, "Read", file_path="short", offset=5)


@pytest.mark.parametrize(
    ("data", "kind"),
    [(b"\x89PNG\r\n\x1a\nx", "image/png"), (b"\xff\xd8\xffx", "image/jpeg"), (b"GIF89ax", "image/gif"), (b"RIFFxxxxWEBPx", "image/webp")],
)
def test_images_are_shown(bench: Workbench, work: Path, data: bytes, kind: str) -> None:
    (work / "picture").write_bytes(data)
    block = only_block(call(bench, "Read", file_path="picture"))
    assert (block["type"], block["source"]["media_type"]) == ("image", kind)
    assert base64.b64decode(block["source"]["data"]) == data


def test_a_pdf_is_a_document_and_too_large_files_are_refused(bench: Workbench, work: Path) -> None:
    (work / "a.pdf").write_bytes(b"%PDF-1.4 x")
    (work / "big.png").write_bytes(b"\x89PNG\r\n" + b"x" * 4_000_000)
    block = only_block(call(bench, "Read", file_path="a.pdf"))
    assert (block["type"], block["source"]["media_type"]) == ("document", "application/pdf")
    assert "Make it smaller" in refused(bench, "Read", file_path="big.png")


def test_pages_of_a_pdf_need_pdftotext(bench: Workbench, work: Path) -> None:
    (work / "a.pdf").write_bytes(b"%PDF-1.4 x")
    bench.env["PATH"] = str(work)
    assert "not installed" in refused(bench, "Read", file_path="a.pdf", pages="1")
    assert "not a page" in refused(bench, "Read", file_path="a.pdf", pages="one")
    (work / "pdftotext").write_text('#!/bin/sh\necho "$@"\n')
    (work / "pdftotext").chmod(0o755)
    assert content(bench, "Read", file_path="a.pdf", pages="2-5").startswith("-layout -f 2 -l 5")


# Write and Edit


def test_write_makes_a_file_with_its_folders(bench: Workbench, work: Path) -> None:
    assert "created" in content(bench, "Write", file_path="a/b/c.txt", content="ü\n")
    assert (work / "a/b/c.txt").read_bytes() == "ü\n".encode()


def test_a_file_must_have_been_read_before_it_is_replaced(bench: Workbench, work: Path) -> None:
    (work / "a").write_text("old")
    assert "has not been read" in refused(bench, "Write", file_path="a", content="new")
    assert "has not been read" in refused(bench, "Edit", file_path="a", old_string="old", new_string="new")
    call(bench, "Read", file_path="a")
    call(bench, "Write", file_path="a", content="new")
    assert (work / "a").read_text() == "new"


def test_a_file_that_changed_meanwhile_must_be_read_again(bench: Workbench, work: Path) -> None:
    (work / "a").write_text("old")
    call(bench, "Read", file_path="a")
    (work / "a").write_text("other!")
    assert "changed since you read it" in refused(bench, "Edit", file_path="a", old_string="other", new_string="x")


def test_edits_may_follow_each_other_without_reading_again(bench: Workbench, work: Path) -> None:
    call(bench, "Write", file_path="a", content="one two\n")
    call(bench, "Edit", file_path="a", old_string="one", new_string="1")
    assert "     1\t1 2" in content(bench, "Edit", file_path="a", old_string="two", new_string="2")
    assert (work / "a").read_text() == "1 2\n"


def test_an_edit_must_be_unambiguous(bench: Workbench, work: Path) -> None:
    call(bench, "Write", file_path="a", content="x x x")
    assert "occurs 3 times" in refused(bench, "Edit", file_path="a", old_string="x", new_string="y")
    assert "was not found" in refused(bench, "Edit", file_path="a", old_string="z", new_string="y")
    assert "the same" in refused(bench, "Edit", file_path="a", old_string="x", new_string="x")
    assert "3 occurrences" in content(bench, "Edit", file_path="a", old_string="x", new_string="y", replace_all=True)
    assert (work / "a").read_text() == "y y y"


def test_an_edit_shows_the_line_numbers_that_read_shows(bench: Workbench, work: Path) -> None:
    (work / "a").write_bytes("a\fb\x1cc\u2028d\x85e\nold\r\nend\n".encode())
    call(bench, "Read", file_path="a")
    shown = content(bench, "Edit", file_path="a", old_string="old", new_string="new").split("\n", 1)[1]
    assert shown == content(bench, "Read", file_path="a")
    assert shown.split("\n")[1:] == ["     2\tnew", "     3\tend"]


@pytest.mark.parametrize("half", [chr(0xD800), chr(0xDC80)], ids=["high", "low"])
def test_half_a_character_is_refused_in_words_and_nothing_is_written(bench: Workbench, work: Path, half: str) -> None:
    assert "content: holds" in refused(bench, "Write", file_path="a", content=f"x{half}")
    assert "new_string: holds" in refused(bench, "Edit", file_path="a", old_string="", new_string=half)
    assert os.listdir(work) == []
    call(bench, "Write", file_path="a", content="x")
    assert "new_string: holds" in refused(bench, "Edit", file_path="a", old_string="x", new_string=half)
    assert (work / "a").read_text() == "x"


def test_an_empty_old_string_creates_a_file_only(bench: Workbench, work: Path) -> None:
    call(bench, "Edit", file_path="a", old_string="", new_string="x")
    assert (work / "a").read_text() == "x"
    assert "exists" in refused(bench, "Edit", file_path="a", old_string="", new_string="y")


def test_an_edit_keeps_line_ends_bytes_and_permissions(bench: Workbench, work: Path) -> None:
    (work / "a").write_bytes(b"one\r\ntwo\r\n\xff\r\n")
    (work / "a").chmod(0o755)
    call(bench, "Read", file_path="a")
    call(bench, "Edit", file_path="a", old_string="one\ntwo", new_string="1\n2")
    assert (work / "a").read_bytes() == b"1\r\n2\r\n\xff\r\n"
    assert (work / "a").stat().st_mode & 0o777 == 0o755


def test_writing_through_a_link_keeps_the_link(bench: Workbench, work: Path) -> None:
    (work / "real").write_text("old")
    (work / "link").symlink_to("real")
    call(bench, "Read", file_path="link")
    call(bench, "Write", file_path="link", content="new")
    assert (work / "link").is_symlink()
    assert (work / "real").read_text() == "new"


def test_what_cannot_be_written_says_why_and_leaves_nothing(bench: Workbench, work: Path) -> None:
    (work / "file").touch()
    assert "is a directory" in refused(bench, "Write", file_path=".", content="")
    assert "cannot be written" in refused(bench, "Write", file_path="file/x", content="")
    assert sorted(os.listdir(work)) == ["file"]


# Glob and Grep


@pytest.fixture
def tree(work: Path) -> Path:
    for index, name in enumerate(["a.py", "src/b.py", "src/deep/c.ts", "src/deep/d.tsx", ".hidden/e.py", ".git/f.py"]):
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"import os\nname = '{name}'\nend\n")
        os.utime(path, (index, index))
    return work


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.py", ["a.py"]),
        ("**/*.py", [".hidden/e.py", "src/b.py", "a.py"]),
        ("src/**/*.{ts,tsx}", ["src/deep/d.tsx", "src/deep/c.ts"]),
        ("src/*", ["src/b.py"]),
        ("**/[cd].*", ["src/deep/d.tsx", "src/deep/c.ts"]),
        (".git/*", [".git/f.py"]),
    ],
)
def test_glob_finds_files_newest_first(bench: Workbench, tree: Path, pattern: str, expected: list[str]) -> None:
    assert content(bench, "Glob", pattern=pattern).split("\n") == [str(tree / name) for name in expected]


def test_glob_takes_a_folder_and_absolute_patterns(bench: Workbench, tree: Path) -> None:
    assert content(bench, "Glob", pattern="*.py", path="src") == str(tree / "src/b.py")
    assert content(bench, "Glob", pattern=f"{tree}/src/*.py") == str(tree / "src/b.py")
    assert content(bench, "Glob", pattern="*.none") == "No files found"
    assert "no such folder" in refused(bench, "Glob", pattern="*", path="none")


@pytest.mark.parametrize("pattern", ["*a*a*a*a*a*ab", "**/*a*a*a*ab", "{*a*a*a*b,*a*a*a*c}", "**a**a**a**a**b"])
def test_a_glob_with_many_stars_is_quick(bench: Workbench, work: Path, pattern: str) -> None:
    (work / ("a" * 200)).touch()
    started = time.monotonic()
    assert content(bench, "Glob", pattern=pattern) == "No files found"
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("path", ["a.py", "src/a.py", "src/x/y/ab.ts", "x", "a/b/c", "ab/cb", "src/a-b-c.tsx", ".a/b.c", "a\nb/c"])
def test_globs_with_many_stars_mean_what_globs_with_few_do(path: str) -> None:
    for pattern in (
        "**/*.py",
        "src/**/*",
        "**",
        "*",
        "a/**/c",
        "**/a*",
        "?*",
        "s*/**",
        "**/[!a]*",
        "{a,src}/*",
        "*/b?*",
        "a**",
        "**b/c",
        "[]a]*",
    ):
        expected = re.fullmatch(f"(?s:{translate(pattern)})", path) is not None
        options = [pattern.replace("{a,src}", choice) for choice in ("a", "src")]
        assert Glob(pattern).matches(path) == any(_accepts(_tokens(option), path) for option in options) == expected, pattern


def test_a_glob_that_means_nothing_or_too_much_is_refused(bench: Workbench) -> None:
    assert "pattern: " in refused(bench, "Glob", pattern="[z-a]")
    assert "more than 64" in refused(bench, "Glob", pattern="{a,b}" * 10)


def test_glob_says_when_there_are_more(bench: Workbench, work: Path) -> None:
    for number in range(120):
        (work / f"f{number}").touch()
    assert "20 more files match" in content(bench, "Glob", pattern="*")


def test_grep_lists_files_newest_first(bench: Workbench, tree: Path) -> None:
    assert content(bench, "Grep", pattern="^import") == "Found 5 files\n.hidden/e.py\nsrc/deep/d.tsx\nsrc/deep/c.ts\nsrc/b.py\na.py"


def test_grep_shows_lines_with_their_neighbours(bench: Workbench, tree: Path) -> None:
    assert content(bench, "Grep", pattern="name", path="a.py", output_mode="content") == "a.py:2:name = 'a.py'"
    found = content(bench, "Grep", pattern="NAME", path="a.py", output_mode="content", **{"-C": 1, "-i": True})
    assert found == "a.py-1-import os\na.py:2:name = 'a.py'\na.py-3-end"
    assert content(bench, "Grep", pattern="end", path="a.py", output_mode="content", **{"-n": False}) == "a.py:end"


def test_grep_counts_and_filters(bench: Workbench, tree: Path) -> None:
    assert content(bench, "Grep", pattern="n", path="src", glob="*.py", output_mode="count") == "src/b.py:2"
    assert content(bench, "Grep", pattern="import", type="ts") == "Found 2 files\nsrc/deep/d.tsx\nsrc/deep/c.ts"
    assert content(bench, "Grep", pattern="nothing like it") == "No files found"


def test_grep_matches_across_lines_only_when_asked(bench: Workbench, tree: Path) -> None:
    assert content(bench, "Grep", pattern="os.name", path="a.py", output_mode="content") == "No matches found"
    found = content(bench, "Grep", pattern="os.name", path="a.py", output_mode="content", multiline=True)
    assert found == "a.py:1:import os\na.py:2:name = 'a.py'"


def test_grep_pages_through_long_results(bench: Workbench, work: Path) -> None:
    (work / "a").write_text("x\n" * 10)
    found = content(bench, "Grep", pattern="x", output_mode="content", head_limit=2, offset=3)
    assert found == "a:4:x\na:5:x\n[5 more; continue with offset=5]"
    assert content(bench, "Grep", pattern="x", output_mode="content", head_limit=0).count("\n") == 9


def test_grep_names_what_is_wrong(bench: Workbench, tree: Path) -> None:
    assert "pattern: " in refused(bench, "Grep", pattern="(")
    assert "no such file" in refused(bench, "Grep", pattern="x", path="none")


def test_a_hostile_pattern_can_be_interrupted(bench: Workbench, work: Path) -> None:
    (work / "a").write_text("a" * 40 + "!")
    interrupt = Interrupt()
    threading.Timer(0.3, interrupt.set).start()
    started = time.monotonic()
    bench.env["PATH"] = "/nowhere"  # so that it is not ripgrep, which no pattern can trap
    with pytest.raises(Interrupted):
        call(bench, "Grep", interrupt, pattern="(a+)+$", path="a")
    assert time.monotonic() - started < WAIT


def test_searches_leave_out_what_may_not_be_read(bench: Workbench, tree: Path) -> None:
    bench.can_read = lambda path: "/src/" not in path
    assert "src" not in content(bench, "Grep", pattern="import")
    assert "src" not in content(bench, "Glob", pattern="**/*.py")


@pytest.fixture
def ripgrep() -> str:
    program = next((p for folder in os.environ["PATH"].split(":") if os.access(p := f"{folder}/rg", os.X_OK)), None)
    if program is None:
        pytest.skip("no ripgrep on this machine")
    return program


def test_ripgrep_and_the_built_in_search_agree(ripgrep: str, bench: Workbench, tree: Path) -> None:
    queries: list[dict[str, Any]] = [
        {"pattern": "import"},
        {"pattern": "name", "output_mode": "content", "-C": 1, "path": "src"},
        {"pattern": "n", "output_mode": "count", "glob": "*.py", "path": "src"},
    ]
    with_ripgrep = [sorted(content(bench, "Grep", **query).split("\n")) for query in queries]
    bench.env["PATH"] = "/nowhere"
    assert [sorted(content(bench, "Grep", **query).split("\n")) for query in queries] == with_ripgrep


# TodoWrite and schemas


def test_todos_are_kept_until_all_are_done(bench: Workbench) -> None:
    todo = {"content": "Run", "status": "pending", "activeForm": "Running"}
    call(bench, "TodoWrite", todos=[todo])
    assert bench.todos == [todo]
    outcome = call(bench, "TodoWrite", todos=[{**todo, "status": "completed"}])
    assert outcome.detail["oldTodos"] == [todo]
    assert bench.todos == []


def test_numbers_and_booleans_given_as_text_are_understood(bench: Workbench, work: Path) -> None:
    (work / "a").write_text("x\nx\n")
    assert content(bench, "Read", file_path="a", limit="1").startswith("     1\tx\n[More")
    assert content(bench, "Grep", pattern="X", output_mode="count", **{"-i": "true"}) == "a:2"


@pytest.mark.parametrize("tool", TOOLS.values(), ids=list(TOOLS))
def test_every_field_of_a_schema_is_described(tool: Any) -> None:
    offered = tool.offer()
    assert offered["description"]
    assert offered["input_schema"]["additionalProperties"] is False
    assert all(field["description"] for field in offered["input_schema"]["properties"].values())
    assert set(offered["input_schema"]["required"]) <= set(offered["input_schema"]["properties"])


def test_a_command_tells_how_it_ended_where_nothing_may_be_written(bench: Workbench) -> None:
    """As beyond the session's disk: then the shell cannot hand on its folder either."""
    assert "7" in content(bench, "Bash", command="ulimit -f 0; exit 7")
    assert content(bench, "Bash", command="ulimit -f 0; echo said").strip() == "said"
