"""The agent loop of one turn: ask the model, run its tool calls, ask again, until it is done, fails or is interrupted.

Leaves the conversation in a form that the next turn can go on from, whatever happened. A tool only runs after its whole
message has arrived, so trying a model call again repeats no tool call.
"""

from __future__ import annotations

import json
import os
import re
import time
import traceback
from typing import Any, Protocol

from ash.runtime import messages, model, reply, request
from ash.runtime.calls import Calls
from ash.runtime.conversation import Conversation, new_uuid
from ash.runtime.interrupt import Interrupt, Interrupted
from ash.runtime.messages import End
from ash.runtime.model import ModelError
from ash.runtime.reply import Reply
from ash.runtime.transcript import INTERRUPTED, has_media, repair, without_media, without_results

Json = dict[str, Any]
MAX_RETRIES = 3
_MAX_CUT_REPLIES = 3
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 8.0
_TOO_LARGE = (400, 413)
_TOO_LONG = re.compile(r"too (?:long|large|many tokens)|context|exceed|maximum", re.IGNORECASE)
_NOT_RUN = "The call was not run: the reply it was part of was cut off ({reason}). Send it again, in smaller parts if it is long."
_CONTEXT_FULL = "The conversation no longer fits into the model's context window. Start a new session."
_REFUSED = "The model declined to answer this message. Put it differently, or start a new session."


class Emit(Protocol):
    def __call__(self, name: str, **fields: Any) -> None: ...


