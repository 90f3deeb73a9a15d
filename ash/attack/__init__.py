"""Attacks on the installation itself: what somebody hostile tries from inside a sandbox and over HTTP, and a report of what held.

`probes` is the one table, which the project's own tests use as well; `run` carries it out on a live server.
"""
