"""A small real HTTP server with the API's shapes, for tests of the client and the command line. It plays a script, no agent.

Each turn plays `server.script`. `server.cuts` says after how many bytes-on-the-wire frames the next streams break off, one
entry a connection; -1 breaks before the answer begins, and "lost" drops the request before the turn starts.
"""

from __future__ import annotations

import base64
import json
import ssl
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Json = dict[str, Any]
Script = list[tuple[str, Json]]


def assistant(text: str, *blocks: Json) -> tuple[str, Json]:
    return "message", {"type": "assistant", "message": {"role": "assistant", "content": [{"type": "text", "text": text}, *blocks]}}


def delta(text: str) -> tuple[str, Json]:
    return "text_delta", {"delta": text}


def result(text: str, **fields: Any) -> tuple[str, Json]:
    shown = {"type": "result", "subtype": "success", "is_error": False, "num_turns": 1, "result": text, "usage": {"output_tokens": 3}}
    return "message", {**shown, **fields}


def turn(*events: tuple[str, Json], status: str = "completed") -> Script:
    return [("session_start", {"sessionId": "?", "turnId": "?"}), *events, ("done", {"sessionId": "?", "turnId": "?", "status": status})]


HELLO = turn(assistant("Hello, Ada."), ("turn_complete", {"numTurns": 1, "result": "Hello, Ada."}), result("Hello, Ada."))


class StubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.script: Script = HELLO
        self.cuts: list[int | str] = []
        self.refusals: dict[str, tuple[int, Json]] = {}
        self.overloads: list[int] = []
        """So many requests to come are answered 429, with these seconds in Retry-After."""
        self.key = ""
        self.provider = "anthropic"
        self.requests: list[tuple[str, str, Json, dict[str, str]]] = []
        self.agents: dict[str, Json] = {}
        self.credentials: dict[str, Json] = {}
        self.sessions: dict[str, Json] = {}
        self.logs: dict[str, Script] = {}
        self.files: dict[str, bytes] = {}
        self.archive = b""
        self.exec_result: Json = {"exitCode": 0, "stdout": "", "stderr": "", "timedOut": False, "truncated": False}
        self.interrupted = threading.Event()
        self.hold: threading.Event | None = None
        """When set, a turn waits before its last event until this happens."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is part of the tests."""

    def posts(self, ending: str) -> list[Json]:
        return [body for method, path, body, _ in self.requests if method == "POST" and path.endswith(ending)]

    def session(self, agent: str) -> Json:
        id = str(uuid.uuid4())
        self.logs[id] = []
        self.sessions[id] = {
            "id": id, "agentName": agent, "status": "active", "createdAt": "2026-01-01T00:00:00.000Z", "model": None,
            "config": {}, "sandboxId": id, "lastActiveAt": "2026-01-01T00:00:00.000Z", "turn": None,
        }  # fmt: skip
        return self.sessions[id]


