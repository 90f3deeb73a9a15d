"""/api/policy: the operator's policy as it is in force, and where each part of it comes from. It changes nothing."""

from __future__ import annotations

import os

from aiohttp import web

from ash import limits
from ash.auth import GUARD
from ash.models import Json
from ash.routes.parts import Parts, parts


async def get(request: web.Request) -> web.Response:
    here = parts(request)
    # Paths of the server's machine are for its own user; others see names only.
    sees_paths = request.app[GUARD].is_direct(request)
    return web.json_response({"policy": describe(here, sees_paths), "problem": _problem(here, sees_paths)})


def _problem(here: Parts, sees_paths: bool) -> str | None:
    problem = here.policies.problem
    return (problem if sees_paths else problem.replace(here.policies.path, os.path.basename(here.policies.path))) or None


def describe(here: Parts, sees_paths: bool) -> Json:
    policy = here.policies.current
    shown = policy.describe(limits.of_server(here.config))
    if not sees_paths:
        shown["source"] = os.path.basename(policy.source)
        shown["mounts"] = [{"target": mount.target} for mount in policy.mounts]
    return shown


ROUTES = (web.get("/api/policy", get),)