class Turn:
    """One turn. `run` is its thread; `interrupt` may be set from any other."""

    def __init__(self, conversation: Conversation, turn_id: str, content: str | list[Json], options: Json, emit: Emit) -> None:
        self.id = turn_id
        self.interrupt = Interrupt()
        self.is_over = False
        self._conversation = conversation
        self._content, self._options, self._emit = content, options, emit
        self._model = str(conversation.option(options, "model") or "")
        self._started = time.monotonic()
        self._before = len(conversation.transcript)
        self._asked, self._cut_replies = 0, 0
        self._api_seconds = 0.0
        self._usage: Json = {}
        self._denials: list[Json] = []
        reply.add_usage(self._usage, {})

    def run(self) -> None:
        """The whole turn, from the user's message to `done`. Never raises."""
        status, error = "failed", "the turn ended unexpectedly"
        try:
            status, error = self._run()
        except Exception as fault:  # noqa: BLE001 - the edge of a turn: it must end in `done`, and the bridge must live
            error = f"internal error of the bridge: {type(fault).__name__}: {fault}"
            self._emit("log", level="system", text=traceback.format_exc())
            del self._conversation.transcript[self._before :]  # what the bridge stumbled over once it would meet again
        self.is_over = True  # before `done`, which the server may answer with the next turn at once
        if status == "failed":
            self._emit("error", turn_id=self.id, error=error)
        self._emit("done", turn_id=self.id, status=status, **({"error": error} if status == "failed" else {}))

    def _run(self) -> tuple[str, str]:
        conversation = self._conversation
        conversation.transcript.append({"role": "user", "content": self._content})
        self._permissions = conversation.permissions(self._options)
        self._system, self._tools = conversation.system(self._permissions), conversation.tools(self._permissions)
        status, error = "completed", ""
        try:
            self._announce()
            end = self._loop()
        except Interrupted:
            status, end = "interrupted", End("error_during_execution", INTERRUPTED, is_error=True)
            self._note_interruption()
        except ModelError as failure:
            status, error = "failed", str(failure)
            end = End("error_during_execution", error, is_error=True)
            self._forget_refused(failure)
        finally:
            conversation.transcript = repair(conversation.transcript)
        self._conclude(end)
        return status, error

    # The loop

    def _loop(self) -> End:
        limit = self._options.get("maxTurns")
        while True:
            if limit and self._asked >= limit:
                return End("error_max_turns", f"The turn was ended after {limit} model calls (maxTurns).", is_error=True)
            answer = self._ask()
            end = self._take(answer.build(), answer.cut_calls)
            if end is not None:
                return end

    def _take(self, message: Json, cut: set[str]) -> End | None:
        """Record a whole assistant message and run its calls. None when the model must be asked again."""
        stop = message.get("stop_reason")
        reply.add_usage(self._usage, message.get("usage") or {})
        self._send(messages.assistant(message))
        transcript = self._conversation.transcript
        if stop == "refusal":
            # What was refused would be refused again with every later message, so the model no longer sees this turn.
            del transcript[self._before :]
            return End("success", _refusal_text(message), is_error=True, stop_reason=stop)
        transcript.append({"role": "assistant", "content": message["content"]})
        uses = reply.calls(message)
        if uses:
            return self._handle_calls(uses, cut, stop)
        if stop == "pause_turn":
            return None
        if stop == "model_context_window_exceeded":
            return End("error_during_execution", _CONTEXT_FULL, is_error=True, stop_reason=stop)
        return End("success", reply.text(message), stop_reason=stop)

    def _handle_calls(self, uses: list[Json], cut: set[str], stop: str | None) -> End | None:
        if stop not in ("max_tokens", "model_context_window_exceeded"):
            self._run_calls(uses, cut)
            return None
        # The last call of a reply that was cut off may be half a call that only looks whole.
        text = _NOT_RUN.format(reason=stop)
        results = [{"type": "tool_result", "tool_use_id": use["id"], "content": text, "is_error": True} for use in uses]
        self._send_results(uses, results, {"error": text})
        self._cut_replies += 1
        if stop == "max_tokens" and self._cut_replies <= _MAX_CUT_REPLIES:
            return None
        return End("error_during_execution", _CONTEXT_FULL if stop != "max_tokens" else text, is_error=True, stop_reason=stop)

    def _run_calls(self, uses: list[Json], cut: set[str]) -> None:
        calls = Calls(self._conversation.bench, self._permissions, self.interrupt, uses, cut)
        calls.run(self._report_progress)
        self._denials += calls.denials
        for fault in calls.faults:
            self._emit("log", level="system", text=fault)
        self._send_results(uses, calls.results(), calls.detail())
        self.interrupt.check()

    def _send_results(self, uses: list[Json], results: list[Json], detail: Json) -> None:
        self._conversation.transcript.append({"role": "user", "content": results})
        self._send(messages.tool_results(uses, results, detail))

    # The model

    def _ask(self) -> Reply:
        self._asked += 1
        attempt = 0
        while True:
            self.interrupt.check()
            answer, started = Reply(), time.monotonic()
            try:
                self._stream(answer)
            except ModelError as failure:
                attempt += 1
                if not failure.retryable or attempt > MAX_RETRIES:
                    raise
                self._wait_for_retry(failure, attempt)
            except Interrupted:
                self._keep_partial(answer)
                raise
            else:
                return answer
            finally:
                self._api_seconds += time.monotonic() - started

    def _stream(self, answer: Reply) -> None:
        body = request.build(self._model, self._system, self._tools, self._conversation.transcript, self._options)
        betas = [str(beta) for beta in self._conversation.options.get("betas") or []]
        wants_partials = bool(self._options.get("includePartialMessages"))
        for event in model.stream(self._conversation.paths.gateway, body, betas, self.interrupt):
            answer.add(event)
            if wants_partials and event.get("type") != "ping":
                self._send(messages.stream_event(event), as_="delta")

    def _wait_for_retry(self, failure: ModelError, attempt: int) -> None:
        jitter = 0.75 + os.urandom(1)[0] / 1024
        delay = min(_FIRST_DELAY * 2 ** (attempt - 1), _LONGEST_DELAY) * jitter if failure.delay is None else failure.delay
        self._send(messages.api_retry(failure, attempt, MAX_RETRIES, delay))
        self.interrupt.pause(delay)

    # What is left behind

    def _keep_partial(self, answer: Reply) -> None:
        """Text that the user has seen stays in the conversation; half a thought or half a call does not."""
        message = answer.build()
        reply.add_usage(self._usage, message.get("usage") or {})
        message["content"] = [block for block in message["content"] if block.get("type") == "text" and block.get("text")]
        if message["content"]:
            self._send(messages.assistant(message))
            self._conversation.transcript.append({"role": "assistant", "content": message["content"]})

    def _note_interruption(self) -> None:
        message = messages.user([{"type": "text", "text": INTERRUPTED}])
        self._conversation.transcript.append(message["message"])
        self._send(message)

    def _forget_refused(self, failure: ModelError) -> None:
        """A request that the provider calls wrong would stay wrong with every later message: take out what it added last."""
        transcript = self._conversation.transcript
        if failure.status not in _TOO_LARGE:
            return
        turn = transcript[self._before :]
        if len(turn) == 1:
            transcript.pop()
            return
        is_too_long = failure.status == 413 or _TOO_LONG.search(str(failure)) is not None
        if turn and has_media(turn[-1]) and not is_too_long:
            transcript[-1] = without_media(turn[-1])
            return
        shortened = [without_results(without_media(message)) for message in turn]
        # Where the results are not what made it too long, nothing of the turn may stay.
        transcript[self._before :] = shortened if is_too_long and _size(shortened) <= _size(turn) / 2 else []

    # Messages

    def _send(self, data: Json, as_: str = "message") -> None:
        self._emit(as_, turn_id=self.id, data={**data, "session_id": self._conversation.session_id, "uuid": new_uuid()})

    def _announce(self) -> None:
        conversation = self._conversation
        if conversation.settings.problem:
            self._emit("log", level="system", text=f"no tool may run: {conversation.settings.problem}")
        if self._options.get("maxBudgetUsd") is not None:
            text = "maxBudgetUsd is not enforced by the bridge: it does not know the model's prices, and total_cost_usd stays 0"
            self._emit("log", level="system", text=text)
        names = [tool["name"] for tool in self._tools]
        self._send(messages.init(conversation.paths.workspace, names, self._model, self._permissions.mode))

    def _report_progress(self, call: Json, seconds: float) -> None:
        self._send(messages.tool_progress(call, seconds))

    def _conclude(self, end: End) -> None:
        message = messages.result(
            end,
            model=self._model,
            calls=self._asked,
            seconds=time.monotonic() - self._started,
            api_seconds=self._api_seconds,
            usage=self._usage,
            denials=self._denials,
        )
        self._send({**message, **self._structured(end)})

    def _structured(self, end: End) -> Json:
        """With an output format, the answer as the value that it is."""
        if end.is_error or not isinstance(self._options.get("outputFormat"), dict):
            return {}
        try:
            return {"structured_output": json.loads(end.text)}
        except ValueError:
            return {}


def _size(messages_: list[Json]) -> int:
    return len(json.dumps(messages_))


def _refusal_text(message: Json) -> str:
    details = message.get("stop_details")
    explanation = details.get("explanation") if isinstance(details, dict) else None
    return f"{_REFUSED} {explanation}" if explanation else _REFUSED
