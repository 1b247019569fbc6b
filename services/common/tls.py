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
    cert, key = _read("--tls-cert", files.cert), _read("--tls-key", files.key)
    ca = _read("--tls-ca", files.ca)
    _certificates("--tls-ca", files.ca, ca)
    leaf = _check_pair("tls", files.cert, cert, files.key, key)
    return Identity(cert, key, ca, leaf.not_valid_after_utc)


def check_https(cert: Path, key: Path) -> None:
    """StartupError as of read_identity() for the files of an HTTPS server."""
    _check_pair("https", cert, _read("--https-cert", cert), key, _read("--https-key", key))


def _check_pair(use: str, cert: Path, cert_pem: bytes, key: Path, key_pem: bytes) -> Certificate:
    """The first certificate, if it is in its time and the key is its own."""
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
