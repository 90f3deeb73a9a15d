"""What came of an attack: a verdict for each probe with its reason, and the dated report of all. Pure; reads and runs nothing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from ash.attack.probes import CANNOT

PASS, FAIL, NOT_APPLICABLE = "pass", "fail", "not applicable"
_PROOF_CHARACTERS = 300
# What only a mistake in the probe raises: it has shown nothing, and must not look as if it had.
_BROKEN = re.compile(
    r"^(SyntaxError|NameError|TypeError|AttributeError|ImportError|ModuleNotFoundError|IndexError|KeyError|UnboundLocalError)\b.*", re.M
)


class Result(NamedTuple):
    """How one probe ended. `detail` is the proof of a `fail`, and the reason of `not applicable`."""

    id: str
    name: str
    layer: str
    verdict: str
    detail: str = ""
    seconds: float = 0.0


class Report(NamedTuple):
    """One attack on one server, with its date. `host` and `server` are what they said of themselves."""

    started_at: str
    seconds: float
    version: str
    server: dict[str, Any]
    host: dict[str, Any]
    results: tuple[Result, ...]
    leftovers: tuple[str, ...] = ()
    """What could not be taken away again."""

    @property
    def totals(self) -> dict[str, int]:
        counts = Counter(result.verdict for result in self.results)
        return {verdict: counts[verdict] for verdict in (PASS, FAIL, NOT_APPLICABLE)}

    @property
    def holds(self) -> bool:
        """Whether no probe got through. A report without a single pass shows nothing, and does not hold."""
        return not self.totals[FAIL] and bool(self.totals[PASS])

    def to_json(self) -> dict[str, Any]:
        return {
            "startedAt": self.started_at, "seconds": round(self.seconds, 1), "version": self.version, "server": self.server,
            "host": self.host, "holds": self.holds,
            "totals": {"pass": self.totals[PASS], "fail": self.totals[FAIL], "notApplicable": self.totals[NOT_APPLICABLE]},
            "probes": [result._asdict() for result in self.results], "leftovers": list(self.leftovers),
        }  # fmt: skip

    def to_markdown(self) -> str:
        about = {"server": self.server, "host": self.host}
        lines = [f"# Attack of {self.started_at}", "", f"By ash {self.version}, in {self.seconds:.0f} s: {self.summary}.", ""]
        lines += [f"- {part} {name}: {value}" for part, values in about.items() for name, value in values.items()]
        lines += ["", "| verdict | probe | layer | why |", "|---|---|---|---|"]
        ordered = sorted(self.results, key=lambda result: (FAIL, NOT_APPLICABLE, PASS).index(result.verdict))
        lines += [f"| {row.verdict} | {_cell(row.name)} | {_cell(row.layer)} | {_cell(row.detail)} |" for row in ordered]
        return "\n".join([*lines, *(f"\nNot taken away: {_cell(left)}" for left in self.leftovers), ""])

    @property
    def summary(self) -> str:
        totals = self.totals
        return f"{totals[PASS]} passed, {totals[FAIL]} failed, {totals[NOT_APPLICABLE]} not applicable"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def shorten(text: str) -> str:
    """A proof in one line."""
    line = " ".join(text.split())
    return line if len(line) <= _PROOF_CHARACTERS else line[:_PROOF_CHARACTERS] + " …"


def judge(exit_code: int, output: str, errors: str) -> tuple[str, str]:
    """The verdict on a probe's command, and why."""
    if exit_code == 0:
        return FAIL, shorten(output) or "exit code 0"
    if exit_code == CANNOT:
        return NOT_APPLICABLE, shorten(output)
    if exit_code in (126, 127):
        return NOT_APPLICABLE, f"it could not be tried: {shorten(errors)}"
    if broken := _BROKEN.search(errors):
        return FAIL, f"the probe itself is broken: {shorten(broken.group())}"
    return PASS, ""


def select(names: Sequence[str], ids: Sequence[str]) -> list[str]:
    """Those of `ids` that `names` mean: exactly, or as a part. Raises ValueError for a name that means none."""
    found: list[str] = []
    for name in names:
        matches = [id for id in ids if id == name] or [id for id in ids if name in id]
        if not matches:
            raise ValueError(name)
        found += matches
    return [id for id in ids if id in found]
