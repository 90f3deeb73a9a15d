"""The parts of a running server that handlers call, and where a request finds them. It makes none of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from aiohttp import web

if TYPE_CHECKING:
    from ash.agents import Agents
    from ash.config import Config
    from ash.credentials import Credentials
    from ash.egress import Egress
    from ash.events import EventLog
    from ash.gateway import Gateway
    from ash.keys import Keys
    from ash.policy import Policies
    from ash.sandbox import Sandboxes
    from ash.sessions import Sessions
    from ash.store import Store
    from ash.workspaces import Workspaces


class Parts(NamedTuple):
    config: Config
    store: Store
    log: EventLog
    keys: Keys
    agents: Agents
    gateway: Gateway
    egress: Egress
    sandboxes: Sandboxes
    sessions: Sessions
    workspaces: Workspaces
    policies: Policies
    credentials: Credentials
    started: float
    """time.monotonic() of the start."""


PARTS: web.AppKey[Parts] = web.AppKey("parts", Parts)


def parts(request: web.Request) -> Parts:
    return request.app[PARTS]
