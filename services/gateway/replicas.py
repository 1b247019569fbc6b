"""All verifiers of the gateway: found, watched, and chosen among, the least loaded first."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields

from services.common.tls import Security
from services.gateway.addresses import Address, resolve
from services.gateway.generation import (
    GenerationRequest,
    ModelFacts,
    ModelMismatch,
    VerifierBusy,
    VerifierError,
    VerifierUnavailable,
)
from services.gateway.metrics import GatewayMetrics
from services.gateway.replica import Replica
from services.gateway.verifier_client import RemoteSequence

log = logging.getLogger(__name__)

# How often names are resolved again.
RESOLVE_S = 5.0


@dataclass(frozen=True)
class Finding:
    """verifiers: HOST:PORT of each, a host may stand for several. timeout_s: for a health check or the facts.

    tokenizer_hash: of the gateway's own tokenizer; a verifier with another one is refused.
    """

    verifiers: tuple[str, ...]
    security: Security
    timeout_s: float
    tokenizer_hash: str


class Replicas:
    """The verifiers. All that are reachable serve the same model: one whose facts differ from theirs is refused."""

    def __init__(self, finding: Finding, metrics: GatewayMetrics) -> None:
        self._finding = finding
        self._metrics = metrics
        self._replicas: dict[Address, Replica] = {}
        self._watches: dict[Address, asyncio.Task[None]] = {}
        self._unresolved: str | None = None

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Inside, the replicas are found, and found again when their names resolve to others."""
        await self._find()
        finding = asyncio.create_task(self._keep_finding())
        try:
            yield
        finally:
            finding.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await finding
            await asyncio.gather(*(self._retire(address) for address in list(self._replicas)))

    async def facts(self) -> ModelFacts:
        """Facts of the model; VerifierUnavailable or ModelMismatch when no replica is usable."""
        if (facts := self._known_facts()) is None:
            await self._meet_all()
            facts = self._known_facts()
        if facts is None:
            raise VerifierUnavailable("the verifier is unavailable: it was met and lost again")
        return facts

    def _known_facts(self) -> ModelFacts | None:
        return next((replica.facts for replica in self._replicas.values() if replica.usable), None)

    async def open(
        self, request: GenerationRequest, generated_token_ids: Sequence[int], *, meet: bool
    ) -> RemoteSequence:
        """Return once a replica has admitted the sequence, the least loaded one that does.

        meet: ask a replica again for its model first: it may be another one than when the request began.

        Raises:
            VerifierBusy: all that can be reached are full. VerifierError: none can be reached, or one refused it.
        """
        await self.facts()
        usable = [replica for replica in self._replicas.values() if replica.usable]
        failures: list[VerifierError] = []
        for replica in sorted(usable, key=lambda replica: (replica.sequences, random.random())):
            try:
                if meet:
                    await replica.meet()
                return await _admitted(replica, request, generated_token_ids)
            except (VerifierUnavailable, VerifierBusy, ModelMismatch) as error:
                failures.append(error)
        raise _most_hopeful(failures)

    def check(self, replica: Replica, facts: ModelFacts) -> None:
        """ModelMismatch unless the facts are of the gateway's tokenizer and of the other replicas' model."""
        ours = self._finding.tokenizer_hash
        if facts.tokenizer_hash != ours:
            raise ModelMismatch(
                f"tokenizer hash {ours} of the gateway != {facts.tokenizer_hash} of the verifier at "
                f"{replica.address} (model {facts.model}); start both with the same model"
            )
        for other in self._replicas.values():
            if other is replica or not other.listed or other.facts is None:
                continue
            for name in (field.name for field in fields(ModelFacts)):
                mine, theirs = (_comparable(name, each) for each in (facts, other.facts))
                if mine != theirs:
                    raise ModelMismatch(
                        f"{name} {mine} of the verifier at {replica.address} != {theirs} of the one at "
                        f"{other.address}; start all replicas with the same model and settings"
                    )

    async def _meet_all(self) -> None:
        """Return when a listed replica could be met; raise the most telling reason when none could."""
        listed = [replica for replica in self._replicas.values() if replica.listed]
        if not listed:
            raise VerifierUnavailable(f"the verifier is unavailable: {self._unresolved or 'its name has no address'}")
        results = await asyncio.gather(*(replica.meet() for replica in listed), return_exceptions=True)
        failures = [result for result in results if isinstance(result, VerifierError)]
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, VerifierError):
                raise result
        if len(failures) == len(results):
            raise _most_hopeful(failures)

    async def _keep_finding(self) -> None:
        while True:
            await asyncio.sleep(RESOLVE_S)
            await self._find()

    async def _find(self) -> None:
        """Replicas are what the names resolve to now; of those gone, generations that are open may end."""
        try:
            async with asyncio.timeout(RESOLVE_S):
                addresses = await resolve(self._finding.verifiers)
        except (OSError, TimeoutError) as error:
            reason = f"cannot resolve {', '.join(self._finding.verifiers)}: {error or 'no answer'}"
            if reason != self._unresolved:
                log.warning("verifiers not found; the known ones stay", extra={"reason": reason})
            self._unresolved = reason
            return
        self._unresolved = None
        for address in addresses - self._replicas.keys():
            replica = Replica(address, self._finding.security, self._finding.timeout_s, self.check, self._report)
            self._replicas[address] = replica
            self._watches[address] = asyncio.create_task(replica.watch())
        for address, replica in list(self._replicas.items()):
            replica.listed = address in addresses
            self._report(replica)
            if not replica.listed and replica.sequences == 0:
                await self._retire(address)

    async def _retire(self, address: Address) -> None:
        watch, replica = self._watches.pop(address), self._replicas.pop(address)
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch
        await replica.close()
        self._metrics.verifier_up.remove(str(address))
        self._metrics.verifier_streams.remove(str(address))

    def _report(self, replica: Replica) -> None:
        if self._replicas.get(replica.address) is replica:
            self._metrics.verifier_up.labels(str(replica.address)).set(replica.usable)
            self._metrics.verifier_streams.labels(str(replica.address)).set(replica.sequences)


async def _admitted(replica: Replica, request: GenerationRequest, generated_token_ids: Sequence[int]) -> RemoteSequence:
    if replica.facts is not None and replica.facts.model != request.model:
        raise ModelMismatch(
            f"the request began with model {request.model}; the verifier now serves {replica.facts.model}"
        )
    sequence = replica.generate(request, generated_token_ids)
    try:
        await sequence.admitted()
    except BaseException:
        sequence.cancel()
        raise
    return sequence


def _comparable(name: str, facts: ModelFacts) -> object:
    """A fact as replicas must have it in common; which of a machine's devices it is does not matter."""
    value: object = getattr(facts, name)
    return str(value).partition(":")[0] if name == "device" else value


def _most_hopeful(failures: Sequence[VerifierError]) -> VerifierError:
    """Full before away, away before refused; of full ones the one that has room first."""
    busy = [failure for failure in failures if isinstance(failure, VerifierBusy)]
    if busy:
        return min(busy, key=lambda failure: failure.retry_after_ms)
    return next((failure for failure in failures if isinstance(failure, VerifierUnavailable)), failures[0])
