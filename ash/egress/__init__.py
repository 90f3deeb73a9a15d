"""The egress proxy: what sandboxes may reach beside the models, decided, limited, counted and reported in the server.

The front door of the package. Nothing in it runs inside a sandbox.
"""

from ash.egress.proxy import SOCKET_NAME, Egress, EgressAccess, Interceptor
from ash.egress.rules import EgressPolicy, parse_network, parse_rule

__all__ = ["SOCKET_NAME", "Egress", "EgressAccess", "EgressPolicy", "Interceptor", "parse_network", "parse_rule"]
