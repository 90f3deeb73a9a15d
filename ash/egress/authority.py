"""The certificate authority of one session: its tools trust it, and it vouches for the hosts of the session's credentials alone.

Keys live in this process's memory, never in a file, and never enter a sandbox. Everything here that makes or reads something
blocks, and the first use loads a large library: callers use a thread.
"""

from __future__ import annotations

import ipaddress
import os
import ssl
import tempfile
import threading
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ash.errors import ConfigError

if TYPE_CHECKING:
    from cryptography import x509

AUTHORITY_DAYS = 30
LEAF_DAYS = 2
_RENEW_BEFORE = timedelta(days=1)
_CLOCK_SKEW = timedelta(hours=1)
_SYSTEM_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem", "/etc/ssl/cert.pem",
)  # fmt: skip


class Authority:
    """Makes server certificates for `hosts` and for nothing else: it could not if it wanted, its own certificate says so."""

    def __init__(self, hosts: Iterable[str]) -> None:
        from cryptography.hazmat.primitives.asymmetric import ec

        self.hosts = frozenset(hosts)
        self._key, self._leaf_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        self._certificate = self._make_own()
        self._contexts: dict[str, tuple[datetime, ssl.SSLContext]] = {}
        self._lock = threading.Lock()

    @property
    def pem(self) -> bytes:
        """Its certificate, for those who are to trust it."""
        return _pem(self._certificate)

    def context(self, host: str) -> ssl.SSLContext:
        """What speaks TLS as `host`. Kept as long as its certificate is good."""
        if host not in self.hosts:
            raise ValueError(f"this authority does not vouch for {host}")
        with self._lock:
            end, context = self._contexts.get(host, (datetime.min.replace(tzinfo=UTC), None))
            if context is None or end - _RENEW_BEFORE < datetime.now(UTC):
                end, context = self._make_context(host)
                self._contexts[host] = (end, context)
            return context

    def _make_context(self, host: str) -> tuple[datetime, ssl.SSLContext]:
        leaf = self._make_leaf(host)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        _load_chain(context, _private_pem(self._leaf_key) + _pem(leaf) + self.pem)
        return leaf.not_valid_after_utc, context

    def _make_own(self) -> x509.Certificate:
        from cryptography import x509

        usage = x509.KeyUsage(
            digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
            key_cert_sign=True, crl_sign=False, encipher_only=False, decipher_only=False,
        )  # fmt: skip
        name = _name("Ash session authority")
        return (
            _builder(name, name, self._key.public_key(), AUTHORITY_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .add_extension(_constraints(self.hosts), critical=True)
            .sign(self._key, _hash())
        )

    def _make_leaf(self, host: str) -> x509.Certificate:
        from cryptography import x509
        from cryptography.x509.oid import ExtendedKeyUsageOID

        public = self._leaf_key.public_key()
        return (
            _builder(_name("Ash egress"), self._certificate.subject, public, LEAF_DAYS)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([_general_name(host)]), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, _hash())
        )


def _builder(subject: x509.Name, issuer: x509.Name, public_key: Any, days: int) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
    )


def _name(text: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _hash() -> Any:
    from cryptography.hazmat.primitives import hashes

    return hashes.SHA256()


def _general_name(host: str) -> x509.GeneralName:
    from cryptography import x509

    address = _find_address(host)
    return x509.DNSName(host) if address is None else x509.IPAddress(address)


def _find_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with suppress(ValueError):
        return ipaddress.ip_address(host)
    return None


def _constraints(hosts: Iterable[str]) -> x509.NameConstraints:
    """Names and addresses are constrained each by itself: a kind of which there is none has to be excluded."""
    from cryptography import x509

    addresses = [address for host in hosts if (address := _find_address(host)) is not None]
    names = [host for host in hosts if _find_address(host) is None]
    permitted: list[x509.GeneralName] = [x509.DNSName(name) for name in names or ["ash.invalid"]]
    permitted += [x509.IPAddress(ipaddress.ip_network(address)) for address in addresses]
    everything = [x509.IPAddress(ipaddress.ip_network(network)) for network in ("0.0.0.0/0", "::/0")]
    return x509.NameConstraints(permitted, None if addresses else everything)


def _pem(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _private_pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    plain = serialization.NoEncryption()
    return bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))


def _load_chain(context: ssl.SSLContext, pem: bytes) -> None:
    """`ssl` takes keys from a file only; this one is memory, without a name, and gone when it is closed."""
    fd = os.memfd_create("leaf", os.MFD_CLOEXEC)
    try:
        os.write(fd, pem)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


# The two sides' trust


@lru_cache(maxsize=4)
def upstream_context(extra_ca: str = "") -> ssl.SSLContext:
    """What verifies the real hosts: the system's authorities, and those of the file `extra_ca`. Raises ConfigError."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if extra_ca:
        try:
            context.load_verify_locations(extra_ca)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"egress_ca_file cannot be used: {error.strerror or error}; give a file with certificates in PEM") from error
    return context


def write_bundle(path: str, own: bytes) -> None:
    """The file that a session's tools trust: what they trusted before, and the session's authority. Appears whole or not at all."""
    fd, fresh = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".ca-")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(_system_bundle() + own)
        os.chmod(fresh, 0o644)  # it is public; the folder around it is what keeps others out
        os.replace(fresh, path)
    except BaseException:
        os.unlink(fresh)
        raise


def _system_bundle() -> bytes:
    paths = ssl.get_default_verify_paths()
    for path in (paths.cafile, paths.openssl_cafile, *_SYSTEM_BUNDLES):
        with suppress(OSError):
            if path:
                with open(path, "rb") as file:
                    return file.read().rstrip(b"\n") + b"\n"
    return b""
