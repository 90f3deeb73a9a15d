"""Takes a shell command line apart into its simple commands, for the permission rules. Pure; runs nothing.

A reading of the shell's grammar, not a shell: what it does not follow to the last character is not `is_clear`, and a rule
about a single command then allows nothing. It cannot follow variables (`$cmd`), so rules are a guard rail; the boundary is
the sandbox.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

MAX_DEPTH = 20
_KEYWORDS = ("if", "then", "elif", "else", "fi", "do", "done", "while", "until", "!", "{", "}")
_UNCLEAR = ("case", "select", "function", "coproc", "eval", "source", ".", "exec", "trap", "alias")
_EVALUATING = (
    "declare", "typeset", "local", "readonly", "export", "read", "mapfile", "readarray", "unset", "getopts", "let", "test", "[", "[[",
)  # fmt: skip
_WRAPPERS = (
    "sudo", "doas", "su", "runuser", "env", "nohup", "nice", "ionice", "chrt", "taskset", "prlimit", "timeout", "stdbuf", "unbuffer",
    "setsid", "command", "builtin", "exec", "time", "busybox", "toybox", "find", "unshare", "nsenter", "chroot", "setpriv", "flock",
    "watch", "strace", "ltrace", "script", "entr", "fd", "coproc", "ssh",
)  # fmt: skip
_SHELLS = ("sh", "bash", "dash", "zsh", "ksh", "ash", "rbash", "fish")
_FED = {*_SHELLS, "eval", "xargs", "parallel", "source", ".", "trap"}
_SIMPLE_WRAPPER = re.compile(r"(?:timeout \d+(?:\.\d+)?[smhd]?|nohup|nice(?: -n ?\d+| -\d+)?|time) (?!-)")
_LOOP = re.compile(r"for [a-z][a-z0-9]* in(?: .*)?", re.DOTALL)
_PLAIN_WORD = re.compile(r"[\w./=!<>:@%+, -]*")
_EXPANDED = set("$`*?[{~")
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
    is_clear = scanner.is_complete and scanner.is_plain and not any(_is_unclear(part) for part in scanner.parts)
    return Analysis(tuple(scanner.parts), scanner.is_complete, is_clear)


def _is_unclear(part: Part) -> bool:
    words = _without_keywords(part.words)
    while words and words[0] in ("time", "-p"):
        words = _without_keywords(words[1:])
    if not words:
        return False
    name, given = words[0], words[1:]
    if name in _EVALUATING and any("[" in word for word in given):
        return True  # the index of an array is evaluated, and what stands in it is run
    if name == "printf" and given and (given[0].startswith("-") or _EXPANDED & set(given[0])):
        return True  # `printf -v` takes the name of an array
    if name == "for":  # also names such as PATH could be set so
        return _LOOP.fullmatch(core(part)) is None
    return name in _UNCLEAR or all(_is_assignment(word) for word in words)


def core(part: Part) -> str:
    """The command behind `if`, `do`, `timeout 5` and the like, as it was written: what an allow rule is compared with."""
    raw = part.text.split(" ")
    while raw and raw[0] in _KEYWORDS:
        raw = raw[1:]
    text = " ".join(raw)
    while (wrapper := _SIMPLE_WRAPPER.match(text)) is not None:
        text = text[wrapper.end() :]
    return text


def is_harmless(part: Part) -> bool:
    """Whether the command needs no rule: it starts nothing and changes nothing but the shell it runs in."""
    text = core(part)
    name, given = text.split(" ")[0], _without_keywords(part.words)[1:]
    if name in ("test", "["):  # an operand that is only known later could turn out to be `-v`, which evaluates what follows
        return all(_PLAIN_WORD.fullmatch(word) and word not in ("-v", "-R") for word in given if word != "]")
    if name in ("wait", "exit"):
        return all(word.isdigit() or word in ("$!", "$?") for word in given)
    return not text or name in ("cd", "pwd", "true", "false", ":") or _LOOP.fullmatch(text) is not None


def changes_folder(part: Part) -> bool:
    return any(word in ("cd", "pushd", "popd") for word in part.words)


def aliases(part: Part) -> list[str]:
    """The command as it was written, unquoted, and without its folder: what a deny rule is compared with."""
    found = [part.text]
    words = _without_keywords(part.words)
    while words:
        found.append(" ".join(words))
        found.append(" ".join((os.path.basename(words[0]), *words[1:])))
        if not _is_assignment(words[0]):
            break
        words = _without_keywords(words[1:])
    return [text for text in dict.fromkeys(found) if text]


def disguises(command: str, analysis: Analysis) -> list[str]:
    """Texts any word of which may turn out to be a command: a deny rule is compared with every place in them."""
    names = [_program(part) for part in analysis.parts]
    fed = [name in _FED or (name in _WRAPPERS and _FED & set(part.words)) for name, part in zip(names, analysis.parts, strict=True)]
    if not analysis.is_clear or any(fed):
        return [_without_quotes(command)]
    parts = zip(names, analysis.parts, strict=True)
    return [_without_quotes(" ".join(part.words)) for name, part in parts if name in _WRAPPERS or _EXPANDED & set(name)]


def _program(part: Part) -> str:
    words = _without_keywords(part.words)
    while words and _is_assignment(words[0]):
        words = words[1:]
    return os.path.basename(words[0]) if words else ""


def _without_quotes(text: str) -> str:
    """Quotes may be nested to any depth in what is given to a shell: none of them matters here."""
    return re.sub(r"\\\n|[\"'\\]", "", text)


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
        self.is_plain = True
        """Nothing stood there whose reading is left to chance; see `Analysis.is_clear`."""
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
        if self.text.startswith("\\\n", self.at):  # the line goes on; right behind something it could make one word of two
            self.is_plain = self.is_plain and self.text[self.at - 1 : self.at] in (" ", "\t")
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
        if following in ("", "\n"):
            self.is_plain = False
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
        if rest.startswith(("[", '"')) and not (in_quotes and rest.startswith('"')):
            self.is_plain = False  # sums in an old form, or a text to be translated
        if rest == "((":
            self._arithmetic()
        elif rest.startswith("("):
            self.at += 2
            self._nested(")")
        elif rest.startswith("{"):
            self._braces(in_quotes)
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

    def _braces(self, in_quotes: bool) -> None:
        start = self.at
        self.at += 2
        while self.at < len(self.text) and self.text[self.at] != "}":
            self._unquoted(in_quotes=in_quotes)
        self._close()
        if re.fullmatch(r"\$\{[A-Za-z_]\w*\}", self.text[start : self.at]) is None:
            self.is_plain = False  # `${x:i}` and `${x@P}` evaluate what is in a variable, and quotes mean something else here

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
        self.is_plain = False  # what a backslash means in them depends on the quotes around them
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
        self.is_plain = self.is_plain and scanner.is_plain

    # Between words

    def _end_word(self) -> None:
        if self._word is None:
            return
        value, self._word = self._word, None
        if self._target in ("<<", "<<-"):
            raw = self.text[self._word_start : self.at]
            if self.depth or re.fullmatch(r"\w+|'\w+'|\"\w+\"|\\\w+", raw) is None:
                self.is_plain = False
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
            self.is_plain = self.is_plain and not self.text.startswith("(", self.at)  # `((…))` evaluates what is in a variable
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
        raw = self.text[self._word_start : self.at] if self._word is not None else ""
        if re.fullmatch(r"\{\w+\}", raw):
            self.is_plain = False  # sets a variable
        if raw.isdigit():
            self._word = None  # the number of a file descriptor
        self._end_word()
        forms = ("<<<", "<<-", "&>>", "<<", "<>", "<&", ">>", ">|", ">&", "&>", "<", ">")
        form = next(form for form in forms if self.text.startswith(form, self.at))
        self.at += len(form)
        copied = re.compile(r"(?:\d+-?|-)(?=[\s;|&<>()]|$)").match(self.text, self.at) if form in ("<&", ">&") else None
        if copied is not None:
            self.at = copied.end()
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
        self.is_plain = self.is_plain and scanner.is_plain
