"""The Anthropic API, or any compatible server, with a key or a bearer token: bytes go through unchanged, no SDK needed."""

from __future__ import annotations

import io
import os
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import yarl

from ash import __version__
from ash.config import Secret
from ash.errors import ConfigError, ModelRefused, StreamBroken
from ash.providers import ANTHROPIC_VERSION, Call, Reply, Timing, passed_headers, redact, refused, unreachable
from ash.providers.intake import LARGE_BYTES

DEFAULT_BASE_URL = "https://api.anthropic.com"
_MAX_ERROR_BYTES = 256 * 1024


def open_session(timing: Timing) -> aiohttp.ClientSession:
    """The connections that all direct providers share. Proxies are taken from the usual variables."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=timing.connect, sock_read=timing.idle)
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(timeout=timeout, connector=connector, trust_env=True, cookie_jar=aiohttp.DummyCookieJar())


class Direct:
    """One base URL with one credential. The key takes precedence over the token when both are given."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        base_url: str,
        api_key: Secret | None,
        auth_token: Secret | None,
        *,
        hint: str = "Check ANTHROPIC_API_KEY, or ANTHROPIC_AUTH_TOKEN, and start the server again.",
    ) -> None:
        self._session = session
        self._base = parse_base_url(base_url)
        self._secrets = tuple(secret.reveal() for secret in (api_key, auth_token) if secret)
        self._auth: dict[str, str] = {}
        if api_key:
            self._auth = {"x-api-key": api_key.reveal()}
        elif auth_token:
            self._auth = {"authorization": f"Bearer {auth_token.reveal()}"}
        self._hint = hint

    @asynccontextmanager
    async def send(self, call: Call) -> AsyncIterator[Reply]:
        try:
            response = await self._session.post(self._url(call), data=_sent(call.body), headers=self._headers(call), allow_redirects=False)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise self._unreachable(error) from error
        async with response:
            if response.status != 200:
                raise await self._refused(response)
            headers = {"content-type": response.headers.get("content-type", "application/json"), **passed_headers(response.headers)}
            yield Reply(headers, self._chunks(response))

    async def close(self) -> None:
        """The connections belong to whoever opened the session."""

    def _url(self, call: Call) -> yarl.URL:
        url = self._base.joinpath(*call.path.strip("/").split("/"))
        return url.with_query({"beta": "true"}) if call.is_beta else url

    def _headers(self, call: Call) -> dict[str, str]:
        fixed = {"accept-encoding": "identity", "user-agent": f"ash/{__version__}", **self._auth}
        return {"content-type": "application/json", "anthropic-version": ANTHROPIC_VERSION, **call.headers, **fixed}

    async def _chunks(self, response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
        try:
            async for chunk in response.content.iter_any():
                yield chunk
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            reason = "it sent nothing for too long" if isinstance(error, TimeoutError) else "the connection was lost"
            raise StreamBroken(f"The model provider's answer broke off: {reason}.") from error

    async def _refused(self, response: aiohttp.ClientResponse) -> ModelRefused:
        headers = {name.lower(): value for name, value in response.headers.items()}
        if response.status < 400:
            target = redact(headers.get("location", "nowhere"), self._secrets)
            reason = f"it answered HTTP {response.status} and points to {target}; check the base URL"
            return unreachable(self._where, reason, may_retry=False)
        try:
            body = await response.content.read(_MAX_ERROR_BYTES)
        except (aiohttp.ClientError, TimeoutError, OSError):
            body = b""  # the status says enough
        return refused(response.status, body, headers, secrets=self._secrets, hint=self._hint)

    @property
    def _where(self) -> str:
        return f"{self._base.host}:{self._base.port}" if not self._base.is_default_port() else str(self._base.host)

    def _unreachable(self, error: Exception) -> ModelRefused:
        if isinstance(error, TimeoutError):
            return unreachable(self._where, "timeout", timed_out=True)
        is_final = isinstance(error, (aiohttp.ClientConnectorCertificateError, ssl.SSLCertVerificationError, ValueError))
        reason = redact(_reason(error), self._secrets).rstrip(".")
        return unreachable(self._where, reason, may_retry=not is_final)


def _sent(body: bytes) -> bytes | io.BytesIO:
    """A large body goes out in pieces, between which others get their turn."""
    return io.BytesIO(body) if len(body) > LARGE_BYTES else body


def _reason(error: Exception) -> str:
    """Why a connection failed, without the library's own wording where the system has one."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, OSError) and cause.errno and cause.errno > 0 and not isinstance(cause, ssl.SSLError):
        return os.strerror(cause.errno)
    return str(cause) or type(error).__name__


def parse_base_url(text: str) -> yarl.URL:
    """Raises ConfigError for what is not an http or https address."""
    try:
        url = yarl.URL(text)
    except ValueError as error:
        raise ConfigError(f"ANTHROPIC_BASE_URL={text!r}: not a URL") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"ANTHROPIC_BASE_URL={text!r}: must begin with http:// or https:// and name a host")
    return url.with_query(None).with_fragment(None)


def shown_base_url(text: str) -> str:
    """The base URL without user name and password."""
    return str(parse_base_url(text).with_user(None)).rstrip("/")
