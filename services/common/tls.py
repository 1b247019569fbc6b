"""Mutual TLS between the services: a certificate, its key and an authority, from PEM files that may change.

Whoever shows a certificate that the authority signed is let in; so the authority signs for this deployment alone.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

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


class Tls:
    """Credentials of one service for both ends of its connections. Any thread may call it.

    The files are read again for each handshake, so that a new certificate needs no restart. A bad set of files, also
    one that is caught half written, is logged once and the last good one stays. Open connections stay as they are.

    server_name: the name that servers' certificates must carry, where it is not the host that was asked for.

    Raises:
        StartupError: the files cannot be used.
    """

    def __init__(self, files: TlsFiles, server_name: str = "") -> None:
        self.files = files
        self.server_name = server_name
        self._lock = threading.Lock()
        self._identity = read_identity(files)
        self._complaint = ""

    @property
    def identity(self) -> Identity:
        """The newest good one."""
        with self._lock:
            try:
                identity = read_identity(self.files)
            except StartupError as error:
                if str(error) != self._complaint:
                    self._complaint = str(error)
                    log.error("new certificates refused; the old ones stay", extra={"reason": self._complaint})
                return self._identity
            self._complaint = ""
            if identity != self._identity:
                self._identity = identity
                log.info("new certificates", extra={"expires": identity.expires.isoformat()})
            return self._identity

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


def read_identity(files: TlsFiles) -> Identity:
    """The files' content; StartupError names the file that is unreadable, no PEM, out of its time or another's key."""
    cert, key, ca = (_read(name, path) for name, path in vars(files).items())
    chain = _certificates("cert", files.cert, cert)
    _certificates("ca", files.ca, ca)
    now = datetime.now(UTC)
    leaf = chain[0]
    if now >= leaf.not_valid_after_utc:
        raise StartupError(
            f"--tls-cert {files.cert}: expired at {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; renew it"
        )
    if now < leaf.not_valid_before_utc:
        raise StartupError(
            f"--tls-cert {files.cert}: not valid before {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; it is now "
            f"{now:%Y-%m-%d %H:%M} UTC by this machine's clock"
        )
    _check_key(files, leaf, key)
    return Identity(cert, key, ca, leaf.not_valid_after_utc)


def _configuration(identity: Identity) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(identity.key, identity.cert)], identity.ca)


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartupError(f"--tls-{name} {path}: cannot read it: {error.strerror}") from None


def _certificates(name: str, path: Path, content: bytes) -> list[Certificate]:
    try:
        return load_pem_x509_certificates(content)
    except ValueError as error:
        raise StartupError(f"--tls-{name} {path}: not a certificate in PEM: {error}") from None


def _check_key(files: TlsFiles, leaf: Certificate, content: bytes) -> None:
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise StartupError(f"--tls-key {files.key}: not an unencrypted private key in PEM: {error}") from None
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    if key.public_key().public_bytes(*form) != leaf.public_key().public_bytes(*form):
        raise StartupError(f"--tls-key {files.key}: not the key of the certificate {files.cert}; give the pair")
