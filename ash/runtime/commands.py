"""Takes a shell command line apart into its simple commands, for the permission rules. Pure; runs nothing.

A reading of the shell's grammar, not a shell: where a construct could run something that is not seen here, the result is
not `is_clear`, and a rule about a single command then allows nothing. It cannot follow variables (`$cmd`), so rules are a
guard rail; the boundary is the sandbox.
"""

from __future__ import annotations

import os
from typing import NamedTuple

MAX_DEPTH = 20
_KEYWORDS = ("if", "then", "elif", "else", "fi", "do", "done", "while", "until", "!", "{", "}", "time", "coproc")
_UNCLEAR = ("case", "select", "function", "coproc", "eval", "source", ".", "exec", "trap", "alias")
_WRAPPERS = (
    "sudo", "doas", "env", "nohup", "nice", "ionice", "timeout", "stdbuf", "setsid", "command", "builtin", "exec", "xargs", "time",
    "busybox",
)  # fmt: skip
_SIMPLE_WRAPPERS = ("timeout", "nohup", "nice", "time")
_SHELLS = ("sh", "bash", "dash", "zsh", "ksh", "ash")
_OPERATORS = ("&&", "||", ";;", "|&", ";", "|", "&", "\n")


class Part(NamedTuple):
    """One simple command. `text` is as it was written, without redirections; `words` are unquoted."""

    text: str
    words: tuple[str, ...]
    writes: tuple[str, ...]
    reads: tuple[str, ...]


class Analysis(NamedTuple):
    """`is_complete`: the grammar was understood. `is_clear`: besides, nothing runs that is not among the parts."""

    parts: tuple[Part, ...]
    is_complete: bool
    is_clear: bool


def analyse(command: str) -> Analysis:
    """Every simple command that `command` would run, those inside substitutions and subshells included."""
    scanner = _Scanner(command, 0)
    scanner.commands("")
    is_clear = scanner.is_complete and not any(_is_unclear(part) for part in scanner.parts)
    return Analysis(tuple(scanner.parts), scanner.is_complete, is_clear)


def _is_unclear(part: Part) -> bool:
    words = _without_keywords(part.words)
    return bool(words) and (words[0] in _UNCLEAR or all(_is_assignment(word) for word in words))


def core(part: Part) -> str:
    """The command behind `if`, `do`, `timeout 5` and the like, as it was written: what an allow rule is compared with."""
    raw = part.text.split(" ")
    while raw and raw[0] in _KEYWORDS:
        raw = raw[1:]
    while raw and raw[0] in _SIMPLE_WRAPPERS:
        raw = raw[1:]
        while raw and (raw[0][:1] == "-" or raw[0][:1].isdigit()):
            raw = raw[1:]
    return " ".join(raw)


def aliases(part: Part) -> list[str]:
    """Every way the command could be meant, unquoted and unwrapped: what a deny rule is compared with."""
    found = [part.text]
    words = _without_keywords(part.words)
    while words:
        found.append(" ".join(words))
        found.append(" ".join((os.path.basename(words[0]), *words[1:])))
        name = os.path.basename(words[0])
        if _is_assignment(words[0]):
            words = words[1:]
        elif name in _WRAPPERS:
            words, behind_value = _unwrapped(words[1:])
            found.append(" ".join(behind_value))
        else:
            found += _given_commands(name, words)
            break
    return [text for text in dict.fromkeys(found) if text]


