"""What build_pyz.py writes into ash.pyz as `_ash.table`."""

from typing import Any

MIN_GLIBC: tuple[int, int]
GROUPS: dict[str, dict[str, Any]]
