"""The authority of a session: good for its hosts, worthless for every other, and nowhere on the disk."""

from __future__ import annotations

import ssl
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ash.egress.authority import Authority, upstream_context, write_bundle
from ash.errors import ConfigError


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> None:
    """A handshake in memory. Raises SSLCertVerificationError as the client would."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(to_client, to_server, server_hostname=host), server.wrap_bio(to_server, to_client, server_side=True)]
    for _ in range(10):
        for end in list(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            ends.remove(end)
    assert ends == []


def trusting(pem: bytes) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=pem.decode())


@pytest.mark.parametrize("host", ["api.test", "127.0.0.1", "::1"])
def test_whoever_trusts_it_trusts_its_hosts(host: str) -> None:
    made = Authority([host, "other.test"])
    shake_hands(made.context(host), trusting(made.pem), host)


@pytest.mark.parametrize("hosts", [["api.test"], ["10.0.0.1"], ["api.test", "10.0.0.1"]])
@pytest.mark.parametrize("victim", ["bank.test", "api.test.evil", "192.0.2.7", "2001:db8::7"])
def test_a_stolen_authority_is_of_no_use_for_other_hosts(hosts: list[str], victim: str) -> None:
    made = Authority(hosts)
    with pytest.raises(ValueError, match="does not vouch"):
        made.context(victim)
    _, forged = made._make_context(victim)
    with pytest.raises(ssl.SSLCertVerificationError, match=r"permitted subtree|excluded subtree"):
        shake_hands(forged, trusting(made.pem), victim)


def test_it_cannot_make_further_authorities() -> None:
    from cryptography import x509

    own = x509.load_pem_x509_certificate(Authority(["api.test"]).pem)
    constraints = own.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)
    assert own.extensions.get_extension_for_class(x509.NameConstraints).critical


def test_a_certificate_is_kept_while_it_is_good_and_renewed_before_it_ends() -> None:
    made = Authority(["api.test"])
    first = made.context("api.test")
    assert made.context("api.test") is first
    made._contexts["api.test"] = (datetime.now(UTC), first)
    assert made.context("api.test") is not first


def test_the_bundle_holds_what_was_trusted_before_and_no_key(tmp_path: Path) -> None:
    made = Authority(["api.test"])
    _ = made.context("api.test")
    write_bundle(str(tmp_path / "ca.pem"), made.pem)
    [file] = tmp_path.iterdir()
    text = file.read_text()
    assert text.endswith(made.pem.decode())
    assert "PRIVATE" not in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    paths = ssl.get_default_verify_paths()
    if paths.cafile:
        assert text.startswith(Path(paths.cafile).read_text().rstrip())


def test_a_file_of_private_authorities_that_is_none_is_told(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    with pytest.raises(ConfigError, match="egress_ca_file"):
        upstream_context(str(file))
    file.write_text("not a certificate")
    with pytest.raises(ConfigError, match="PEM"):
        upstream_context(str(file))
