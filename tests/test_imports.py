"""Who may import whom, and what must stay light: the layers of the design, checked on the source and on real imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ash

ROOT = Path(ash.__file__).parent

LEAVES = {"errors", "config", "models", "dialect", "protocol", "sse", "tasks", "skipped", "notify", "beneath", "paths"}
EDGES = {"store", "sql", "sandbox", "isolation", "bridge", "runtime", "client", "remote"}
CORE = {
    "agents", "sessions", "turns", "events", "gateway", "providers", "offline", "keys", "egress", "policy", "limits", "credentials",
    "workspaces",
}  # fmt: skip
FRONT = {"web", "routes", "peer", "auth"}
ENTRY = {"__main__", "cli", "cache", "attack"}

# A package and its front door may see each other; beyond that an edge sees only leaves.
NEIGHBOURS = {
    "sandbox": {"isolation"},
    "isolation": {"sandbox"},
    "bridge": {"runtime"},
    "runtime": {"bridge"},
    "store": {"sql"},
    "client": {"remote"},
}
ALLOWED = {
    **dict.fromkeys(LEAVES, LEAVES),
    **{name: LEAVES | NEIGHBOURS.get(name, set()) for name in EDGES},
    **{name: LEAVES | {"store", "sandbox"} | CORE for name in CORE},
    **{name: LEAVES | {"store", "sandbox"} | CORE | FRONT for name in FRONT},
    **dict.fromkeys(ENTRY, LEAVES | EDGES | CORE | FRONT | ENTRY),
}


def modules() -> list[str]:
    names = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def imported(name: str) -> set[str]:
    path = ROOT.parent / Path(*name.split("."))
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update([node.module] if node.module != "ash" else [f"ash.{alias.name}" for alias in node.names])
    return {found_name for found_name in found if found_name.startswith("ash.")}


@pytest.mark.parametrize("name", [name for name in modules() if name != "ash"])
def test_a_module_imports_only_what_its_layer_may(name: str) -> None:
    own = name.split(".")[1]
    seen = {target.split(".")[1] for target in imported(name)} - {own, "__version__"}
    assert seen <= ALLOWED[own], f"{name} imports {sorted(seen - ALLOWED[own])}"


@pytest.mark.parametrize("name", modules())
def test_a_module_can_be_imported_alone_without_a_warning(name: str) -> None:
    if name == "ash.__main__":
        name = "ash.cli"
    done = subprocess.run([sys.executable, "-W", "error", "-c", f"import {name}"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", ["import ash.bridge", "import ash.client, ash_ai", "import ash.__main__"])
def test_the_light_parts_load_no_third_party_module(code: str) -> None:
    script = f"{code}\nimport sys\nprint([m for m in sys.modules if 'site-packages' in str(getattr(sys.modules[m], '__file__', ''))])"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT.parent)!r}); {script}"],
                          capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
