"""What a speculator drafts with: small models, and look-up in texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from services.speculator.session import DraftOrder, SessionKey
from speculation.sampling import SamplingParams
from speculation.tree import TokenTree


class DraftSource(Protocol):
    """Keeps a session for each open sequence and gives a tree when it is asked. One thread calls it."""

    def __contains__(self, key: SessionKey) -> bool:
        """Whether the session is open."""

    def open(self, key: SessionKey, tokens: Sequence[int], prompt_length: int, params: SamplingParams) -> None:
        """Start a session, in place of one of the same key. tokens: prompt and output so far, at least one."""

    def work_ahead(self) -> bool:
        """Compute a piece of what drafts would have to, as long as others may wait for; whether there is more."""

    def advance(self, key: SessionKey, token_ids: Sequence[int]) -> None:
        """Append what the verifier accepted to an open session."""

    def close(self, key: SessionKey) -> None:
        """End a session, if there is one."""

    def close_stream(self, stream: int) -> None:
        """End every session of a stream."""

    def draft(self, orders: Iterable[DraftOrder]) -> Mapping[SessionKey, TokenTree]:
        """At most one tree for each order, whose session is open; none where much is left to compute before."""
