"""Which hosts an agent may reach: rules as agents and operators write them, and the decision about one host and port.

Pure; resolves nothing and connects to nothing. Nothing is allowed unless the agent asks for it, the operator allows it and
neither denies it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

WEB_PORTS = frozenset((80, 443))
"""What a rule without a port allows."""
MAX_RULE = 300
MAX_RULES = 1000
"""Of one list of an agent: all of them are looked at for each connection."""
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMERIC = re.compile(r"[0-9]+|0x[0-9a-f]*")
_PORT = re.compile(r"[0-9]{1,5}")
_RULE = re.compile(r"(?P<bracket>\[[^\]]*\])(?P<mask>/[0-9]+)?(?::(?P<port>[^:]*))?|(?P<plain>[^:\[\]]*)(?::(?P<port2>[^:]*))?")


class EgressPolicy(NamedTuple):
    """What the operator lets sandboxes reach, and how much of it. Rules are text that `parse_rule` takes."""

    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    """Wins over everything. A rule without a port is for every port here."""
    allow_private: tuple[str, ...] = ()
    """Networks, such as 10.1.0.0/16, that are reachable although they are private, loopback or otherwise refused."""
    bandwidth_mb_per_second: float = 100.0
    """MiB per second of one session, both directions together; 0 sets no limit. `total_mb` likewise for the sandbox's life."""
    connections: int = 64
    """At once, of one session; `total_connections` of all."""
    total_connections: int = 1024
    total_mb: int = 0
    connect_seconds: float = 10.0
    idle_seconds: float = 300.0
    tunnel_seconds: float = 3600.0


class Rule(NamedTuple):
    """One rule. Exactly one of `name` and `network` is set, or none for `*`."""

    text: str
    name: str | None
    network: Network | None
    has_subdomains: bool
    ports: frozenset[int] | None
    """None means every port."""
    names_ports: bool

    def matches_name(self, host: str) -> bool:
        if self.network is not None:
            return False
        if self.name is None:
            return True
        return host.endswith(f".{self.name}") if self.has_subdomains else host == self.name

    def matches_address(self, address: Address) -> bool:
        return self.network is not None and address in self.network

    def matches(self, host: str | Address) -> bool:
        return self.matches_name(host) if isinstance(host, str) else self.matches_address(host)

    def allows_port(self, port: int) -> bool:
        return self.ports is None or port in self.ports


def parse_rule(text: str) -> Rule:
    """`example.com`, `*.example.com`, `*`, an address or a network, with `:8443` or `:*` behind it.

    Raises ValueError that says what to write.
    """
    match = _RULE.fullmatch(text.strip()) if isinstance(text, str) and len(text) <= MAX_RULE else None
    if match is None:
        raise ValueError(f"{text!r:.80} is not a host; write it like example.com, *.example.com, example.com:8443 or [2001:db8::1]:443")
    port = match["port"] if match["bracket"] else match["port2"]
    ports = _parse_ports(text, port)
    if match["bracket"]:
        network = parse_network(match["bracket"][1:-1] + (match["mask"] or ""))
        return Rule(text, None, network, False, ports, port is not None)
    return _plain_rule(text, match["plain"].strip(), ports, port is not None)


def _plain_rule(text: str, host: str, ports: frozenset[int] | None, names_ports: bool) -> Rule:
    if host == "*":
        return Rule(text, None, None, True, ports, names_ports)
    if "/" in host:
        if "//" in host:
            raise ValueError(f"{text!r:.80}: write the host alone, without http:// and without a path")
        return Rule(text, None, parse_network(host), False, ports, names_ports)
    has_subdomains = host.startswith("*.")
    found = parse_host(host[2:] if has_subdomains else host)
    if isinstance(found, str):
        return Rule(text, found, None, has_subdomains, ports, names_ports)
    if has_subdomains:
        raise ValueError(f"{text!r:.80}: an address has no subdomains; write a network, like 203.0.113.0/24")
    return Rule(text, None, ipaddress.ip_network(found), False, ports, names_ports)


def _parse_ports(text: str, port: str | None) -> frozenset[int] | None:
    if port is None:
        return WEB_PORTS
    if port == "*":
        return None
    try:
        return frozenset((parse_port(port),))
    except ValueError as error:
        raise ValueError(f"{text!r:.80}: the port must be a number from 1 to 65535, or *") from error


def parse_network(text: str) -> Network:
    """An address, or a network such as 10.1.0.0/16. Raises ValueError that says what to write."""
    try:
        return ipaddress.ip_network(text.strip())
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{text!r:.80} is not a network; write it like 10.1.0.0/16 or 2001:db8::/32") from error


def parse_port(text: str) -> int:
    if not _PORT.fullmatch(text) or not 1 <= int(text) <= 65535:
        raise ValueError(f"{text!r:.80} is not a port")
    return int(text)


