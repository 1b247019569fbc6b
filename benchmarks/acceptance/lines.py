"""What is compared: the draft sources and the shapes of trees. The one place that lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.speculator.lookup import OutputLookup, PromptLookup
from speculation.acceptance import AcceptanceRule

DEPTH = 8
WIDTHS = (1, 2, 3, 4, 5)
"""Widths of the paper's trees <1,1,w,1,1,1,1,1>; also the numbers of candidates k of Table 1."""

MODES = (AcceptanceRule.GREEDY, AcceptanceRule.SHARED_NOISE, AcceptanceRule.MSS)
MODE_TITLES = {
    AcceptanceRule.GREEDY: "greedy",
    AcceptanceRule.SHARED_NOISE: "stochastic, shared noise",
    AcceptanceRule.MSS: "stochastic, MSS",
    AcceptanceRule.NAIVE: "stochastic, naive sampling",
}

BOOSTED, INDEPENDENT, WITH_LOOKUP = "boosted", "independent", "with-lookup"
LOOKUPS = (PromptLookup.name, OutputLookup.name)


def static_widths(width: int) -> tuple[int, ...]:
    """Children by depth of the paper's tree of this width."""
    return (1, 1, width, *[1] * (DEPTH - 3))


def tree_nodes(width: int) -> int:
    """Nodes of that tree, the root not counted: two, and `width` chains of six."""
    return 2 + (DEPTH - 2) * width


def source_names(of: str, count: int) -> tuple[str, ...]:
    """Names of the SSMs of a set."""
    return tuple(f"{of}-{index}" for index in range(1, count + 1))


@dataclass(frozen=True)
class Line:
    """One way to draft, at every width.

    sources: names of the draft sources whose trees are merged. static: the paper's shape, else best-first growth.
    """

    key: str
    title: str
    sources: tuple[str, ...]
    static: bool = False

    def widths(self, width: int) -> tuple[int, ...]:
        """Children by depth for static trees; empty for best-first growth."""
        return static_widths(width) if self.static else ()


def draft_lines(sets: Mapping[str, Sequence[str]]) -> tuple[Line, ...]:
    """The lines of Table 2, for the SSMs' names by set.

    A set of one SSM has no line of its own: it would be the best-first line of that SSM.
    """
    boosted, independent = tuple(sets[BOOSTED]), tuple(sets.get(INDEPENDENT, ()))
    lines = [
        Line("static", "SSM 1 static", boosted[:1], static=True),
        Line("best-first", "SSM 1 best-first", boosted[:1]),
    ]
    if len(boosted) > 1:
        lines.append(Line(BOOSTED, f"{len(boosted)} boosted SSMs merged", boosted))
    if len(independent) > 1:
        lines.append(Line(INDEPENDENT, f"{len(independent)} independent SSMs merged", independent))
    drafts = "SSM 1" if len(boosted) == 1 else f"{len(boosted)} boosted SSMs"
    lines.append(Line(WITH_LOOKUP, f"{drafts} and look-up merged", (*LOOKUPS, *boosted)))
    return tuple(lines)
