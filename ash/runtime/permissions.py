"""Decides whether a tool call may run: rules of the agent's settings and of the session, then the permission mode. Pure.

Deny wins over ask, ask over allow, any rule over the mode. Nobody can be asked yet, so what would need an approval is
denied with a sentence that says how to allow it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from ash.runtime import commands
from ash.runtime.paths import Paths
from ash.runtime.patterns import forms_of, path_rule, translate
from ash.runtime.settings import Settings

BYPASS, DEFAULT, BY_AGENT, ACCEPT_EDITS, PLAN, DONT_ASK = (
    "bypassPermissions", "default", "permissionsByAgent", "acceptEdits", "plan", "dontAsk",
)  # fmt: skip
MODES = (BYPASS, DEFAULT, BY_AGENT, ACCEPT_EDITS, PLAN, DONT_ASK)
_RULE = re.compile(r"([A-Za-z_][\w.*-]*)\s*(?:\((.*)\))?", re.DOTALL)
_PATH_FIELDS = {"Read": "file_path", "Write": "file_path", "Edit": "file_path", "Glob": "path", "Grep": "path"}
_COVERS = {"Read": ("Read", "Glob", "Grep"), "Edit": ("Edit", "Write")}
_REDIRECT = re.compile(r"([<>])[&|>]*\s*([^\s;|&<>()]+)")
_STREAMS = ("/dev/null", "/dev/stdout", "/dev/stderr")
_MAX_FOLDERS = 64


class Rule(NamedTuple):
    """`Tool` (spec is None) or `Tool(spec)`."""

    text: str
    tool: str
    spec: str | None

    def covers(self, tool: str) -> bool:
        if tool in _COVERS.get(self.tool, (self.tool,)):
            return True
        if "*" in self.tool:
            return re.fullmatch(translate(self.tool), tool) is not None
        return self.tool.startswith("mcp__") and tool.startswith(self.tool + "__")


def parse_rule(text: str) -> Rule | None:
    """None where the text is no rule."""
    match = _RULE.fullmatch(text.strip())
    if match is None:
        return None
    spec = match[2].strip() if match[2] is not None else None
    return Rule(text, match[1], None if spec in ("", "*", ":*") else spec)


def _parse_rules(texts: Iterable[str], *, is_denial: bool) -> list[Rule]:
    """What is no rule allows nothing; as a denial it denies the whole tool that it begins with."""
    rules = [parse_rule(text) or (Rule(text, text.strip().partition("(")[0], None) if is_denial else None) for text in texts]
    return [rule for rule in rules if rule is not None]


class Permissions:
    """The rules in force for one turn."""

    def __init__(
        self, settings: Settings, paths: Paths, *, mode: str | None = None, allowed: Iterable[str] = (), disallowed: Iterable[str] = ()
    ) -> None:
        self._paths = paths
        self._problem = settings.problem
        self._deny = _parse_rules([*settings.deny, *disallowed], is_denial=True)
        self._ask = _parse_rules(settings.ask, is_denial=True)
        allowed = list(allowed)
        self._allow = _parse_rules([*settings.allow, *allowed], is_denial=False)
        # Who lists what is allowed, and names no mode, means that the rest is not.
        folder_mode = None if settings.default_mode == BYPASS else settings.default_mode  # not a folder's to choose
        self.mode = self._choose(mode or folder_mode or (DEFAULT if allowed else BYPASS), settings)

    @staticmethod
    def _choose(chosen: str, settings: Settings) -> str:
        """The session's mode counts; the folder's own only where the session names none. An unknown one is the strict default."""
        if chosen not in MODES or (chosen == BYPASS and settings.forbids_bypass):
            return DEFAULT
        return chosen

    def offers(self, tool: str) -> bool:
        """Whether the model should see the tool at all: not when every call of it would be denied."""
        return not any(rule.spec is None and rule.covers(tool) for rule in self._deny)

    def can_read(self, path: str) -> bool:
        return self._find(self._deny, "Read", path) is None

    def denial(self, tool: str, given: dict[str, Any], *, is_read_only: bool, folder: str | None = None) -> str | None:
        """Why the call must not run, as a sentence for the model; None when it may. `folder` is where the shell is."""
        if self._problem is not None:
            return f"No tool may run: the agent's settings cannot be read, so its permission rules are unknown. {self._problem}"
        rule = self._match(self._deny, tool, given, folder)
        if rule is not None:
            return f"Permission to use {tool} was denied by the rule {rule.text!r}. Do not try to get around it."
        if self.mode == BYPASS:
            return None
        if self.mode == PLAN and not is_read_only:
            return f"Permission to use {tool} was denied: in plan mode only tools that change nothing may be used."
        rule = self._match(self._ask, tool, given, folder)
        if rule is not None:
            return f"Permission to use {tool} was denied: the rule {rule.text!r} asks for an approval, and nobody can be asked here."
        if is_read_only or self._is_allowed(tool, given, folder):
            return None
        return (
            f"Permission to use {tool} was not granted: no rule allows this call, permission mode {self.mode!r} does not either, "
            "and nobody can be asked here. permissions.allow in .claude/settings.json or the session's allowedTools can allow it."
        )

    def _is_allowed(self, tool: str, given: dict[str, Any], folder: str | None) -> bool:
        if any(rule.spec is None and rule.covers(tool) for rule in self._allow):
            return True
        if tool == "Bash":
            return self._allows_command(str(given.get("command", "")), folder or self._paths.workspace)
        path = self._path_of(tool, given)
        return tool in _COVERS["Edit"] and path is not None and self._may_edit(path)

    def _may_edit(self, path: str) -> bool:
        forms = forms_of(path)
        if self.mode == ACCEPT_EDITS and all((form + "/").startswith(self._paths.workspace + "/") for form in forms):
            return True
        rules = [rule for rule in self._allow if rule.covers("Edit")]
        patterns = [path_rule(rule.spec, self._paths) for rule in rules if rule.spec is not None]
        is_any = any(rule.spec is None for rule in rules)
        return is_any or all(any(pattern.fullmatch(form) for pattern in patterns) for form in forms)

    def _path_of(self, tool: str, given: dict[str, Any]) -> str | None:
        field = _PATH_FIELDS.get(tool)
        if field is None:
            return None
        return self._paths.resolve(str(given.get(field) or "."))

    # Rules that stop a call

    def _match(self, rules: list[Rule], tool: str, given: dict[str, Any], folder: str | None) -> Rule | None:
        if tool == "Bash":
            return self._match_command(rules, str(given.get("command", "")), folder or self._paths.workspace)
        path = self._path_of(tool, given)
        if path is not None:
            return self._find(rules, tool, path)
        return next((rule for rule in rules if rule.covers(tool) and rule.spec is None), None)

    def _find(self, rules: list[Rule], tool: str, path: str) -> Rule | None:
        forms = forms_of(path)
        for rule in rules:
            if rule.covers(tool) and (rule.spec is None or any(path_rule(rule.spec, self._paths).fullmatch(form) for form in forms)):
                return rule
        return None

    def _match_command(self, rules: list[Rule], command: str, folder: str) -> Rule | None:
        if not rules:
            return None
        analysis = commands.analyse(command)
        texts = [command.strip()] + [alias for part in analysis.parts for alias in commands.aliases(part)]
        loose = commands.disguises(command, analysis)
        for rule in rules:
            if rule.covers("Bash") and (rule.spec is None or _matches_any(rule.spec, texts) or _occurs(rule.spec, loose)):
                return rule
        return self._match_redirects([rule for rule in rules if rule.spec is not None], analysis, loose, folder)

    def _match_redirects(self, rules: list[Rule], analysis: commands.Analysis, loose: list[str], folder: str) -> Rule | None:
        writes = {target for part in analysis.parts for target in part.writes}
        reads = {target for part in analysis.parts for target in part.reads}
        for sign, target in (found for text in loose for found in _REDIRECT.findall(text)):
            (writes if ">" in sign else reads).add(target)
        folders = self._folders(analysis, folder) if rules else []
        places = [(tool, target) for tool, targets in (("Write", writes), ("Read", reads)) for target in targets]
        found = (self._find(rules, tool, os.path.join(base, self._home(target))) for tool, target in places for base in folders)
        return next((rule for rule in found if rule is not None), None)

    def _folders(self, analysis: commands.Analysis, folder: str) -> list[str]:
        """Where the shell may be when a file is opened, as far as the line says."""
        folders = dict.fromkeys((folder, self._paths.workspace, self._paths.home))
        for part in analysis.parts:
            if commands.changes_folder(part):
                folders |= dict.fromkeys(os.path.join(base, self._home(part.words[-1])) for base in list(folders)[:_MAX_FOLDERS])
        return list(folders)[: 2 * _MAX_FOLDERS]

    def _home(self, target: str) -> str:
        return self._paths.home + target[1:] if target == "~" or target.startswith("~/") else target

    # Rules that allow a command

    def _allows_command(self, command: str, folder: str) -> bool:
        specs = [rule.spec for rule in self._allow if rule.covers("Bash") and rule.spec is not None]
        if command.strip() in specs:
            return True
        analysis = commands.analyse(command)
        if not analysis.is_clear or not analysis.parts or not all(_allows_part(part, specs) for part in analysis.parts):
            return False
        # A name that is relative is only known to mean a file while the shell stays where it is.
        base = "" if any(commands.changes_folder(part) for part in analysis.parts) else folder
        return all(target in _STREAMS or self._may_write(base, target) for part in analysis.parts for target in part.writes)

    def _may_write(self, base: str, target: str) -> bool:
        path = os.path.join(base, target)
        return os.path.isabs(path) and not set(target) & set("$`*?[{~<>()") and self._may_edit(os.path.normpath(path))


def _allows_part(part: commands.Part, specs: list[str]) -> bool:
    return commands.is_harmless(part) or any(_matches_any(spec, [commands.core(part)]) for spec in specs)


def _pieces(spec: str) -> tuple[list[str], bool]:
    """The texts between the `*` of a rule, and whether anything may follow after a space."""
    prefix = next((spec[: -len(end)] for end in (":*", " *") if spec.endswith(end)), None)
    return (spec if prefix is None else prefix).split("*"), prefix is not None


def _matches_any(spec: str, texts: list[str]) -> bool:
    """`npm run test` is exactly that; `npm run:*` and `npm run *` are it and anything after a space; other `*` stand for any text."""
    pieces, is_open = _pieces(spec)
    return any(_matches(pieces, is_open, text) for text in texts)


def _matches(pieces: list[str], is_open: bool, text: str) -> bool:
    # By hand and not with `re`: with several `*` a long command would keep a regular expression busy for minutes.
    if not text.startswith(pieces[0]):
        return False
    at = len(pieces[0])
    for piece in pieces[1:] if is_open else pieces[1:-1]:  # the earliest place leaves the most room for the rest
        at = text.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    if not is_open:
        return at == len(text) if len(pieces) == 1 else text.endswith(pieces[-1]) and len(text) - len(pieces[-1]) >= at
    return _ends_word(pieces, text, at)


def _ends_word(pieces: list[str], text: str, at: int) -> bool:
    """Whether the last piece ends a word where it was found or, behind a `*`, further on."""
    last = pieces[-1]
    while at < len(text) and not text[at].isspace():
        if len(pieces) == 1:
            return False
        at = text.find(last, at - len(last) + 1) if last else len(text)
        if at < 0:
            return False
        at += len(last)
    return True


def _occurs(spec: str, texts: list[str]) -> bool:
    """Whether the words of a denied command stand anywhere in a text, in their order."""
    pieces = [_squeezed(piece) for piece in _pieces(spec)[0]]
    first = re.compile(rf"(?<![\w-]){re.escape(pieces[0])}(?![\w-])" if pieces[0] else "")
    for text in map(_squeezed, texts):
        start = first.search(text)
        if start is not None and _follow(pieces[1:], text, start.end()):
            return True
    return False


def _follow(pieces: list[str], text: str, at: int) -> bool:
    for piece in pieces:
        at = text.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return True


def _squeezed(text: str) -> str:
    return " ".join(re.sub(r"[\"'\\]", "", text).split())
