"""Certificates for tests, by an authority of their own."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import trustme


class Authority:
    """Signs certificates."""

    def __init__(self) -> None:
        self._ca = trustme.CA()

    def files(
        self, folder: Path, *names: str, expires: datetime | None = None, trusted: Authority | None = None
    ) -> dict[str, Path]:
        """Write a certificate for these host names or addresses, 127.0.0.1 when none is given, into a new folder.

        Returns the settings tls_cert, tls_key and tls_ca. trusted: the authority in tls_ca, if it is another one.
        """
        folder.mkdir(parents=True, exist_ok=True)
        issued = self._ca.issue_cert(*(names or ("127.0.0.1",)), not_after=expires)
        (folder / "tls.crt").write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        (folder / "tls.key").write_bytes(issued.private_key_pem.bytes())
        (folder / "ca.crt").write_bytes((trusted or self)._ca.cert_pem.bytes())
        return {"tls_cert": folder / "tls.crt", "tls_key": folder / "tls.key", "tls_ca": folder / "ca.crt"}
