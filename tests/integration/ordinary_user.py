"""Run by a test as an ordinary user: attacks a sandbox of a pool of that user's own, and prints what came of it as JSON."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path


async def main(root: str) -> None:
    sys.path.insert(0, root)
    from tests.integration import battlefield
    from tests.sandboxes import open_pool

    battlefield.plant_key()
    with tempfile.TemporaryDirectory(prefix="ash-") as data_dir:
        async with open_pool(data_dir, warm=1) as pool:
            if pool.status().isolation == "unavailable":
                sys.stdout.write(json.dumps({"unavailable": pool.status().warnings[0]}))
                return
            async with battlefield.prepared(pool) as facts:
                results = await battlefield.attack(pool, facts)
                sandbox = await pool.take()
                host_uid = Path(f"/proc/{sandbox.handle.pid}/status").read_text().partition("Uid:")[2].split()[0]
                bomb = await battlefield.fork_bomb(sandbox)
                report = {"attacks": results, "uid": os.getuid(), "host_uid": int(host_uid), "handle_uid": sandbox.handle.uid}
                sys.stdout.write(json.dumps({**report, "bomb": bomb, "limits": pool.status().limits}))


asyncio.run(main(sys.argv[1]))
