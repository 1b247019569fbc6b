"""API keys: who may use the gateway. Only their hashes are kept, in memory and in files.

A key is 256 random bits, so that plain SHA-256 is enough: there is nothing to guess that a slow or salted hash would
protect, and a request costs a microsecond. Keys that people think up are refused by `hash_key`.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from services.common.lifecycle import StartupError
from services.gateway.errors import ApiError
from services.gateway.replies import send_error

log = logging.getLogger(__name__)

SCHEME = "sha256:"
HASH = re.compile(rf"{SCHEME}[0-9a-f]{{64}}")
KEY_PREFIX = "sk-"
SHORTEST_KEY = 32
# What tells a load balancer or the kubelet whether to send requests here.
OPEN_PATHS = frozenset({"/health", "/ready"})


def new_key() -> str:
    """A key of 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """The line that admits this key; ValueError when it is too short to be random."""
    if len(key) < SHORTEST_KEY:
        raise ValueError(f"the key has {len(key)} characters; allowed: random ones of at least {SHORTEST_KEY}")
    return _hash(key)


class ApiKeys:
    """The hashes of one file, read again when it changes, and those given besides.

    A changed file that is broken or gone is logged, and the last good one stays. Without any hash nobody is admitted.

    Raises:
        StartupError: the file cannot be read, or a line of it or an entry of `given` is no hash.
    """

    def __init__(self, file: Path | None, given: Sequence[str] = ()) -> None:
        self._file = file
        self._given = _parse("api_keys", given)
        self._seen = _version(file)
        self._hashes = self._given | _read(file)
        if not self._hashes:
            log.warning("no API key is known: every request is refused")

    def admits(self, key: str) -> bool:
        """Whether the key is one of ours; takes the same time for every key of a length."""
        self._refresh()
        digest = _hash(key).encode()
        matches = [hmac.compare_digest(digest, known) for known in self._hashes]
        return any(matches)

    def _refresh(self) -> None:
        version = _version(self._file)
        if version == self._seen:
            return
        self._seen = version
        try:
            self._hashes = self._given | _read(self._file)
        except StartupError as error:
            log.error("changed API keys refused; the old ones stay", extra={"reason": str(error)})
        else:
            log.info("API keys read", extra={"keys": len(self._hashes)})


class RequireApiKey:
    """ASGI middleware: answers 401 to every request without a valid `Authorization: Bearer KEY`, but to probes."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not self._keys.admits(key.strip()):
                await send_error(send, _refusal(bool(scheme)))
                return
        await self._app(scope, receive, send)


def _refusal(given: bool) -> ApiError:
    what = "the API key is not valid here" if given else "no API key was given"
    return ApiError(
        401, f"{what}; send the header 'Authorization: Bearer KEY' with a valid one", code="invalid_api_key"
    )


def _hash(key: str) -> str:
    return SCHEME + hashlib.sha256(key.encode()).hexdigest()


def _parse(source: str, lines: Iterable[str]) -> frozenset[bytes]:
    """The hashes among lines with comments (#); the error never shows a line, which may be a key."""
    hashes = set()
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if text and not HASH.fullmatch(text):
            raise StartupError(
                f"{source}, line {number}: not a hash of an API key ({SCHEME} and 64 hexadecimal digits); make one "
                "with `specserve hash-key`"
            )
        if text:
            hashes.add(text.encode())
    return frozenset(hashes)


def _read(file: Path | None) -> frozenset[bytes]:
    if file is None:
        return frozenset()
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"--api-keys-file {file}: cannot read it: {error}") from None
    return _parse(f"--api-keys-file {file}", text.splitlines())


def _version(file: Path | None) -> tuple[int, int, int] | None:
    """Changes with the file, also behind swapped links; None when there is none."""
    try:
        found = None if file is None else file.stat()
    except OSError:
        return None
    return None if found is None else (found.st_ino, found.st_mtime_ns, found.st_size)
