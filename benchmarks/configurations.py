"""What is compared: ways to answer the same prompts with the same models."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

# Prompts of every kind, those of the serving table.
MIXED_PROMPTS = Path(__file__).parent / "prompts" / "mixed.jsonl"

Precision = Literal["float32", "bfloat16", "float16"]
Engine = Literal["specserve", "transformers", "llama.cpp", "vLLM"]


# Prompts are asked several times: an index of earlier outputs would know the answers.
NO_LOOKUP: dict[str, Any] = {"prompt_lookup": False, "suffix_index_tokens": 0}


@dataclass(frozen=True)
class Configuration:
    """One row of the table.

    key: short name, for charts and raw numbers. title: for the table.
    drafts: whether there are drafts.
    ssms: how many of the small models draft; Hugging Face always gets the first. apart: a speculator process for each.
    verifier, speculator: settings that differ from the defaults (specserve).
    dtype: of weights and arithmetic (peers).
    flags: for the peer's server.
    """

    key: str
    title: str
    engine: Engine
    drafts: bool
    ssms: int = 1
    apart: bool = False
    verifier: dict[str, Any] = field(default_factory=dict)
    speculator: dict[str, Any] = field(default_factory=lambda: NO_LOOKUP)
    dtype: Precision = "float32"
    flags: tuple[str, ...] = ()

    @property
    def learns(self) -> bool:
        """Whether a budget decides what is drafted, by what it has learned."""
        return self.engine == "specserve" and self.drafts and "draft_width" not in self.verifier


PLAIN = Configuration("plain", "SpecServe, plain decoding", "specserve", drafts=False)
BEST_FIRST = Configuration("tree", "SpecServe, tree speculation, best-first", "specserve", drafts=True)
LOOKUP = Configuration(
    "lookup",
    "SpecServe, best-first and prompt look-up (the default)",
    "specserve",
    drafts=True,
    speculator={"suffix_index_tokens": 0},
)
HF = Configuration("hf", "Hugging Face `generate`, fp32", "transformers", drafts=False)
HF_ASSISTED = Configuration("hf-assisted", "Hugging Face assisted `generate`, fp32", "transformers", drafts=True)
HF_BF16 = Configuration("hf-bf16", "Hugging Face `generate`, bf16", "transformers", drafts=False, dtype="bfloat16")
HF_ASSISTED_BF16 = Configuration(
    "hf-assisted-bf16", "Hugging Face assisted `generate`, bf16", "transformers", drafts=True, dtype="bfloat16"
)


def static_drafts(widths: Sequence[int]) -> dict[str, Any]:
    """Verifier settings for static trees of these widths, none of whose nodes is cut off by a budget."""
    nodes = sum(itertools.accumulate(widths, operator.mul))
    return {
        "draft_width": tuple(widths),
        "draft_depth": len(widths),
        "draft_nodes": nodes,
    }


def sequence_speculation(length: int) -> Configuration:
    """Drafts that are chains."""
    title = f"SpecServe, sequence speculation, chains of {length}"
    return Configuration("sequence", title, "specserve", drafts=True, verifier=static_drafts([1] * length))


def static_tree(widths: Sequence[int]) -> Configuration:
    """Drafts that all have one shape (SpecInfer, section 3: expansion-based trees)."""
    title = f"SpecServe, tree speculation, static <{','.join(map(str, widths))}>"
    return Configuration("static-tree", title, "specserve", drafts=True, verifier=static_drafts(widths))


def merged_trees(ssms: int) -> list[Configuration]:
    """Best-first trees of several small models, merged: all in one speculator, and each in one of its own."""
    title = f"SpecServe, trees of {ssms} SSMs merged"
    return [
        Configuration("merged", title, "specserve", drafts=True, ssms=ssms),
        Configuration("merged-apart", f"{title}, a speculator each", "specserve", drafts=True, ssms=ssms, apart=True),
    ]
