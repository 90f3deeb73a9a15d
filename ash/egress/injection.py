"""Puts the secrets of credentials into the head of a request, in place of what the agent's tools sent. Pure.

Only the header that a credential is bound to is touched, and in it nothing of the agent's own is let through.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable
from typing import NamedTuple

from ash.config import Secret
from ash.egress.rules import parse_host, parse_rule, shown
from ash.errors import EgressRefused

VALUE = "{value}"
"""What a template has in the secret's place."""
Header = tuple[bytes, bytes]
HTTPS = 443
_BASIC = "basic "


def _never() -> bool:
    return False


class BoundCredential(NamedTuple):
    """A credential for one host and one header of one session.

    With a `template` the header is always set. Without one the agent's tools send the placeholder, alone or in a longer value.
    """

    id: str
    host: str
    """`api.example.com`, or with a port of its own `api.example.com:8443`."""
    header: str
    template: str | None
    placeholder: str
    variable: str | None
    secret: Secret
    is_revoked: Callable[[], bool] = _never

    @property
    def rule(self) -> str:
        """The host as a rule of egress: with its own port alone."""
        host, port = split_host(self.host)
        return shown(parse_host(host), port)


def split_host(text: str) -> tuple[str, int]:
    """Host and port of a credential's host, 443 where none is given. Raises ValueError that says what to write."""
    rule = parse_rule(text)
    host = rule.name if rule.network is None else str(rule.network.network_address)
    if host is None or rule.has_subdomains or (rule.network is not None and rule.network.num_addresses > 1):
        raise ValueError(f"{text!r:.80}: a credential is for one host; name it in full, like api.example.com")
    if not rule.names_ports:
        return host, HTTPS
    if rule.ports is None:
        raise ValueError(f"{text!r:.80}: a credential is for one port")
    return host, next(iter(rule.ports))


def inject(headers: Iterable[Header], credentials: Iterable[BoundCredential]) -> list[Header]:
    """The headers as they go to the host. Raises EgressRefused."""
    found = list(headers)
    for credential in credentials:
        if credential.is_revoked():
            raise EgressRefused(f"the credential for {credential.host} was deleted", reason="credential_deleted")
        found = _set(found, credential) if credential.template is not None else _swap(found, credential)
    return found


def _set(headers: list[Header], credential: BoundCredential) -> list[Header]:
    name = credential.header.encode()
    return [*(header for header in headers if not _is(header, name)), (name, render(credential.template or VALUE, credential.secret))]


def _swap(headers: list[Header], credential: BoundCredential) -> list[Header]:
    name = credential.header.encode()
    return [(header[0], _swapped(header[1], credential)) if _is(header, name) else header for header in headers]


def _is(header: Header, name: bytes) -> bool:
    return header[0].lower() == name.lower()


def render(template: str, secret: Secret) -> bytes:
    """The header's value. What follows `Basic ` is written as base64, as HTTP wants it."""
    text = template.replace(VALUE, secret.reveal())
    if template.lower().startswith(_BASIC):
        text = text[: len(_BASIC)] + base64.b64encode(text[len(_BASIC) :].encode()).decode()
    return text.encode()


def _swapped(value: bytes, credential: BoundCredential) -> bytes:
    placeholder, secret = credential.placeholder.encode(), credential.secret.reveal().encode()
    if placeholder in value:
        return value.replace(placeholder, secret)
    if value[: len(_BASIC)].lower() == _BASIC.encode():
        try:
            plain = base64.b64decode(value[len(_BASIC) :].strip(), validate=True)
        except binascii.Error:
            plain = b""
        if placeholder in plain:
            return value[: len(_BASIC)] + base64.b64encode(plain.replace(placeholder, secret))
    raise EgressRefused(
        f"the header {credential.header} for {credential.host} holds something else than the session's credential",
        reason="foreign_credential",
        hint=f"Send ${credential.variable} in it, or leave it out.",
    )
