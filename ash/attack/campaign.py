"""One attack from beginning to end: sets the scene, tries every probe and deed, takes the scene away, and gives the report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence

from ash import __version__
from ash.attack.outside import DEEDS, Deed, Inapplicable
from ash.attack.probes import LIMITED, PROBES, Probe
from ash.attack.report import FAIL, NOT_APPLICABLE, PASS, Report, Result, judge, shorten
from ash.attack.scene import Scene, Target
from ash.errors import AshError, ConnectionFailed
from ash.models import now

Attack = Probe | Deed
ATTACKS: tuple[Attack, ...] = (*PROBES, *DEEDS)


def wage(target: Target, ids: Sequence[str], tell: Callable[[Result], None]) -> Report:
    """Attack the server with those named by `ids`; `tell` hears of each result. Raises AshError when the scene cannot be set."""
    started_at, began = now(), time.monotonic()
    results: list[Result] = []
    with Scene(target) as scene:
        for attack in ATTACKS:
            if attack.id in ids:
                results.append(_timed(scene, attack))
                tell(results[-1])
    return Report(started_at, time.monotonic() - began, __version__, _server(scene), _host(scene), tuple(results), tuple(scene.leftovers))


def _timed(scene: Scene, attack: Attack) -> Result:
    began = time.monotonic()
    verdict, detail = _probe(scene, attack) if isinstance(attack, Probe) else _deed(scene, attack)
    return Result(attack.id, attack.name, attack.layer, verdict, detail, round(time.monotonic() - began, 3))


def _probe(scene: Scene, probe: Probe) -> tuple[str, str]:
    if reason := scene.why_not(probe.facts):
        return NOT_APPLICABLE, reason
    if not probe.is_harmless and scene.health.get("isolation") != "bwrap":
        return NOT_APPLICABLE, "not tried: without a sandbox it would do harm"
    try:
        ran = scene.run(scene.sessions[probe.session], probe.fill(scene.facts))
    except AshError as error:
        # A sandbox that the server ended because it took too much has been stopped. Any other end, the server's own too, shows nothing.
        is_ended = probe.session == LIMITED and not isinstance(error, ConnectionFailed)
        return (PASS, f"the sandbox was ended: {shorten(str(error))}") if is_ended else (FAIL, _unshown(error))
    return judge(ran.exit_code, ran.stdout, ran.stderr)


def _deed(scene: Scene, deed: Deed) -> tuple[str, str]:
    try:
        proof = deed.run(scene)
    except Inapplicable as reason:
        return NOT_APPLICABLE, str(reason)
    except (AshError, OSError) as error:
        return FAIL, _unshown(error)
    return (FAIL, shorten(proof)) if proof else (PASS, "")


def _unshown(error: Exception) -> str:
    return f"it could not be shown that this is stopped: {shorten(str(error))}"


def _server(scene: Scene) -> dict[str, str]:
    health = scene.health
    limits = "; ".join(f"{name}: {text}" for name, text in health.get("limits", {}).items())
    return {
        "url": scene.target.server.url, "version": str(health.get("version", "")), "isolation": str(health.get("isolation", "")),
        "auth": str(health.get("auth", "")), "limits": limits,
    }  # fmt: skip


def _host(scene: Scene) -> dict[str, str]:
    """The kernel as the sandbox sees it, which is the server's, and from where the attack came."""
    if not scene.target.data_dir:
        return {"kernel": scene.kernel, "attacked from": scene.target.why_far}
    return {"kernel": scene.kernel, "attacked from": f"the server's own machine, as uid {os.geteuid()}"}


def explain(ids: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Id, name and layer of each, for a list."""
    yield from ((attack.id, attack.name, attack.layer) for attack in ATTACKS if attack.id in ids)
