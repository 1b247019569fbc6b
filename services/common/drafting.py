"""What a verifier and a speculator say to each other; speculator.proto explains the fields. Knows no protobuf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from speculation.children import ChildSelection
from speculation.sampling import SamplingParams
from speculation.tree import TokenTree


@dataclass(frozen=True)
class OpenSequence:
    """A sequence to draft for, with all its tokens; of a known one the speculator begins anew."""

    sequence_id: int
    token_ids: Sequence[int]
    sampling: SamplingParams
    prompt_length: int


class AdvanceSequence(NamedTuple):
    """Tokens that the verifier accepted since the last message."""

    sequence_id: int
    token_ids: Sequence[int]


class DraftRequest(NamedTuple):
    """What tree is wanted."""

    sequence_id: int
    max_nodes: int
    max_depth: int
    widths: tuple[int, ...] = ()
    selection: ChildSelection = ChildSelection.TOP
    min_confidence: float = 0.0
    lookup_only: bool = False


@dataclass
class SpeculateRequest:
    """Applied in the order of the fields behind `step`."""

    step: int = 0
    advance: list[AdvanceSequence] = field(default_factory=list)
    close: list[int] = field(default_factory=list)
    open: list[OpenSequence] = field(default_factory=list)
    draft: list[DraftRequest] = field(default_factory=list)


@dataclass
class SpeculateResponse:
    """drafts: trees by sequence id. work_seconds: how long the speculator worked on the request."""

    step: int
    drafts: Mapping[int, Sequence[TokenTree]] = field(default_factory=dict)
    unknown_sequence_ids: Sequence[int] = ()
    work_seconds: float = 0.0
