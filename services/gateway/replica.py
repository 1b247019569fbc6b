"""One verifier as the gateway sees it: reachable or not, serving or draining, of which model, how busy."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import NoReturn

from services.common.tls import INSECURE, Identity, Security
from services.gateway.addresses import Address
from services.gateway.generation import (
    GenerationRequest,
    ModelFacts,
    VerifierError,
    VerifierUnavailable,
)
from services.gateway.verifier_client import RemoteSequence, VerifierClient

log = logging.getLogger(__name__)

# Between attempts to reach a verifier that is away; the channel itself connects about once a second.
RETRY_S = 0.25


class Replica:
    """A verifier at one address. `watch` runs for as long as it is one of the gateway's.

    check: raises ModelMismatch when the facts are not those of the gateway's model.
    facts: of its model, None while it is away or refused. sequences: open there by this gateway.
    listed: whether its name still resolves to its address.
    """

    def __init__(
        self,
        address: Address,
        security: Security,
        timeout_s: float,
        check: Callable[[Replica, ModelFacts], None],
        on_change: Callable[[Replica], None],
    ) -> None:
        self.address = address
        self.facts: ModelFacts | None = None
        self.sequences = 0
        self.listed = True
        self._serving = False
        self._security = security
        self._identity = _identity(security)
        self._client = VerifierClient(address, security)
        self._timeout_s = timeout_s
        self._check = check
        self._on_change = on_change

    @property
    def usable(self) -> bool:
        """Whether it takes new generations."""
        return self.facts is not None and self._serving and self.listed

    async def meet(self) -> None:
        """Ask for its facts and its health; VerifierUnavailable or ModelMismatch when it is not usable.

        A failure changes nothing: that it is lost is for `watch` to find, which then looks for it again.
        """
        facts = await self._client.model_facts(self._timeout_s)
        self._check(self, facts)
        if facts != self.facts:
            log.info("verifier met", extra={"address": str(self.address), "model": facts.model})
        self._set(facts, self._serving)  # at once, so that another replica that is met meanwhile is held against it
        if not await self._client.serving(self._timeout_s):
            raise VerifierUnavailable(f"the verifier at {self.address} is not serving")
        self._set(facts, True)

    async def watch(self) -> NoReturn:
        """Keep its state true: met again after each loss, told by itself when it begins to drain."""
        reason, met = "", False
        while True:
            try:
                await self._renew_client()
                await self.meet()
                reason, met = "", True
                await self._client.wait_not_serving()
                raise VerifierUnavailable(f"the verifier at {self.address} is not serving any more")
            except VerifierError as error:
                if str(error) != reason:
                    reason = str(error)
                    # Services start side by side: one that was never there is no surprise.
                    missing = isinstance(error, VerifierUnavailable) and not met
                    level = logging.INFO if missing else logging.WARNING
                    log.log(level, "verifier not usable", extra={"address": str(self.address), "reason": reason})
                self._set(None, False)
            await asyncio.sleep(RETRY_S)

    def generate(self, request: GenerationRequest, generated_token_ids: Sequence[int]) -> RemoteSequence:
        """Begin to generate here."""
        sequence = self._client.generate(request, generated_token_ids, on_end=self._ended)
        self.sequences += 1
        self._on_change(self)
        return sequence

    async def close(self) -> None:
        """Cancel what is open."""
        await self._client.close()

    async def _renew_client(self) -> None:
        """Certificates that were renewed take effect with the next connection."""
        identity = _identity(self._security)
        if identity != self._identity:
            self._identity, old = identity, self._client
            self._client = VerifierClient(self.address, self._security)
            await old.close()

    def _ended(self) -> None:
        self.sequences -= 1
        self._on_change(self)

    def _set(self, facts: ModelFacts | None, serving: bool) -> None:
        self.facts, self._serving = facts, serving
        self._on_change(self)


def _identity(security: Security) -> Identity | None:
    return None if security is INSECURE else security.identity
