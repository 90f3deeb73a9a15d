"""How a command line is taken apart for the permission rules."""

from __future__ import annotations

import pytest

from ash.runtime.commands import aliases, analyse, core


def parts(command: str) -> list[str]:
    return [part.text for part in analyse(command).parts]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("git status", ["git status"]),
        ("a && b || c ; d | e & f", ["a", "b", "c", "d", "e", "f"]),
        ("a\nb", ["a", "b"]),
        ("a |& b", ["a", "b"]),
        ("(a; b)", ["a", "b"]),
        ("echo $(rm x)", ["rm x", "echo $(rm x)"]),
        ("echo `rm x`", ["rm x", "echo `rm x`"]),
        ('echo "$(rm x)"', ["rm x", 'echo "$(rm x)"']),
        ("echo '$(rm x)'", ["echo '$(rm x)'"]),
        ("echo $(a $(b))", ["b", "a $(b)", "echo $(a $(b))"]),
        ("echo ${x:-$(rm x)}", ["rm x", "echo ${x:-$(rm x)}"]),
        ("diff <(a) >(b)", ["a", "b", "diff <(a) >(b)"]),
        ("echo \"a; b\" 'c && d'", ["echo \"a; b\" 'c && d'"]),
        ("echo a\\;b", ["echo a\\;b"]),
        ("a # b; c", ["a"]),
        ("echo a#b", ["echo a#b"]),
        ("npm \\\n  run", ["npm run"]),
        ("cat <<'E'\nrm x $(rm y)\nE\nls", ["cat", "ls"]),
        ("cat <<E\n$(rm y)\nE", ["cat", "rm y"]),
        ("cat <<-E\n\tx\n\tE\nls", ["cat", "ls"]),
        ("bash <<E\nrm x\nE", ["bash", "rm x"]),
        ("cat <<E | sh\nrm x\nE", ["cat", "sh", "rm x"]),
        ("cat <<< 'rm x'", ["cat"]),
        ("", []),
    ],
)
def test_every_simple_command_is_found(command: str, expected: list[str]) -> None:
    assert parts(command) == expected


@pytest.mark.parametrize(
    ("command", "writes", "reads"),
    [
        ("echo x > f", ("f",), ()),
        ("echo x >> 'a b' 2> err", ("a b", "err"), ()),
        ("cmd &> all", ("all",), ()),
        ("cmd 2>&1", (), ()),
        ("cmd >& f", ("f",), ()),
        ("cmd >| f < g", ("f",), ("g",)),
        ("cmd 2>&-", (), ()),
        ("cmd 2>&1-", (), ()),
        ("cmd >&2f", ("2f",), ()),
        ("cmd >&2\\\nf", ("2f",), ()),
        ("cmd {a,b}> f", ("f",), ()),
    ],
)
def test_redirections_are_kept_apart(command: str, writes: tuple[str, ...], reads: tuple[str, ...]) -> None:
    (part,) = analyse(command).parts
    assert (part.writes, part.reads) == (writes, reads)


@pytest.mark.parametrize(
    "command",
    [
        "echo 'x",
        'echo "x',
        "echo $(x",
        "echo `x",
        "f() { x; }",
        "a=(1 2)",
        "cat <<E\nx",
        "echo $'\\x72m'",
        "echo ${x",
        "echo $((a[1]))",
        ")",
        "(" * 50,
    ],
)
def test_what_is_not_understood_is_not_complete(command: str) -> None:
    assert not analyse(command).is_complete


@pytest.mark.parametrize("command", ["eval x", "source x", ". x", "X=1", "export A; X=1", "case x in a) b;; esac", "exec x", "trap x EXIT"])
def test_what_can_run_something_unseen_is_not_clear(command: str) -> None:
    assert not analyse(command).is_clear


@pytest.mark.parametrize(
    "command",
    [
        "time -p a",
        "cat <<E\n$x ${y}\nE",
        "a \\\n b",
        '"$x" "${y}"',
        "a && b",
        "for f in *; do cat $f; done",
        "if [ -f x ]; then a; else b; fi",
        "echo $((1 + 2))",
        "! a",
        "a 2>&1 | b",
    ],
)
def test_plain_commands_are_clear(command: str) -> None:
    assert analyse(command).is_clear


@pytest.mark.parametrize("command", ["rm x", "'rm' x", "r\\m x", '"rm" x', "/bin/rm x", "A=1 rm x", "! rm x", "{ rm x; }", ">f rm x"])
def test_the_command_behind_a_disguise_is_seen(command: str) -> None:
    found = [alias for part in analyse(command).parts for alias in aliases(part)]
    assert "rm x" in found


@pytest.mark.parametrize(
    ("command", "expected"),
    [("do npm test", "npm test"), ("timeout 5 npm test", "npm test"), ("then", ""), ("nice -n 5 x", "x"), ("sudo x", "sudo x")],
)
def test_the_core_of_a_command_is_what_an_allow_rule_is_about(command: str, expected: str) -> None:
    assert core(analyse(command).parts[0]) == expected
