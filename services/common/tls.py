"""Mutual TLS between the services: a certificate, its key and an authority, from PEM files that may change.

Whoever shows a certificate that the authority signed is let in; so the authority signs for this deployment alone.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import grpc
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509 import Certificate, load_pem_x509_certificates

from services.common.lifecycle import StartupError
from services.common.settings import ServiceSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: the service's certificate with its intermediates, its key, and the authorities that it trusts."""

    cert: Path
    key: Path
    ca: Path


@dataclass(frozen=True)
class Identity:
    """What the files held at one moment, checked; `expires` is the end of the certificate's time."""

    cert: bytes
    key: bytes = field(repr=False)
    ca: bytes
    expires: datetime


class Expiring(Protocol):
    """What is made of certificate files."""

    @property
    def expires(self) -> datetime: ...


E = TypeVar("E", bound=Expiring)


class Renewed(Generic[E]):
    """The newest good state of certificate files that may change at any time. Any thread may call it.

    A bad set of files, also one that is caught half written, is logged once and the last good one stays.
    read: the content of the files. check: what is made of a content that has changed.

    Raises:
        StartupError: the files cannot be used, as read or check says.
    """

    def __init__(self, read: Callable[[], tuple[bytes, ...]], check: Callable[[tuple[bytes, ...]], E]) -> None:
        self._read = read
        self._check = check
        self._lock = threading.Lock()
        self._content = read()
        self._good = check(self._content)
        self._complaint = ""

    def newest(self) -> E:
        """Reads the files."""
        with self._lock:
            try:
                content = self._read()
                if content != self._content:
                    self._good = self._check(content)
                    self._content = content
                    log.info("new certificates", extra={"expires": self._good.expires.isoformat()})
                self._complaint = ""
            except StartupError as error:
                if str(error) != self._complaint:
                    self._complaint = str(error)
                    log.error("new certificates refused; the old ones stay", extra={"reason": self._complaint})
            return self._good


class Tls:
    """Credentials of one service for both ends of its connections. Any thread may call it.

    The files are read again for each handshake, so that a new certificate needs no restart (see Renewed). Open
    connections stay as they are.

    server_name: the name that servers' certificates must carry, where it is not the host that was asked for.

    Raises:
        StartupError: the files cannot be used.
    """

    def __init__(self, files: TlsFiles, server_name: str = "") -> None:
        self.files = files
        self.server_name = server_name
        self._identity = Renewed(lambda: _read_identity(files), lambda content: _checked_identity(files, *content))

    @property
    def identity(self) -> Identity:
        """The newest good one."""
        return self._identity.newest()

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a port: every handshake uses the newest identity and asks the client for a certificate."""
        return grpc.dynamic_ssl_server_credentials(
            _configuration(self.identity), lambda: _configuration(self.identity), require_client_authentication=True
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For a channel, which keeps the identity of the moment for all its connections."""
        identity = self.identity
        return grpc.ssl_channel_credentials(identity.ca, identity.key, identity.cert)


INSECURE = None
"""Neither encryption nor a check of who the other side is."""

Security = Tls | None


def security_of(settings: ServiceSettings, server_name: str = "") -> Security:
    """What the settings ask for; StartupError when the files cannot be used."""
    if settings.tls_cert is None or settings.tls_key is None or settings.tls_ca is None:
        return INSECURE  # the settings have checked that it was asked for
    return Tls(TlsFiles(settings.tls_cert, settings.tls_key, settings.tls_ca), server_name)


def _read_identity(files: TlsFiles) -> tuple[bytes, ...]:
    return (*read_pair("tls", files.cert, files.key), _read("--tls-ca", files.ca))


def _checked_identity(files: TlsFiles, cert: bytes, key: bytes, ca: bytes) -> Identity:
    _certificates("--tls-ca", files.ca, ca)
    return Identity(cert, key, ca, check_pair("tls", files.cert, cert, files.key, key).not_valid_after_utc)


def read_pair(use: str, cert: Path, key: Path) -> tuple[bytes, bytes]:
    """A certificate and its key. use: the prefix of their flags. StartupError names the file that is unreadable."""
    return _read(f"--{use}-cert", cert), _read(f"--{use}-key", key)


def check_pair(use: str, cert: Path, cert_pem: bytes, key: Path, key_pem: bytes) -> Certificate:
    """The first certificate; StartupError names the file that is no PEM, out of its time or another's key."""
    leaf = _certificates(f"--{use}-cert", cert, cert_pem)[0]
    now = datetime.now(UTC)
    if now >= leaf.not_valid_after_utc:
        raise StartupError(f"--{use}-cert {cert}: expired at {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; renew it")
    if now < leaf.not_valid_before_utc:
        raise StartupError(
            f"--{use}-cert {cert}: not valid before {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; it is now "
            f"{now:%Y-%m-%d %H:%M} UTC by this machine's clock"
        )
    try:
        private = load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        reason = str(error).partition(". ")[0].replace("\n", " ")
        raise StartupError(f"--{use}-key {key}: not an unencrypted private key in PEM: {reason}") from None
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    if private.public_key().public_bytes(*form) != leaf.public_key().public_bytes(*form):
        raise StartupError(f"--{use}-key {key}: not the key of the certificate {cert}; give the pair")
    return leaf


def _configuration(identity: Identity) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(identity.key, identity.cert)], identity.ca)


def _read(flag: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartupError(f"{flag} {path}: cannot read it: {error.strerror}") from None


def _certificates(flag: str, path: Path, content: bytes) -> list[Certificate]:
    try:
        return load_pem_x509_certificates(content)
    except ValueError as error:
        reason = str(error).partition(". ")[0].replace("\n", " ")
        raise StartupError(f"{flag} {path}: not a certificate in PEM: {reason}") from None
