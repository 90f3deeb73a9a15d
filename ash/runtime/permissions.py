"""Decides whether a tool call may run: rules of the agent's settings and of the session, then the permission mode. Pure.

Deny wins over ask, ask over allow, any rule over the mode. Nobody can be asked yet, so what would need an approval is
denied with a sentence that says how to allow it.
"""

from __future__ import annotations

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
_HARMLESS = ("cd", "pwd", "true", "false", ":", "wait", "exit", "for", "[", "test")
_STREAMS = ("/dev/null", "/dev/stdout", "/dev/stderr")


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

    def denial(self, tool: str, given: dict[str, Any], *, is_read_only: bool) -> str | None:
        """Why the call must not run, as a sentence for the model; None when it may."""
        if self._problem is not None:
            return f"No tool may run: the agent's settings cannot be read, so its permission rules are unknown. {self._problem}"
        rule = self._match(self._deny, tool, given)
        if rule is not None:
            return f"Permission to use {tool} was denied by the rule {rule.text!r}. Do not try to get around it."
        if self.mode == BYPASS:
            return None
        if self.mode == PLAN and not is_read_only:
            return f"Permission to use {tool} was denied: in plan mode only tools that change nothing may be used."
        rule = self._match(self._ask, tool, given)
        if rule is not None:
            return f"Permission to use {tool} was denied: the rule {rule.text!r} asks for an approval, and nobody can be asked here."
        if is_read_only or self._is_allowed(tool, given):
            return None
        return (
            f"Permission to use {tool} was not granted: no rule allows this call, permission mode {self.mode!r} does not either, "
            "and nobody can be asked here. permissions.allow in .claude/settings.json or the session's allowedTools can allow it."
        )

    def _is_allowed(self, tool: str, given: dict[str, Any]) -> bool:
        if any(rule.spec is None and rule.covers(tool) for rule in self._allow):
            return True
        if tool == "Bash":
            return self._allows_command(str(given.get("command", "")))
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

    def _match(self, rules: list[Rule], tool: str, given: dict[str, Any]) -> Rule | None:
        if tool == "Bash":
            return self._match_command(rules, str(given.get("command", "")))
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

    def _match_command(self, rules: list[Rule], command: str) -> Rule | None:
        if not rules:
            return None
        analysis = commands.analyse(command)
        texts = [command.strip()] + [alias for part in analysis.parts for alias in commands.aliases(part)]
        for rule in rules:
            if rule.covers("Bash") and (rule.spec is None or _matches_any(rule.spec, texts)):
                return rule
            if rule.covers("Bash") and not analysis.is_complete and rule.spec is not None and _occurs(rule.spec, command):
                return rule
        return self._match_redirects(rules, analysis)

    def _match_redirects(self, rules: list[Rule], analysis: commands.Analysis) -> Rule | None:
        for part in analysis.parts:
            for tool, targets in (("Write", part.writes), ("Read", part.reads)):
                for target in targets:
                    rule = self._find([rule for rule in rules if rule.spec is not None], tool, self._paths.resolve(target))
                    if rule is not None:
                        return rule
        return None

    # Rules that allow a command

    def _allows_command(self, command: str) -> bool:
        specs = [rule.spec for rule in self._allow if rule.covers("Bash") and rule.spec is not None]
        if command.strip() in specs:
            return True
        analysis = commands.analyse(command)
        return analysis.is_clear and bool(analysis.parts) and all(self._allows_part(part, specs) for part in analysis.parts)

    def _allows_part(self, part: commands.Part, specs: list[str]) -> bool:
        text = commands.core(part)
        is_known = not text or text.split(" ")[0] in _HARMLESS or any(_matches_any(spec, [text]) for spec in specs)
        return is_known and all(target in _STREAMS or self._may_write(target) for target in part.writes)

    def _may_write(self, target: str) -> bool:
        return not set(target) & set("$`*?[{") and self._may_edit(self._paths.resolve(target))


def _matches_any(spec: str, texts: list[str]) -> bool:
    """`npm run test` is exactly that; `npm run:*` and `npm run *` are it and anything after a space; other `*` stand for any text."""
    prefix = next((spec[: -len(end)] for end in (":*", " *") if spec.endswith(end)), None)
    body = ".*".join(re.escape(piece) for piece in (spec if prefix is None else prefix).split("*"))
    pattern = re.compile(body if prefix is None else body + r"(?:\s.*)?", re.DOTALL)
    return any(pattern.fullmatch(text) for text in texts)


def _occurs(spec: str, command: str) -> bool:
    """Whether a command that could not be taken apart contains the denied words anywhere."""
    literal = spec.removesuffix(":*").split("*")[0].strip()
    return bool(literal) and re.search(rf"(?<![\w-]){re.escape(literal)}(?![\w-])", command) is not None
