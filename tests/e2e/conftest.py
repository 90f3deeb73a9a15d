"""The built file that the end-to-end tests run: built once per run when it is older than its sources."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "dist" / "ash.pyz"


def is_fresh() -> bool:
    if not BUILT.exists():
        return False
    inputs = [ROOT / "build_pyz.py", ROOT / "requirements.lock"]
    inputs += [
        path for top in ("ash", "ash_ai", "bootstrap") for path in (ROOT / top).rglob("*") if path.is_file() and path.suffix != ".pyc"
    ]
    return BUILT.stat().st_mtime > max(path.stat().st_mtime for path in inputs)


@pytest.fixture(scope="session")
def ash_pyz(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """dist/ash.pyz, up to date. What it unpacks goes to a folder of this run, not to the home of whoever tests."""
    if not is_fresh():
        done = subprocess.run(
            [sys.executable, str(ROOT / "build_pyz.py"), "--output", str(BUILT)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASH_CACHE_DIR", str(tmp_path_factory.mktemp("unpacked")))
        yield BUILT
