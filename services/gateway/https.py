"""The certificate of the HTTP API, which may be renewed while the gateway runs."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from services.common.lifecycle import StartupError
from services.common.tls import Renewed, check_pair, read_pair


@dataclass(frozen=True)
class _Loaded:
    context: ssl.SSLContext
    expires: datetime


class HttpsCertificate:
    """Reads its files again for each handshake; connections that are open keep what they have.

    Raises:
        StartupError: the files cannot be used.
    """

    def __init__(self, cert: Path, key: Path) -> None:
        self.cert = cert
        self.key = key
        self._loaded = Renewed(lambda: read_pair("https", cert, key), lambda content: self._load(*content))

    def _load(self, cert_pem: bytes, key_pem: bytes) -> _Loaded:
        leaf = check_pair("https", self.cert, cert_pem, self.key, key_pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # From the files, as there is no other way; if they change here, the next handshake sees that.
            context.load_cert_chain(self.cert, self.key)
        except OSError as error:
            raise StartupError(f"--https-cert {self.cert}: cannot be used: {error}") from None
        return _Loaded(context, leaf.not_valid_after_utc)

    def serve(self, context: ssl.SSLContext) -> None:
        """Make a server's context show the newest certificate in each handshake."""
        context.sni_callback = self._choose  # called with or without a name

    def _choose(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._loaded.newest().context
