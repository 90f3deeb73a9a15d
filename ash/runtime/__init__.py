"""The inside of the bridge: agent loop, model client, tools, permissions, processes. Used by `ash.bridge` alone.

Standard library only, threads, and nothing imported before it is needed: one of these runs per live session.
"""
