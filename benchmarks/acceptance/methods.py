"""The page's words: what each table counts, and how the run was made."""

from __future__ import annotations

from benchmarks.acceptance import paper
from benchmarks.acceptance.lines import DEPTH, WIDTHS, tree_nodes
from benchmarks.acceptance.results import Conditions, Results

SUCCESS = (
    "How often the LLM's token is among the k candidates of a draft, in percent, at every position of the LLM's own "
    "text. A set with *k in all* merges the SSMs' candidates into k; with *k of each* it has up to k times as many as "
    "it has SSMs. Shared noise: the candidates are ranked with the noise that the token is drawn with. MSS: k draws "
    "without replacement; the figure is the probability that one of them is accepted, averaged over positions (draws "
    "*in all* are dealt to the SSMs in turn). ± is a standard error over prompts."
)

NAIVE = (
    f"Trees of {tree_nodes(max(WIDTHS))} nodes, temperature 1. Naive sampling draws the LLM's token and keeps its node "
    "if the tree of the SSM's most likely tokens has it; shared noise draws the same text. In brackets: tokens per LLM "
    "step over those of naive sampling, with a 95% interval. In the paper MSS has "
    f"{paper.MSS_OVER_NAIVE.low} to {paper.MSS_OVER_NAIVE.high} times the tokens per step of naive sampling."
)

PAPER = (
    "SpecInfer's evaluation (arXiv 2305.09781, Tables 1 to 3) has LLaMA-7B with LLaMA-68M on five other sets of "
    "prompts: how predictable models and prompts are enters here as much as the method. *Above* means higher than the "
    "highest of the five, and at every width where there is a figure for each; ranges of Table 2 are from width 1 to "
    "width 5, the paper's of its highest figures. The paper's stochastic figures are of MSS."
)


def introduction(conditions: Conditions) -> str:
    """What the page is."""
    return (
        f"Made on {conditions.date} by `{conditions.command}`. How many tokens the LLM's steps yield by draft: "
        "counted, not timed. The tables are SpecInfer's Tables 1 to 3, on the models and prompts named at the end."
    )


def walks(conditions: Conditions) -> str:
    """What Table 2 counts."""
    widths = ", ".join(f"{tree_nodes(width)} ({width})" for width in WIDTHS)
    return (
        "All new tokens over all LLM steps, the LLM's own token of each step counted; a prompt's first tree is checked "
        f"in the step that computes the prompt. Trees are {DEPTH} deep and have at most {widths} nodes, root not "
        "counted: as many as the paper's static trees <1,1,w,1,1,1,1,1> of the width w in brackets. Best-first trees "
        f"expand up to {conditions.beam} nodes at a depth. Merged trees have that many nodes in all. ± is a standard "
        "error over prompts."
    )


def method(results: Results, conditions: Conditions) -> str:
    """How all figures were made."""
    means = {
        width: [mean for key, mean in results.nodes_per_step.items() if key.width == width and mean > 0]
        for width in WIDTHS
    }
    nodes = "; ".join(f"{tree_nodes(width)}: {min(own):.1f} to {max(own):.1f}" for width, own in means.items() if own)
    return (
        f"Each prompt is continued for {conditions.new_tokens} tokens or up to end-of-text, greedily and at "
        f"temperature 1 (seed {conditions.seed}; each prompt has its own noise). The verifier's engine, scheduler and "
        "merging and the speculator's drafters run in process. Greedy text, and that of shared noise and naive "
        "sampling, does not depend on the drafts: the LLM writes it once, and each draft is measured along it. With "
        "MSS every draft leads to another text, so that there the LLM decodes with each; figures of different MSS "
        "drafts differ by the luck of their texts too.\n\n"
        "Standard errors and 95% intervals are a bootstrap over prompts, whose texts differ more than the positions of "
        "one text; ratios are of the same prompts. Mean number of nodes checked in a step, by the most that a tree may "
        f"have (less near the end of a text, and where sampled trees merge): {nodes}."
    )
