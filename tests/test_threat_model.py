"""docs/threat-model.md against the code: every test and probe that it names exists, and every probe attacks a layer that has a row."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

from ash.attack.campaign import ATTACKS, Attack

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "threat-model.md"
HEADER = ["layer", "stops", "does not stop", "test"]


class Row(NamedTuple):
    layer: str
    tests: str


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split(" | ")]


def rows() -> list[Row]:
    """The rows of all tables of layers."""
    found, is_layers = [], False
    for line in PAGE.read_text().splitlines():
        if not line.startswith("|"):
            is_layers = False
        elif cells(line) == HEADER:
            is_layers = True
        elif is_layers and not line.startswith("|---"):
            found.append(Row(cells(line)[0], cells(line)[-1]))
    return found


def functions() -> set[str]:
    return {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.M)
    }


ROWS = rows()
PROBES = [attack.name for attack in ATTACKS]
TESTS = functions()


def plain(layer: str) -> str:
    return layer.replace("`", "").replace("*", "")


def exists(name: str) -> bool:
    """A probe in quotation marks, or a file or a function in backticks."""
    pattern = name[1:-1].replace("…", "*")
    if name.startswith('"'):
        return any(fnmatchcase(probe, pattern) for probe in PROBES)
    if "/" in pattern:
        return (ROOT / pattern).is_file()
    return any(fnmatchcase(test, pattern) for test in TESTS)


def names(row: Row) -> list[str]:
    return re.findall(r'"[^"]+"|`[^`]+`', row.tests)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: plain(row.layer)[:40])
def test_every_layer_names_what_attacks_it_and_that_exists(row: Row) -> None:
    assert names(row), row.layer
    assert [name for name in names(row) if not exists(name)] == []


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.id)
def test_every_probe_is_named_by_the_row_of_its_layer(attack: Attack) -> None:
    own = [row for row in ROWS if plain(row.layer).startswith(plain(attack.layer))]
    assert own, f"no row of the page begins with {attack.layer!r}"
    patterns = [name[1:-1].replace("…", "*") for row in own for name in names(row) if name.startswith('"')]
    assert any(fnmatchcase(attack.name, pattern) for pattern in patterns), f"{attack.name!r} is not in the row of {own[0].layer!r}"


def test_names_of_probes_are_unique_and_so_are_their_ids() -> None:
    assert len(set(PROBES)) == len({attack.id for attack in ATTACKS}) == len(ATTACKS)
