"""Stands in the tunnels to the hosts of a session's credentials and puts the secrets in, so that its tools use what they cannot read.

TLS ends here, under an authority that only this session trusts, and begins anew towards the host, whose certificate is verified as
always. All other hosts stay closed tunnels. No secret goes to any other host, into a log or into an answer of ours.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress

from ash.egress import authority
from ash.egress.authority import Authority
from ash.egress.exchange import Exchange
from ash.egress.injection import BoundCredential, split_host
from ash.egress.tls import TlsStream
from ash.errors import Timeout, UpstreamError
from ash.tasks import Tasks

__all__ = ["CA_VARIABLES", "BoundCredential", "Interceptor"]

log = logging.getLogger(__name__)

CA_FILE = "ca.pem"
CA_PATH = f"/run/ash/{CA_FILE}"
"""As the tools see it."""
CA_VARIABLES = (
    "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO", "PIP_CERT", "UV_SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS",
    "npm_config_cafile", "YARN_HTTPS_CA_FILE_PATH", "AWS_CA_BUNDLE", "DENO_CERT", "CARGO_HTTP_CAINFO", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
)  # fmt: skip
"""Each is read by some tool that knows no other."""
HANDSHAKE_SECONDS = 15.0

Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Awaitable[Pair]]


class Interceptor:
    """That of one session in one sandbox. `folder` is shown to the sandbox, read-only."""

    def __init__(self, session_id: str, credentials: Iterable[BoundCredential], folder: str, upstream_ca: str = "") -> None:
        self._session_id, self._folder, self._upstream_ca = session_id, folder, upstream_ca
        self._credentials: defaultdict[tuple[str, int], tuple[BoundCredential, ...]] = defaultdict(tuple)
        for credential in credentials:
            self._credentials[split_host(credential.host)] += (credential,)
        self._authority: Authority | None = None
        self._opening = asyncio.Lock()

    def covers(self, host: str, port: int) -> bool:
        return (_plain(host), port) in self._credentials

    def environment(self) -> dict[str, str]:
        """The variables that the session's tools need: whom to trust, and the placeholders."""
        bound = [credential for credentials in self._credentials.values() for credential in credentials]
        placeholders = {credential.variable: credential.placeholder for credential in bound if credential.variable}
        return {**dict.fromkeys(CA_VARIABLES, CA_PATH), **placeholders}

    def succeed(self, previous: Interceptor) -> None:
        """Go on with the authority of the one before: what the tools of this sandbox have loaded must stay good."""
        before = previous._authority
        if before is not None and before.hosts >= self._hosts:
            self._authority = before

    @property
    def _hosts(self) -> frozenset[str]:
        return frozenset(host for host, _ in self._credentials)

    async def open(self) -> None:
        """Have the file ready by which the tools trust the authority. To be awaited before the first of them starts."""
        _ = await self._opened()

    async def _opened(self) -> Authority:
        async with self._opening:
            if self._authority is None:
                made = await asyncio.to_thread(Authority, self._hosts)
                await asyncio.to_thread(authority.write_bundle, os.path.join(self._folder, CA_FILE), made.pem)
                self._authority = made
            return self._authority

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int, connect: Connect) -> None:
        """Speak with the program inside, who was told that the tunnel is open, and with the host. Closes both connections."""
        host = _plain(host)
        writer.transport.resume_reading()  # type: ignore[attr-defined]  # it may have been paused for us
        context = await asyncio.to_thread((await self._opened()).context, host)
        streams = [TlsStream(reader, writer, context, server_side=True)]

        async def open_host() -> TlsStream:
            streams.append(await self._open_host(host, port, connect))
            return streams[-1]

        async with Tasks() as tasks:
            try:
                await streams[0].handshake(HANDSHAKE_SECONDS)
                with suppress(OSError):  # the program inside has left
                    await Exchange(streams[0], host, port, self._credentials[host, port], open_host, tasks).run()
            except (OSError, TimeoutError) as error:
                reason = getattr(error, "reason", None) or "the connection ended"
                log.info("session %s: a program inside did not agree on TLS for %s: %s", self._session_id, host, reason)
            finally:
                await tasks.cancel()
                await asyncio.gather(*(stream.close() for stream in streams))

    async def _open_host(self, host: str, port: int, connect: Connect) -> TlsStream:
        """Raises UpstreamError, Timeout, and what `connect` raises."""
        context = await asyncio.to_thread(authority.upstream_context, self._upstream_ca)
        stream = TlsStream(*await connect(), context, server_side=False, host=host)
        try:
            await stream.handshake(HANDSHAKE_SECONDS)
        except BaseException as error:  # whatever went wrong, the connection goes
            stream.abort()
            if isinstance(error, TimeoutError):
                raise Timeout(f"{host}:{port} did not agree on TLS within {HANDSHAKE_SECONDS:g} s") from error
            if isinstance(error, OSError):
                raise UpstreamError(f"{host}:{port} cannot be trusted or does not speak TLS: {_reason(error)}") from error
            raise
        return stream


def _plain(host: str) -> str:
    return host.strip("[]").lower().removesuffix(".")


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid ({error.verify_message})"
    return str(getattr(error, "reason", None) or error.strerror or "the connection ended")
