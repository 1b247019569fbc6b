"""The model card of a tuned small model: what it is, how it was made, and what was measured."""

from __future__ import annotations

from pathlib import Path

from training.evaluation import HeldOut
from training.files import write_bytes


def write_card(
    folder: Path,
    *,
    llm: str,
    start: str,
    parameters: tuple[int, int],
    round_of: tuple[int, int] | None,
    learnt: int,
    tokens: int,
    coverage: str,
    figures: HeldOut,
) -> None:
    """Write README.md.

    parameters: of the SSM and of the LLM. round_of: place among the boosted SSMs; None when it was tuned on its own.
    learnt: continuations that it learnt from. coverage: of the set up to this model.
    """
    own, large = parameters
    how = _how(round_of)
    columns = "".join(f" k = {k} |" for k in range(1, len(figures.greedy) + 1))
    raw, calibrated = figures.raw_greedy.error, figures.greedy_reliability.error
    scales = figures.calibration
    noise_raw, noise_calibrated = figures.raw_noise.error, figures.noise_reliability.error
    text = f"""# {folder.name}

A small speculative model that drafts for {llm}, made by `specserve tune`. It has {own / 1e6:.2f} million parameters,
one for {large / own:.1f} of the LLM's. {how}

- started from: {start}
- learnt from: {learnt:,} continuations that {llm} wrote, with its probabilities (distillation), in {tokens:,} training
  tokens
- coverage of the continuations, with the models before it: {coverage}

## Held out

{figures.positions:,} positions in continuations of prompts that it has not seen.

| the LLM's token is among the first k |{columns}
| --- |{" ---: |" * len(figures.greedy)}
| greedy |{_cells(figures.greedy)}
| temperature 1, shared noise |{_cells(figures.shared_noise)}

Overlap of the distributions, 1 - TV: {figures.overlap:.3f}.

## Calibration

`speculation.json` has what the speculator uses. Expected calibration error of the estimated probability that a drafted
token is right, on held-out text that the fit has not seen:

| | as it comes | fitted |
| --- | ---: | ---: |
| greedy, temperature {scales.greedy_temperature} | {raw:.3f} | {calibrated:.3f} |
| shared noise, disagreement {scales.disagreement} | {noise_raw:.3f} | {noise_calibrated:.3f} |
"""
    write_bytes(folder / "README.md", text.encode())


def _cells(shares: list[float]) -> str:
    return "".join(f" {share:.1%} |" for share in shares)


def _how(round_of: tuple[int, int] | None) -> str:
    if round_of is None:
        return "Tuned on all of the LLM's continuations, without boosting."
    number, count = round_of
    learnt = "everything" if number == 1 else "what the models before it do not cover"
    return f"Model {number} of a boosted set of {count}: it learnt {learnt}."
