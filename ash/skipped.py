"""Which files and folders of an agent folder stay out of a deployment, however it is read. It looks at names and at no disk."""

from __future__ import annotations

_FOLDERS = frozenset(("node_modules", ".git", "__pycache__", ".cache", ".npm", ".pnpm-store", ".yarn", ".venv", "venv", ".tmp", "tmp"))
_FILES = frozenset((".DS_Store",))
_ENDINGS = (".env", ".env.local", ".sock", ".pid", ".lock")


def is_skipped(name: str, *, is_folder: bool) -> bool:
    """Whether a folder or file of this name stays out when an agent is read from a disk, by the server or for an upload."""
    return name in _FOLDERS if is_folder else name in _FILES or name.endswith(_ENDINGS)