class Handler(BaseHTTPRequestHandler):
    server: StubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        pass

    def handle_any(self) -> None:
        split = urlsplit(self.path)
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.raw = raw
        body = json.loads(raw) if raw and self.headers.get("Content-Type") == "application/json" else {}
        self.query = {name: values[-1] for name, values in parse_qs(split.query).items()}
        self.server.requests.append((self.command, split.path, body, dict(self.headers)))
        if self.server.key and split.path != "/health" and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            return self.answer({"error": "Missing Authorization header", "hint": "send a key"}, 401)
        if self.server.overloads:
            return self.refuse_overloaded(self.server.overloads.pop(0))
        if split.path in self.server.refusals:
            status, answer = self.server.refusals[split.path]
            return self.answer(answer, status)
        return self.route([part for part in split.path.removeprefix("/api").split("/") if part], body)

    do_GET = do_POST = do_DELETE = do_PATCH = handle_any

    def route(self, parts: list[str], body: Json) -> None:
        name = f"{self.command} {parts[0]}" + (f" {parts[2]}" if len(parts) > 2 else " one" if len(parts) > 1 else "")
        handler = getattr(self, name.lower().replace(" ", "_").replace("-", "_"), None)
        if len(parts) > 1 and parts[0] == "sessions" and parts[1] not in self.server.sessions:
            return self.answer({"error": "Session not found", "statusCode": 404}, 404)
        if handler is None:
            return self.answer({"error": f"no route {self.command} {self.path}"}, 404)
        handler(*parts[1:2], body)
        return None

    def refuse_overloaded(self, seconds: int) -> None:
        content = json.dumps({"error": "The server is short of memory", "code": "overloaded", "statusCode": 429}).encode()
        self.send_response(429)
        self.send_header("Retry-After", str(seconds))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def answer(self, value: Json, status: int = 200) -> None:
        raw = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def get_health(self, _body: Json) -> None:
        model = {"provider": self.server.provider, "notice": "No provider is configured: the offline demo model answers."}
        self.answer({"status": "ok", "version": "0.0-stub", "uptime": 5, "activeSessions": 1, "activeSandboxes": 1, "model": model})

    def post_agents(self, body: Json) -> None:
        old = self.server.agents.get(body["name"], {"version": 0})
        files = {file["path"]: base64.b64decode(file["content"], validate=True) for file in body["files"]}
        agent = {"id": str(uuid.uuid4()), "name": body["name"], "version": old["version"] + 1, "createdAt": "", "updatedAt": ""}
        self.server.agents[body["name"]] = {**agent, "files": files, "env": body.get("env")}
        ignored = sorted({f"{path.rpartition('/')[0]}/" for path in files if path.startswith(".claude/")})
        shown = {**agent, "env": dict.fromkeys(body.get("env") or {}, "***"), "config": {"ignored": ignored} if ignored else None}
        self.answer({"agent": shown}, 201)

    def get_agents(self, _body: Json) -> None:
        shown = [{key: value for key, value in agent.items() if key not in ("files", "env")} for agent in self.server.agents.values()]
        self.answer({"agents": shown})

    def get_agents_one(self, name: str, _body: Json) -> None:
        self.get_agents_named(name)

    def get_agents_named(self, name: str) -> None:
        agent = self.server.agents.get(name)
        if agent is None:
            return self.answer({"error": "Agent not found", "statusCode": 404, "code": "agent_not_found"}, 404)
        return self.answer({"agent": {key: value for key, value in agent.items() if key not in ("files", "env")}})

    def delete_agents_one(self, name: str, _body: Json) -> None:
        self.server.agents.pop(name)
        self.answer({"ok": True})

    def post_sessions(self, body: Json) -> None:
        if body["agent"] not in self.server.agents:
            return self.answer({"error": f'Agent "{body["agent"]}" not found', "code": "agent_not_found"}, 404)
        return self.answer({"session": self.server.session(body["agent"])}, 201)

    def get_sessions(self, _body: Json) -> None:
        rows = list(reversed(self.server.sessions.values()))
        self.answer({"sessions": rows[: int(self.query.get("limit", 100))], "total": len(rows)})

    def get_sessions_one(self, id: str, _body: Json) -> None:
        self.answer({"session": self.server.sessions[id]})

    def change(self, id: str, status: str) -> None:
        self.server.sessions[id]["status"] = status
        self.answer({"session": self.server.sessions[id]})

    def delete_sessions_one(self, id: str, _body: Json) -> None:
        self.change(id, "ended")

    def post_sessions_pause(self, id: str, _body: Json) -> None:
        self.change(id, "paused")

    def post_sessions_resume(self, id: str, _body: Json) -> None:
        self.change(id, "active")

    def post_sessions_stop(self, id: str, _body: Json) -> None:
        self.change(id, "stopped")

    def post_sessions_fork(self, id: str, _body: Json) -> None:
        fork = self.server.session(self.server.sessions[id]["agentName"])
        fork.update(status="paused", parentSessionId=id)
        self.answer({"session": fork}, 201)

    def patch_sessions_config(self, id: str, body: Json) -> None:
        self.server.sessions[id]["model"] = body.get("model")
        self.answer({"session": self.server.sessions[id]})

    def post_sessions_interrupt(self, _id: str, _body: Json) -> None:
        self.server.interrupted.set()
        self.answer({"interrupted": True})

    def post_sessions_exec(self, _id: str, _body: Json) -> None:
        self.answer(self.server.exec_result)

    def get_sessions_logs(self, _id: str, _body: Json) -> None:
        self.answer({"logs": [{"index": 0, "level": "stderr", "text": "one line", "ts": ""}], "source": "sandbox"})

    def get_sessions_files(self, _id: str, _body: Json) -> None:
        path = unquote(urlsplit(self.path).path.partition("/files")[2]).removeprefix("/")
        if not path:
            moment = "2026-01-01T00:00:00.000Z"
            rows = [{"path": name, "size": len(content), "modifiedAt": moment} for name, content in self.server.files.items()]
            return self.answer({"files": rows, "source": "sandbox", **({"truncated": True} if self.query else {})})
        if path not in self.server.files:
            return self.answer({"error": f"File not found: {path}", "statusCode": 404, "code": "not_found"}, 404)
        return self.answer_bytes(self.server.files[path])

    def get_sessions_workspace(self, _id: str, _body: Json) -> None:
        self.answer_bytes(self.server.archive)

    def post_sessions_workspace(self, _id: str, _body: Json) -> None:
        self.server.archive = self.raw
        self.answer({"message": "Workspace restored", "files": 2})

    def answer_bytes(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def get_sessions_messages(self, id: str, _body: Json) -> None:
        rows: list[Json] = []
        after = int(self.query.get("after", 0))
        for name, data in self.server.logs[id]:
            if name == "session_start" or data.get("type") in ("assistant", "result"):
                role = "user" if name == "session_start" else "assistant"
                content = {"type": "user", "content": data["content"]} if role == "user" else data
                rows.append({"id": str(uuid.uuid4()), "role": role, "sequence": len(rows) + 1, "content": json.dumps(content)})
        self.answer({"messages": rows[after:][: int(self.query.get("limit", 100))]})

    def get_sessions_events(self, _id: str, _body: Json) -> None:
        self.answer({"events": [{"id": str(uuid.uuid4()), "type": "text", "sequence": 3, "data": '{"text":"hi"}', "createdAt": ""}]})

    def get_api_keys(self, _body: Json) -> None:
        self.answer({"keys": [{"id": "1", "label": "first", "keyPrefix": "••••"}]})

    def post_api_keys(self, _body: Json) -> None:
        self.answer({"id": "2", "key": "ash_secret"}, 201)

    def delete_api_keys_one(self, _id: str, _body: Json) -> None:
        self.answer({"ok": True})

    def post_credentials(self, body: Json) -> None:
        made = {"id": str(uuid.uuid4()), "active": True, "createdAt": "", **{key: body[key] for key in body if key != "key"}}
        self.server.credentials[made["id"]] = made
        self.answer({"credential": made}, 201)

    def get_credentials(self, _body: Json) -> None:
        self.answer({"credentials": list(self.server.credentials.values())})

    def delete_credentials_one(self, id: str, _body: Json) -> None:
        if self.server.credentials.pop(id, None) is None:
            return self.answer({"error": "Credential not found", "statusCode": 404, "code": "credential_not_found"}, 404)
        return self.answer({"ok": True})

    # Streams

    def post_sessions_messages(self, id: str, body: Json) -> None:
        cut = self.server.cuts.pop(0) if self.server.cuts else None
        after = self.headers.get("Last-Event-ID")
        if cut == "lost":
            return self.hang_up()
        if after is None:
            log = self.server.logs[id]
            start = len(log)
            log += [(name, {**data, "content": body["content"]} if name == "session_start" else data) for name, data in self.server.script]
        else:
            start = int(after)
            if cut is None and start >= len(self.server.logs[id]):
                return self.answer_nothing()
        return self.play(id, start, cut, ends_with_turn=True)

    def get_sessions_stream(self, id: str, _body: Json) -> None:
        cut = self.server.cuts.pop(0) if self.server.cuts else None
        after = int(self.query.get("after", 0))
        if cut is None and after >= len(self.server.logs[id]) and self.server.sessions[id]["status"] == "ended":
            return self.answer_nothing()
        return self.play(id, after, cut, ends_with_turn=False)

    def answer_nothing(self) -> None:
        self.send_response(204)
        self.end_headers()

    def play(self, id: str, start: int, cut: int | str | None, *, ends_with_turn: bool) -> None:
        if cut == -1:
            return self.hang_up()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for position, (name, data) in enumerate(self.server.logs[id][start:]):
            if position == cut:
                return self.hang_up()
            if self.server.hold is not None and name == "done":
                self.server.hold.wait(5)
            self.chunk(f"id: {start + position + 1}\nevent: {name}\ndata: {json.dumps(data)}\n\n")
            if name == "done" and ends_with_turn:
                break
        self.wfile.write(b"0\r\n\r\n")
        return None

    def chunk(self, text: str) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(text.encode()), text.encode()))

    def hang_up(self) -> None:
        self.close_connection = True


@contextmanager
def stub_server(tls: ssl.SSLContext | None = None) -> Iterator[StubServer]:
    server = StubServer()
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
