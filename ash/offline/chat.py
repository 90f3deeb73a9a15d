"""What the offline model says when no tool is needed: greetings, what it remembers, prepared explanations, sums. Pure.

Never pretends to know more than it does: what no rule fits is answered with what it can do.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable

from ash.offline.conversation import Conversation
from ash.offline.knowledge import TOPICS, Topic, find_topic

NOTICE = (
    "(This is Ash's built-in offline demo model, not a real AI model: it has a few prepared answers and can use the tools. "
    "For a real model, set ANTHROPIC_API_KEY and start the server again.)"
)
ABILITIES = """\
- use tools: "run `ls`", "write hello to notes.txt", "read notes.txt", "list files", "find *.py", "search for TODO", \
"replace hello with goodbye in notes.txt", "todo: plan, build, test"; join several with "and then", or end with "at the same time"
- remember this conversation: "my name is Ada", "what is my name?", "what did I say before?"
- explain a few things: closures, promises, let and const, generics, interfaces, the event loop; then "explain it with an example"
- small sums: "what is 17 * 23?"; and "count to 20", "say hello" """
_QUOTE_CHARS = 400
_MAX_COUNT = 500
_READ_CHARS = 4000


def quote(text: str, limit: int = _QUOTE_CHARS) -> str:
    text = text.strip()
    return f"“{text}”" if len(text) <= limit else f"“{text[:limit].rstrip()}…”"


def respond(conversation: Conversation) -> str:
    """The answer to the last prompt, in words."""
    for pattern, rule in _RULES:
        match = pattern.search(conversation.prompt[:_READ_CHARS])
        answer = rule(conversation, match) if match else None
        if answer:
            return answer
    return _unknown(conversation)


def _unknown(conversation: Conversation) -> str:
    seen = f" I cannot look at what you attached ({conversation.attachments})." if conversation.attachments else ""
    asked = f"You said: {quote(conversation.prompt)}. " if conversation.prompt else ""
    return f"{asked}I have no prepared answer for that.{seen} Without a real model behind me, this is what I can do:\n\n{ABILITIES.strip()}"


def _greet(conversation: Conversation, match: re.Match[str]) -> str:
    name = _name(conversation.prompts)
    return f"Hello{', ' + name if name else ''}! What can I do for you? Ask “what can you do?” for a list."


def _abilities(conversation: Conversation, match: re.Match[str]) -> str:
    return f"I am Ash's offline demo model. I can:\n\n{ABILITIES.strip()}"


def _identity(conversation: Conversation, match: re.Match[str]) -> str:
    role = _role(conversation.system)
    told = f" My instructions begin: {quote(role)}" if role else " I was given no instructions of my own."
    return f"I am the offline demo model that is built into Ash.{told}"


def _role(system: str) -> str:
    """The sentence of the system prompt that says who the model is to be, else its first line."""
    found = re.search(r"\bYou are\b[^\n]*", system)
    lines = [line.strip("# ").strip() for line in system.splitlines() if line.strip("# ").strip()]
    return found.group().strip() if found else (lines[0] if lines else "")


def _instructions(conversation: Conversation, match: re.Match[str]) -> str:
    if not conversation.system:
        return "I was given no system prompt."
    return f"My system prompt says:\n\n{quote(conversation.system, 1200)}"


def _tools(conversation: Conversation, match: re.Match[str]) -> str:
    if not conversation.tools:
        return "I was offered no tools in this request."
    return "I have these tools: " + ", ".join(f"`{name}`" for name in conversation.tools) + "."


def _name(prompts: list[str]) -> str:
    found = [match.group(1) for prompt in prompts for match in [_NAME.search(prompt)] if match]
    return found[-1].strip() if found else ""


_NAME = re.compile(r"\b(?:[Mm]y name(?: is|'s)|[Cc]all me|I(?: am|'m) called)\s+([A-Z][\w'-]*(?:\s+[A-Z][\w'-]*)*|\w[\w'-]*)")


def _ask_name(conversation: Conversation, match: re.Match[str]) -> str:
    name = _name(conversation.prompts[:-1])
    return f"Your name is {name}." if name else "You have not told me your name in this conversation."


def _tell_name(conversation: Conversation, match: re.Match[str]) -> str:
    return f"Nice to meet you, {_name(conversation.prompts)}. I will remember that in this conversation."


def _previous(conversation: Conversation, match: re.Match[str]) -> str:
    if len(conversation.prompts) < 2:
        return "This is the first thing you say in this conversation."
    return f"Before this you said: {quote(conversation.prompts[-2])}"


def _first(conversation: Conversation, match: re.Match[str]) -> str:
    if len(conversation.prompts) < 2:
        return "This is your first message in this conversation."
    return f"Your first message was: {quote(conversation.prompts[0])}"


def _own_answer(conversation: Conversation, match: re.Match[str]) -> str:
    given = [reply for reply in conversation.replies if reply]
    return f"I answered: {quote(given[-1])}" if given else "I have not answered anything yet."


def _recap(conversation: Conversation, match: re.Match[str]) -> str:
    said = conversation.prompts[:-1]
    if not said:
        return "Nothing yet: this is your first message in this conversation."
    lines = "\n".join(f"{number}. {quote(text, 120)}" for number, text in enumerate(said, 1))
    return f"So far you said, in this order:\n\n{lines}"


def _how_many(conversation: Conversation, match: re.Match[str]) -> str:
    sent = len(conversation.prompts)
    return f"You have sent {sent} message{'s' if sent > 1 else ''} in this conversation, this one included."


_REMEMBER = re.compile(r"\b(?:please\s+)?(?:remember|keep in mind|note)(?:\s+that|\s+this)?\s*:?\s+(.+)", re.IGNORECASE | re.DOTALL)


def _noted(prompts: list[str]) -> list[str]:
    return [match.group(1).strip(" .!") for prompt in prompts if "?" not in prompt for match in [_REMEMBER.search(prompt)] if match]


def _remember(conversation: Conversation, match: re.Match[str]) -> str | None:
    noted = _noted(conversation.prompts[-1:])
    return f"I will remember it in this conversation: {quote(noted[0])}" if noted else None


def _recall(conversation: Conversation, match: re.Match[str]) -> str:
    noted = _noted(conversation.prompts[:-1])
    if not noted:
        return "You have not asked me to remember anything in this conversation."
    return "You asked me to remember: " + "; ".join(quote(note) for note in noted)


_FACT = re.compile(r"\b[Mm]y ([\w' -]{2,40}?) (?:is|are|was) ([^.?!\n]+)")


def _ask_fact(conversation: Conversation, match: re.Match[str]) -> str | None:
    """Answers "what is my X?" from an earlier "my X is Y", and "what is the X?" from a note that names X."""
    owner, thing = match.group(1).lower(), match.group(2).strip().lower()
    facts = {fact.group(1).lower(): fact.group(2).strip() for prompt in conversation.prompts[:-1] for fact in _FACT.finditer(prompt)}
    if owner == "my" and thing in facts:
        return f"Your {thing} is {facts[thing]}."
    noted = [note for note in _noted(conversation.prompts[:-1]) if thing in note.lower()]
    if noted:
        return f"You asked me to remember: {quote(noted[-1])}"
    return f"You have not told me your {thing} in this conversation." if owner == "my" else None


def _tell_fact(conversation: Conversation, match: re.Match[str]) -> str | None:
    if conversation.prompt.rstrip().endswith("?"):
        return None
    return f"Noted: your {match.group(1).lower()} is {match.group(2).strip()}. I will remember that in this conversation."


def _explain(conversation: Conversation, match: re.Match[str]) -> str | None:
    topic = find_topic(conversation.prompt)
    if topic is None:
        return None
    return topic.example if _EXAMPLE.search(conversation.prompt) else topic.explanation


def _example(conversation: Conversation, match: re.Match[str]) -> str | None:
    """An example for what was talked about last."""
    earlier = (find_topic(prompt) for prompt in reversed(conversation.prompts[:-1]))
    topic: Topic | None = next((found for found in earlier if found), None)
    if topic is None:
        return None
    return topic.example if topic.example not in "\n".join(conversation.replies) else topic.explanation


def _topics(conversation: Conversation, match: re.Match[str]) -> str:
    return "I can explain: " + ", ".join(topic.name for topic in TOPICS) + "."


def _say(conversation: Conversation, match: re.Match[str]) -> str:
    text = match.group(1).strip()
    return text[1:-1] if len(text) > 1 and text[0] + text[-1] in ('""', "''", "``", "“”") else text


def _count(conversation: Conversation, match: re.Match[str]) -> str:
    last = min(int(match.group(1)), _MAX_COUNT)
    return ", ".join(str(number) for number in range(1, last + 1)) + "."


_OPERATORS: dict[type[ast.AST], Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Mod: operator.mod, ast.FloorDiv: operator.floordiv,
}  # fmt: skip


def _sum(conversation: Conversation, match: re.Match[str]) -> str | None:
    text = re.sub(r"(?<=\d)\s*x\s*(?=\d)", "*", match.group(1).strip()).replace(",", "")
    try:
        value = _evaluate(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None
    shown = int(value) if isinstance(value, float) and value.is_integer() else value
    return f"{match.group(1).strip()} = {shown}"


def _evaluate(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    raise ValueError("not a sum")


def _thanks(conversation: Conversation, match: re.Match[str]) -> str:
    return "You are welcome."


def _bye(conversation: Conversation, match: re.Match[str]) -> str:
    return "Goodbye!"


def _rule(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern.replace(" ", r"\s+"), re.IGNORECASE | re.DOTALL)


_EXAMPLE = _rule(r"\bexamples?\b|\bshow me (?:the |some )?code\b")
_RULES: list[tuple[re.Pattern[str], Callable[[Conversation, re.Match[str]], str | None]]] = [
    (_rule(r"\b(?:what(?:'s| is| was) my name|do you (?:know|remember) my name|who am i)\b"), _ask_name),
    (_rule(r"\b(?:my|the) (?:very )?first (?:message|question|prompt|thing)\b|what did i (?:say|ask) first"), _first),
    (_rule(r"\bhow many (?:messages|questions|prompts)\b"), _how_many),
    (_rule(r"\bwhat (?:do you remember|did i (?:ask|tell) you to remember|should you remember)\b"), _recall),
    (_rule(r"\bwhat did you (?:just )?(?:say|answer|reply|tell me)\b|\byour (?:last|previous) (?:answer|reply|message)\b"), _own_answer),
    (
        _rule(
            r"\bwhat (?:did|have) i (?:just )?(?:say|said|ask|asked|tell|told|write|written)\b|"
            r"\bmy (?:last|previous) (?:message|question|prompt)\b"
        ),
        _previous,
    ),
    (
        _rule(
            r"\b(?:summari[sz]e|recap|repeat) (?:our|this|the) (?:conversation|chat|discussion)|"
            r"\bwhat have we (?:talked|discussed|said|done)"
        ),
        _recap,
    ),
    (
        _rule(
            r"^\W*(?:please )?(?:say|repeat(?: after me)?|echo|(?:reply|respond|answer)(?: only| exactly| just)? with)"
            r"(?: exactly| only| just)?\s*:?\s+(.+?)\s*$"
        ),
        _say,
    ),
    (_rule(r"\bcount (?:up )?(?:from (?:1|one) )?to (\d{1,6})\b"), _count),
    (_rule(r"(?:what(?:'s| is)|calculate|compute|how much is)\s+([-\d(][-\d\s.,+*/%()x]*[\d)])\s*[?.=]*$"), _sum),
    (_rule(r"^\s*([-\d(][-\d\s.,+*/%()x]*[-+*/%x][-\d\s.,+*/%()x]*[\d)])\s*[?=]*\s*$"), _sum),
    (_rule(r"."), _explain),
    (_EXAMPLE, _example),
    (_rule(r"\b(?:what tools|which tools|list your tools|your tools)\b"), _tools),
    (_rule(r"\b(?:system prompt|your instructions|your prompt|claude\.md)\b|\bwhat (?:were|are) you told\b"), _instructions),
    (
        _rule(r"\bwho (?:are you|you are)\b|\bwhat are you\b|\bintroduce yourself\b|\bare you (?:claude|real|an? )|\bwh(?:ich|at) model\b"),
        _identity,
    ),
    (_rule(r"\bwhat (?:else )?can you do\b|\bwhat do you know\b|^\W*help\b|\bhow can you help\b|\byour abilities\b"), _abilities),
    (_rule(r"\bwhat(?:'s| is| was| are) (my|the) ([\w' -]{2,40}?)(?: i told you)?(?: again)?\s*\?*\s*$"), _ask_fact),
    (_NAME, _tell_name),
    (_REMEMBER, _remember),
    (_FACT, _tell_fact),
    (_rule(r"^\W*(?:hi|hello|hey|good (?:morning|afternoon|evening|day)|greetings|howdy)\b"), _greet),
    (_rule(r"^\W*(?:thanks|thank you|thx|great|perfect|nice|cool)\b"), _thanks),
    (_rule(r"^\W*(?:bye|goodbye|see you|good night)\b"), _bye),
    (_rule(r"\bexplain\b"), _topics),
]  # fmt: skip
