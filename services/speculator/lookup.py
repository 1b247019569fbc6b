"""Draft sources without a model: the sequence's own text, and what was generated before.

A tree of multi-step speculative sampling (ChildSelection.SAMPLED) leaves nothing behind: neither its text nor what
became of it steers a later draft. A request repeated with the same seed meets the same noise, and where drafts that
grew from that noise decide which positions are tested with it, the output is biased.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.speculator.session import DraftOrder, SessionKey
from speculation.children import ChildSelection
from speculation.lookup import LookupBounds, LookupDraft, Reliability, grow_lookup_tree
from speculation.sampling import SamplingParams
from speculation.suffix_index import MAX_MATCH, SuffixIndex
from speculation.tree import TokenTree

# Tokens of long prompts that a message may wait for to be indexed: a few milliseconds.
INDEXED_AT_ONCE = 4096
# Outputs reach the suffix index in pieces of so many tokens, and with the rest when they end.
OUTPUT_PIECE = 256


@dataclass(eq=False)
class LookupSession:
    """tokens: the whole sequence, of which tokens[:indexed] need no indexing any more.

    selection: of the last draft, None before the first. draft: the last one, until it is known what followed.
    """

    tokens: list[int]
    index: SuffixIndex
    indexed: int
    selection: ChildSelection | None = None
    draft: LookupDraft | None = None

    @property
    def behind(self) -> int:
        """Tokens that are not indexed."""
        return len(self.tokens) - self.indexed

    @property
    def leaves_traces(self) -> bool:
        return self.selection not in (None, ChildSelection.SAMPLED)


class LookupSource(ABC):
    """Sessions and trees of both sources. Reliability is learned for each way of sampling apart, over all sequences.

    min_confidence: nodes with a smaller probability of being accepted are left out.
    """

    name: str

    def __init__(self, min_confidence: float) -> None:
        self._min_confidence = min_confidence
        self._reliability = {selection: Reliability() for selection in ChildSelection}
        self._sessions: dict[SessionKey, LookupSession] = {}

    def __contains__(self, key: SessionKey) -> bool:
        return key in self._sessions

    def open(self, key: SessionKey, tokens: Sequence[int], prompt_length: int, params: SamplingParams) -> None:
        """Start a session, in place of one of the same key."""
        del prompt_length, params
        self.close(key)
        self._sessions[key] = self._session(list(tokens))

    def work_ahead(self) -> bool:
        """Index a piece of what is new; whether there is more."""
        return self._index(self._sessions.values())

    def advance(self, key: SessionKey, token_ids: Sequence[int]) -> None:
        """Append accepted tokens, and learn from what was proposed in their place."""
        session = self._sessions[key]
        if session.draft is not None and session.selection is not None and session.leaves_traces:
            session.draft.teach(self._reliability[session.selection], token_ids)
        session.draft = None
        session.tokens.extend(token_ids)
        self._advanced(session)

    def close(self, key: SessionKey) -> None:
        if (session := self._sessions.pop(key, None)) is not None:
            self._closed(session)

    def close_stream(self, stream: int) -> None:
        """End every session of a stream."""
        for key in [key for key in self._sessions if key[0] == stream]:
            self.close(key)

    def draft(self, orders: Iterable[DraftOrder]) -> dict[SessionKey, TokenTree]:
        """A tree for every order; the root alone where nothing is found."""
        orders = list(orders)
        self._index([self._sessions[order.key] for order in orders])
        return {order.key: self._grow(self._sessions[order.key], order) for order in orders}

    def _grow(self, session: LookupSession, order: DraftOrder) -> TokenTree:
        bounds = LookupBounds(order.nodes, order.depth, order.widths, self._min_confidence)
        reliability = self._reliability[order.selection]
        session.selection = order.selection
        session.draft = grow_lookup_tree(session.index, session.tokens[-MAX_MATCH:], reliability, bounds, self.name)
        return session.draft.tree

    @abstractmethod
    def _session(self, tokens: list[int]) -> LookupSession:
        """A new session."""

    @abstractmethod
    def _index(self, sessions: Iterable[LookupSession]) -> bool:
        """Before these sessions draft, as much as they may wait for; whether there is more."""

    @abstractmethod
    def _advanced(self, session: LookupSession) -> None:
        """A session has new tokens."""

    @abstractmethod
    def _closed(self, session: LookupSession) -> None:
        """A session has ended."""


class PromptLookup(LookupSource):
    """Looks up the end of a sequence in its own prompt and output."""

    name = "prompt-lookup"

    def _session(self, tokens: list[int]) -> LookupSession:
        return LookupSession(tokens, SuffixIndex(), indexed=0)

    def _index(self, sessions: Iterable[LookupSession]) -> bool:
        """The sequences with the least that is new come first."""
        left = INDEXED_AT_ONCE
        behind = [session for session in sessions if session.behind]
        for session in sorted(behind, key=lambda session: session.behind):
            fresh = session.tokens[session.indexed : session.indexed + left]
            session.index.extend(fresh)
            session.indexed += len(fresh)
            left -= len(fresh)
        return any(session.behind for session in behind)

    def _advanced(self, session: LookupSession) -> None:
        pass

    def _closed(self, session: LookupSession) -> None:
        pass


class OutputLookup(LookupSource):
    """Looks up the end of a sequence in what this speculator has seen generated, by whichever verifier for whomever.

    Tokens that come with the opening of a sequence were seen before by its last session, or are not indexed.
    """

    name = "suffix-index"

    def __init__(self, min_confidence: float, capacity: int) -> None:
        super().__init__(min_confidence)
        self.index = SuffixIndex(capacity)

    def _session(self, tokens: list[int]) -> LookupSession:
        return LookupSession(tokens, self.index, indexed=len(tokens))

    def _index(self, sessions: Iterable[LookupSession]) -> bool:
        return False

    def _advanced(self, session: LookupSession) -> None:
        if session.behind >= OUTPUT_PIECE:
            self._add_output(session)

    def _closed(self, session: LookupSession) -> None:
        if session.behind:
            self._add_output(session)

    def _add_output(self, session: LookupSession) -> None:
        """Add the output that is new, with what stands before it as context; of a prompt MAX_MATCH tokens at most."""
        if session.leaves_traces:
            start = max(0, session.indexed - MAX_MATCH)
            self.index.add_text(session.tokens[start:], context=session.indexed - start)
        session.indexed = len(session.tokens)