def parse_host(text: str) -> str | Address:
    """A host's name in lower case without the dot at its end, or an address. Raises ValueError.

    What looks like an IPv4 address is one only as four plain decimal numbers: 127.1, 0x7f.1 or 2130706433, which some
    resolvers take, are refused.
    """
    if ":" in text:
        return _parse_ipv6(text)
    name = text.removesuffix(".")
    if not name.isascii():
        name = _to_ascii(name)
    name = name.lower()
    labels = name.split(".")
    if _NUMERIC.fullmatch(labels[-1]):
        return _parse_ipv4(name)
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError(f"{text!r:.80} is not the name of a host")
    return name


def _parse_ipv4(text: str) -> Address:
    try:
        return ipaddress.IPv4Address(text)
    except ValueError as error:
        raise ValueError(f"{text!r:.80} is not an address; write it as four decimal numbers") from error


def _parse_ipv6(text: str) -> Address:
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError as error:
        raise ValueError(f"{text!r:.80} is not an address") from error
    if address.scope_id is not None:
        raise ValueError(f"{text!r:.80}: an address with a zone is not for other machines")
    return address


def _to_ascii(name: str) -> str:
    import idna  # only for names that need it

    try:
        return idna.encode(name, uts46=True).decode("ascii")
    except idna.IDNAError as error:
        raise ValueError(f"{name!r:.80} is not the name of a host: {error}") from error


def shown(host: str | Address, port: int | None = None) -> str:
    """As people write it: `example.com`, `[2001:db8::1]:443`."""
    text = f"[{host}]" if isinstance(host, ipaddress.IPv6Address) else str(host)
    return text if port is None else f"{text}:{port}"


class Refusal(NamedTuple):
    """Why a connection is not made. `reason` is a fixed word for metrics; `message` and `hint` are for people."""

    reason: str
    message: str
    hint: str


class RuleSet:
    """Rules, parsed once."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._rules = tuple(rules)

    def allows(self, host: str | Address, port: int) -> bool:
        return any(rule.matches(host) and rule.allows_port(port) for rule in self._rules)

    def names(self, host: str | Address) -> bool:
        """Whether a rule is about the host, whatever the port."""
        return any(rule.matches(host) for rule in self._rules)

    def denies(self, host: str | Address, port: int) -> bool:
        return any(rule.matches(host) and (not rule.names_ports or rule.allows_port(port)) for rule in self._rules)


@lru_cache(maxsize=512)
def rule_set(texts: tuple[str, ...]) -> RuleSet:
    """Raises ValueError for a rule that is none."""
    return RuleSet(parse_rule(text) for text in texts)


@lru_cache(maxsize=64)
def networks(texts: tuple[str, ...]) -> tuple[Network, ...]:
    """Raises ValueError for a network that is none."""
    return tuple(parse_network(text) for text in texts)


def find_refusal(
    host: str | Address, port: int, asked: tuple[str, ...], not_wanted: tuple[str, ...], policy: EgressPolicy
) -> Refusal | None:  # fmt: skip
    """Why the rules do not let an agent, which asks for the hosts `asked` without `not_wanted`, reach a host. Resolves nothing."""
    target = shown(host, port)
    if rule_set(policy.deny).denies(host, port):
        return Refusal("denied", f"{target} is denied by the operator's policy", "The operator can take it out of `deny` under [egress].")
    if rule_set(not_wanted).denies(host, port):
        return Refusal("denied", f"{target} is denied by the agent's settings", f"{_AGENT_DENIES} names it.")
    if not rule_set(asked).allows(host, port):
        return _not_allowed(host, port, rule_set(asked), "the agent's settings", f"{_AGENT_ASKS} of the agent, then deploy it again.")
    if not rule_set(policy.allow).allows(host, port):
        return _not_allowed(host, port, rule_set(policy.allow), "the operator's policy", f"{_POLICY_ALLOWS}.")
    return None


_AGENT_ASKS = "sandbox.network.allowedDomains in .claude/settings.json"
_AGENT_DENIES = "sandbox.network.deniedDomains in .claude/settings.json"
_POLICY_ALLOWS = "`allow` under [egress] in the operator's policy.toml"


def _not_allowed(host: str | Address, port: int, rules: RuleSet, owner: str, where: str) -> Refusal:
    reason = "not_asked" if owner.startswith("the agent") else "not_allowed"
    if rules.names(host):
        return Refusal("port", f"port {port} of {shown(host)} is not allowed by {owner}", f'Add "{shown(host, port)}" to {where}')
    entry = shown(host) if port in WEB_PORTS else shown(host, port)
    return Refusal(reason, f"{shown(host, port)} is not allowed by {owner}", f'Add "{entry}" to {where}')


def check_rules(texts: Iterable[object], complain: Callable[[str], Exception]) -> tuple[str, ...]:
    """The rules as text, each checked; raises what `complain` makes of the first problem."""
    found: list[str] = []
    for text in texts:
        try:
            if len(found) >= MAX_RULES:
                raise ValueError(f"there are more than {MAX_RULES} rules; use patterns like *.example.com")
            if not isinstance(text, str):
                raise ValueError(f"{text!r:.80} is not text; put it in quotes")
            found.append(parse_rule(text).text)
        except ValueError as error:
            raise complain(str(error)) from error
    return tuple(found)
