"""The tools an agent has, by name. Their names and inputs are those that existing agent folders and settings expect."""

from __future__ import annotations

from ash.runtime.tools.bash import BASH
from ash.runtime.tools.call import Json, Outcome, Tool, ToolError, Workbench, check
from ash.runtime.tools.edit import EDIT, WRITE
from ash.runtime.tools.read import READ
from ash.runtime.tools.search import GLOB, GREP
from ash.runtime.tools.todo import TODO_WRITE

__all__ = ["TOOLS", "Json", "Outcome", "Tool", "ToolError", "Workbench", "check"]

TOOLS = {tool.name: tool for tool in (BASH, READ, WRITE, EDIT, GLOB, GREP, TODO_WRITE)}
