"""Uploads of agents with any paths and contents: refused in words, or whole; and nothing outside, nothing left over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from ash.agents import Agents
from ash.errors import AshError
from ash.paths import Names, clean_path
from ash.store import Store

names = st.sampled_from(
    ["a", "A", "b", "..", ".", "", "é", "e\u0301", ".claude", ".mcp.json", "settings.json", "x\0", "c\\d", "n" * 300, "\ud800"]
)
paths = st.lists(names, min_size=1, max_size=5).map("/".join) | st.text(max_size=30)
contents = st.binary(max_size=60) | st.sampled_from(
    [b"{}", b'{"env": 1}', b'{"permissions": []}', b'{"mcpServers": {"a": 1}}', b"[" * 5000, b"#!x"]
)
uploads = st.lists(st.tuples(paths | st.sampled_from([".claude/settings.json", ".mcp.json", "CLAUDE.md"]), contents), max_size=6)


async def deploy(root: Path, files: list[tuple[str, bytes]]) -> None:
    folder = root / "agents"
    folder.mkdir()
    async with Store(str(root / "ash.db")) as store:
        agents = Agents(store, str(folder), max_bytes=10_000, max_files=20)
        before = sorted(os.listdir(root))
        try:
            with contextlib.suppress(AshError):  # every other exception fails the test
                agent = await agents.deploy("default", "a", files=[("CLAUDE.md", b"x"), *files])
                for path, content in files:
                    assert (folder / agent.digest / clean_path(path)).read_bytes() == content
            assert [name for name in os.listdir(folder) if name.startswith(".")] == []
            assert not any(path.is_symlink() for path in folder.rglob("*"))
            assert {name for name in os.listdir(root) if not name.startswith("ash.db")} == {n for n in before if not n.startswith("ash.db")}
        finally:
            for made in sorted(folder.rglob("*")):
                if made.is_dir():
                    made.chmod(0o755)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(files=uploads)
@example(files=[(".claude/settings.json", b"[" * 100_000)])
@example(files=[(".mcp.json", b'{"a":' * 100_000)])
@example(files=[(".claude/settings.json", b'{"env": {"A": 1e999}}')])
def test_an_upload_is_whole_or_refused(files: list[tuple[str, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as root:
        asyncio.run(deploy(Path(root), files))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(given=st.lists(paths, max_size=8))
def test_paths_that_pass_can_all_be_made_together(given: list[str]) -> None:
    names, passed = Names(), list[str]()
    for path in given:
        with contextlib.suppress(AshError):
            names.add(cleaned := clean_path(path))
            passed.append(cleaned)
    with tempfile.TemporaryDirectory() as root:
        for path in passed:
            target = Path(root, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb"):
                pass
            assert Path(root) in target.resolve().parents
        assert sum(1 for _ in Path(root).rglob("*")) <= names.count
