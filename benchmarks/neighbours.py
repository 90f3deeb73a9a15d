"""Measures what one session's turns take while another one does its worst, on a built ash.pyz, and prints a table.

    python -m benchmarks.neighbours [--pyz dist/ash.pyz] [--turns 40]

Each bomb runs in a session of its own, by way of a command, against the limits given to the server: memory, processes, disk, CPU. What
holds it is whatever this host offers; the head of the table says what that is. The model is the offline one, so that no figure contains
a model's time. Loopback only; the server, its folder and its sandboxes are removed.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import shutil
import signal
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.bench import ROOT, SCRIPT, Server, clock, deploy

MEMORY_MB, PROCESSES, DISK_MB = 512, 64, 256
ENDED = 128 + signal.SIGTERM
SECONDS = 20
"""What a bomb gets before its command is ended."""
_EAT = "import time\nheld=[]\ntry:\n while True: held.append(b'x' * (1 << 20))\nexcept MemoryError: pass\ntime.sleep(60)"
_FORK = "import os, time\nwhile True:\n try: os.fork()\n except OSError: time.sleep(0.01)"
BOMBS = {
    "nobody": "",
    "CPU: 8 endless loops": "for i in 1 2 3 4 5 6 7 8; do while :; do :; done & done; wait",
    "memory: 4 processes that take all they get": f'for i in 1 2 3 4; do python3 -c "{_EAT}" & done; wait',
    "processes: a fork bomb": f'python3 -c "{_FORK}"',
    "disk: zeros without end": "dd if=/dev/zero of=/workspace/big bs=1M; sleep 60",
    "files: empty ones without end": "i=0; while :; do i=$((i+1)); : > /workspace/f$i || sleep 1; done",
}


def measure(server: Server, session: str, turns: int) -> list[float]:
    """Milliseconds of so many turns, one after the other on one connection."""
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        return [clock(lambda: server.whole_turn(session, link)) for _ in range(turns)]
    finally:
        link.close()


class Bomb:
    """A session whose command does its worst until the block ends. `outcome` says what came of it."""

    def __init__(self, server: Server, command: str) -> None:
        self._server, self._command = server, command
        self._session = server.create() if command else ""
        self._thread = threading.Thread(target=self._run)
        self.outcome = "went on until it was ended"

    def __enter__(self) -> Bomb:
        if self._command:
            self._thread.start()
            time.sleep(2.0)  # it needs a while to become a nuisance; what it does before is not measured
        return self

    def _run(self) -> None:
        link = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=SECONDS + 30)
        body = json.dumps({"command": self._command, "timeout": SECONDS * 1000})
        try:
            link.request("POST", f"/api/sessions/{self._session}/exec", body, {"Content-Type": "application/json"})
            self.outcome = _describe(json.loads(link.getresponse().read()))
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.outcome = f"lost: {error}"
        finally:
            link.close()

    def __exit__(self, *_: object) -> None:
        if self._command:
            self._server.call("DELETE", f"/api/sessions/{self._session}")
            self._thread.join(SECONDS + 30)


def _describe(answer: dict[str, Any]) -> str:
    if "error" in answer:
        return str(answer["error"])[:90]
    said = [line.strip() for line in str(answer.get("stderr", "")).splitlines() if line.strip()]
    last = f"; it said: {said[-1][:70]}" if said else ""
    ended = answer.get("timedOut") or answer.get("exitCode") == ENDED
    return ("went on until it was ended" if ended else f"exit code {answer.get('exitCode')}") + last


def row(name: str, samples: list[float], alone: float, outcome: str) -> str:
    ordered = sorted(samples)
    middle, slow = statistics.median(ordered), ordered[int((len(ordered) - 1) * 0.95)]
    return f"| {name} | {middle:.1f} ms | {middle / alone:.1f} times | {slow:.1f} ms | {ordered[-1]:.1f} ms | {outcome} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--pyz", type=Path, default=ROOT / "dist" / "ash.pyz")
    parser.add_argument("--turns", type=int, default=40)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ash-neighbours-"))
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "ASH_CACHE_DIR": str(folder / "cache")}
    script = folder / "script.json"
    script.write_text(json.dumps(SCRIPT))
    limits = ("--memory-mb", MEMORY_MB, "--max-processes", PROCESSES, "--disk-mb", DISK_MB, "--max-files", 20000)
    try:
        with Server(options.pyz, folder, env, "--model", "offline", "--offline-script", str(script), *map(str, limits)) as server:
            deploy(server)
            health = server.call("GET", "/health")
            held = "; ".join(f"{name}: {how}" for name, how in health["limits"].items())
            print(f"{os.cpu_count()} cores, Linux {platform.release()}. {held}\n")  # noqa: T201 - a program's output
            print("| beside it | a turn, p50 | to alone | p95 | longest | what became of it |\n|---|---|---|---|---|---|")  # noqa: T201
            session, alone = server.create(), 0.0
            measure(server, session, 10)
            for name, command in BOMBS.items():
                with Bomb(server, command) as bomb:
                    samples = measure(server, session, options.turns)
                alone = alone or statistics.median(samples)
                print(row(name, samples, alone, bomb.outcome if command else ""), flush=True)  # noqa: T201
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
