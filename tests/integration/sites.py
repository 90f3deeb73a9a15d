"""What developers fetch things from, on loopback: a package index, an npm registry, a git repository; over HTTP and HTTPS. No fixtures."""

from __future__ import annotations

import base64
import datetime
import hashlib
import http.server
import io
import json
import os
import ssl
import subprocess
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

NAME = "web.test"
ADDRESS = "127.0.0.1"


class Site(NamedTuple):
    """Both servers show the same files; `ca` is the certificate that programs have to trust."""

    http: str
    https: str
    ca: bytes


class Files(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that leaves is not an error of the test."""

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        connection.settimeout(10)
        return connection, address


@contextmanager
def serving(folder: str, files: type[Files] = Files) -> Iterator[Site]:
    certificate, key, ca = _certificates()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pem = Path(folder, ".pem")
    pem.write_bytes(certificate + key)
    context.load_cert_chain(pem)
    pem.unlink()
    with ExitStack() as stack:
        plain, secure = stack.enter_context(_running(folder, files)), stack.enter_context(_running(folder, files, context))
        found = Site(f"http://{NAME}:{plain}", f"https://{NAME}:{secure}", ca)
        _fill(folder, found)
        yield found


@contextmanager
def _running(folder: str, files: type[Files], context: ssl.SSLContext | None = None) -> Iterator[int]:
    def make(*arguments: Any) -> Files:
        return files(*arguments, directory=folder)

    with _Server((ADDRESS, 0), make) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join(5)


def _certificates() -> tuple[bytes, bytes, bytes]:
    """Certificate and key for `NAME`, and the authority that signed it."""
    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    ca = _sign(issuer, issuer, authority, authority, x509.BasicConstraints(ca=True, path_length=0))
    leaf = _sign(subject, issuer, key, authority, x509.BasicConstraints(ca=False, path_length=None))
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return leaf, private, ca


def _sign(subject: x509.Name, issuer: x509.Name, key: Any, authority: Any, constraints: x509.BasicConstraints) -> bytes:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number(),
                                      now - datetime.timedelta(hours=1), now + datetime.timedelta(days=1))  # fmt: skip
    builder = builder.add_extension(constraints, critical=True)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
    return builder.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _fill(folder: str, site: Site) -> None:
    Path(folder, "hello.txt").write_text("hello from outside\n")
    _python_index(Path(folder))
    _npm_registry(Path(folder), site.http, "npm")
    _npm_registry(Path(folder), site.https, "npms")
    _git_repository(folder)


def _python_index(folder: Path) -> None:
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy.py", "VALUE = 42\n")
        archive.writestr("toy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
        archive.writestr("toy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("toy-1.0.dist-info/RECORD", "toy.py,,\n")
    name = "toy-1.0-py3-none-any.whl"
    project = folder / "simple" / "toy"
    project.mkdir(parents=True)
    (project / name).write_bytes(wheel.getvalue())
    (project / "index.html").write_text(f'<!DOCTYPE html><a href="{name}">{name}</a>')


def _npm_registry(folder: Path, base: str, name: str) -> None:
    package = io.BytesIO()
    files = {"package/package.json": '{"name": "toy", "version": "1.0.0", "main": "index.js"}', "package/index.js": "module.exports = 42\n"}
    with tarfile.open(fileobj=package, mode="w:gz") as archive:
        for path, text in files.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    registry = folder / name
    registry.mkdir()
    (registry / "toy.tgz").write_bytes(package.getvalue())
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(package.getvalue()).digest()).decode()
    version = {"name": "toy", "version": "1.0.0", "dist": {"tarball": f"{base}/{name}/toy.tgz", "integrity": integrity}}
    (registry / "toy").write_text(json.dumps({"name": "toy", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}}))


def _git_repository(folder: str) -> None:
    """Served as plain files, which is enough for a clone."""
    environ = {"PATH": os.defpath, "HOME": folder, "GIT_CONFIG_NOSYSTEM": "1", "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@a.test",
               "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@a.test"}  # fmt: skip
    for command in ("git init -q work", "git -C work commit -q --allow-empty -m first", "git clone -q --bare work toy.git",
                    "git -C toy.git update-server-info"):  # fmt: skip
        subprocess.run(command.split(), cwd=folder, env=environ, check=True, capture_output=True)