def _unwrapped(words: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What follows the wrapper's options, and what follows in case the last option takes a value (`sudo -u bob rm`)."""
    last = ""
    while words and (words[0].startswith("-") or words[0][:1].isdigit()):
        last, words = words[0], words[1:]
    return words, words[1:] if last.startswith("-") else ()


def _given_commands(name: str, words: tuple[str, ...]) -> list[str]:
    """Commands given as arguments: `sh -c '…'`, `eval …`, `find -exec …`."""
    if name in _SHELLS or name == "eval":
        inner = [word for word in words[1:] if not word.startswith("-")]
        texts = inner if name in _SHELLS else [" ".join(inner)]
        return [alias for text in texts for part in analyse(text).parts for alias in aliases(part)]
    if name == "find":
        starts = [index + 1 for index, word in enumerate(words) if word in ("-exec", "-execdir", "-ok", "-okdir")]
        return [" ".join(words[start:]) for start in starts]
    return []


def _without_keywords(words: tuple[str, ...]) -> tuple[str, ...]:
    while words and words[0] in _KEYWORDS:
        words = words[1:]
    return words


def _is_assignment(word: str) -> bool:
    name, equals, _ = word.partition("=")
    return bool(equals) and name.rstrip("+").replace("[", "").replace("]", "").isidentifier()


class _Scanner:
    """Reads one command line; nested ones get a scanner of their own over the same text or over an unescaped copy."""

    def __init__(self, text: str, depth: int) -> None:
        self.text, self.at, self.depth = text, 0, depth
        self.parts: list[Part] = []
        self.is_complete = depth <= MAX_DEPTH
        self._heredocs: list[tuple[str, bool, bool]] = []
        self._line_start = 0
        self._start_part()

    def _start_part(self) -> None:
        self._raw: list[str] = []
        self._words: list[str] = []
        self._writes: list[str] = []
        self._reads: list[str] = []
        self._word: str | None = None
        self._word_start = 0
        self._target = ""

    def commands(self, end: str) -> None:
        """Read a list of commands up to `end` (one character), or to the end of the text where it is empty."""
        if self.depth > MAX_DEPTH:
            self.at = len(self.text)
        while self.at < len(self.text) and not (end and self.text[self.at] == end):
            self._step()
        self._end_part()
        if end and self.at >= len(self.text):
            self.is_complete = False
        if self._heredocs:
            self._heredocs, self.is_complete = [], False

    def _step(self) -> None:
        char = self.text[self.at]
        if char in " \t":
            self._end_word()
            self.at += 1
        elif char == "#" and self._word is None:
            end = self.text.find("\n", self.at)
            self.at = len(self.text) if end < 0 else end
        elif char in "<>" or self.text.startswith("&>", self.at):
            self._redirect()
        elif char in ";|&\n":
            self._operator()
        elif char in "()":
            self._parenthesis(char)
        else:
            self._piece()

    # Words

    def _grow(self, value: str) -> None:
        self._word = (self._word or "") + value

    def _piece(self) -> None:
        if self.text.startswith("\\\n", self.at):  # the line goes on
            self.at += 2
            return
        if self._word is None:
            self._word_start = self.at
        self._grow(self._unquoted(in_quotes=False))

    def _unquoted(self, *, in_quotes: bool) -> str:
        """One character or one quoted or substituted piece, and what it stands for as far as that is known."""
        char = self.text[self.at]
        if char == "\\":
            return self._escaped(in_quotes)
        if char == "'" and not in_quotes:
            return self._until("'")
        if char == '"' and not in_quotes:
            return self._double_quoted()
        if char == "`":
            return self._backticks()
        if char == "$":
            return self._dollar(in_quotes)
        self.at += 1
        return char

    def _escaped(self, in_quotes: bool) -> str:
        following = self.text[self.at + 1 : self.at + 2]
        self.at += 2
        if following == "\n":
            return ""
        return "\\" + following if in_quotes and following not in '$`"\\' else following

    def _until(self, quote: str) -> str:
        end = self.text.find(quote, self.at + 1)
        if end < 0:
            end, self.is_complete = len(self.text), False
        value = self.text[self.at + 1 : end]
        self.at = end + 1
        return value

    def _double_quoted(self) -> str:
        self.at += 1
        value = ""
        while self.at < len(self.text) and self.text[self.at] != '"':
            value += self._unquoted(in_quotes=True)
        self._close()
        return value

    def _close(self) -> None:
        if self.at >= len(self.text):
            self.is_complete = False
        self.at += 1

    def _dollar(self, in_quotes: bool) -> str:
        start, rest = self.at, self.text[self.at + 1 : self.at + 3]
        if rest.startswith("'") and not in_quotes:
            self.at += 1
            return self._ansi_quoted()
        if rest == "((":
            self._arithmetic()
        elif rest.startswith("("):
            self.at += 2
            self._nested(")")
        elif rest.startswith("{"):
            self._braces()
        else:
            self.at += 1
        return self.text[start : self.at]

    def _ansi_quoted(self) -> str:
        self.at += 1
        value = ""
        while self.at < len(self.text) and self.text[self.at] != "'":
            if self.text[self.at] == "\\":
                self.is_complete = False  # \x72 and the like spell any character
                self.at += 1
            value += self.text[self.at : self.at + 1]
            self.at += 1
        self._close()
        return value

    def _braces(self) -> None:
        self.at += 2
        while self.at < len(self.text) and self.text[self.at] != "}":
            self._unquoted(in_quotes=False)
        self._close()

    def _arithmetic(self) -> None:
        # Inside, an array index may hold a substitution that is not seen here; only plain sums are clear.
        self.at += 3
        start = self.at
        level = 0
        while self.at < len(self.text) and not (level == 0 and self.text.startswith("))", self.at)):
            level += {"(": 1, ")": -1}.get(self.text[self.at], 0)
            self._unquoted(in_quotes=True)
        if self.text[start : self.at].strip("0123456789+-*/%() \t"):
            self.is_complete = False
        self._close()
        self._close()

    def _backticks(self) -> str:
        start = self.at
        self.at += 1
        inner = ""
        while self.at < len(self.text) and self.text[self.at] != "`":
            if self.text[self.at] == "\\" and self.text[self.at + 1 : self.at + 2] in ("`", "\\", "$"):
                self.at += 1
            inner += self.text[self.at : self.at + 1]
            self.at += 1
        self._close()
        self._adopt(_Scanner(inner, self.depth + 1), "")
        return self.text[start : self.at]

    def _nested(self, end: str) -> None:
        scanner = _Scanner(self.text, self.depth + 1)
        scanner.at = self.at
        self._adopt(scanner, end)
        self.at = scanner.at + 1

    def _adopt(self, scanner: _Scanner, end: str) -> None:
        scanner.commands(end)
        self.parts += scanner.parts
        self.is_complete = self.is_complete and scanner.is_complete

    # Between words

    def _end_word(self) -> None:
        if self._word is None:
            return
        value, self._word = self._word, None
        if self._target in ("<<", "<<-"):
            raw = self.text[self._word_start : self.at]
            self._heredocs.append((value, self._target == "<<-", raw == value))
        elif self._target == ">":
            self._writes.append(value)
        elif self._target == "<":
            self._reads.append(value)
        elif not self._target:
            self._raw.append(self.text[self._word_start : self.at])
            self._words.append(value)
        self._target = ""

    def _end_part(self) -> None:
        self._end_word()
        if self._raw or self._writes or self._reads:
            self.parts.append(Part(" ".join(self._raw), tuple(self._words), tuple(self._writes), tuple(self._reads)))
        self._start_part()

    def _operator(self) -> None:
        operator = next(word for word in _OPERATORS if self.text.startswith(word, self.at))
        self._end_part()
        self.at += len(operator)
        if operator == "\n":
            if self._heredocs:
                self._read_heredocs(self.parts[self._line_start :])
            self._line_start = len(self.parts)

    def _parenthesis(self, char: str) -> None:
        is_subshell = char == "(" and self._word is None and not _without_keywords(tuple(self._words))
        if not is_subshell:
            self.is_complete = False  # a function, an array, a pattern of `case`, or nonsense
        self._end_part()
        self.at += 1
        if char == "(":
            self._nested(")")

    def _redirect(self) -> None:
        if self.text[self.at : self.at + 2] in ("<(", ">("):
            if self._word is None:
                self._word_start = self.at
            start = self.at
            self.at += 2
            self._nested(")")
            self._grow(self.text[start : self.at])
            return
        if self._word is not None and (self._word.isdigit() or self._word.startswith("{")):
            self._word = None  # the number of a file descriptor
        self._end_word()
        forms = ("<<<", "<<-", "&>>", "<<", "<>", "<&", ">>", ">|", ">&", "&>", "<", ">")
        form = next(form for form in forms if self.text.startswith(form, self.at))
        self.at += len(form)
        copies = form in ("<&", ">&") and self.text[self.at : self.at + 1].isdigit() | (self.text[self.at : self.at + 1] == "-")
        if copies:
            self.at += 1
        else:
            self._target = {"<<<": "word", "<<": "<<", "<<-": "<<-", "<": "<", "<&": "<"}.get(form, ">")

    def _read_heredocs(self, before: list[Part]) -> None:
        is_script = any(os.path.basename(word) in _SHELLS for part in before for word in part.words)
        for delimiter, strips_tabs, expands in self._heredocs:
            body = self._heredoc_body(delimiter, strips_tabs)
            if is_script:
                self._adopt(_Scanner(body, self.depth + 1), "")
            elif expands:
                self._expand(body)
        self._heredocs = []

    def _heredoc_body(self, delimiter: str, strips_tabs: bool) -> str:
        lines: list[str] = []
        while self.at < len(self.text):
            end = self.text.find("\n", self.at)
            end = len(self.text) if end < 0 else end
            line = self.text[self.at : end]
            self.at = end + 1
            if (line.lstrip("\t") if strips_tabs else line) == delimiter:
                return "\n".join(lines)
            lines.append(line)
        self.is_complete = False
        return "\n".join(lines)

    def _expand(self, body: str) -> None:
        scanner = _Scanner(body, self.depth + 1)
        while scanner.at < len(body):
            scanner._unquoted(in_quotes=True)
        self.parts += scanner.parts
        self.is_complete = self.is_complete and scanner.is_complete
