"""Average the weights of a model and of what further training made of it.

    python -m training.average --start my-llm --trained deeper --share 0.6 --out averaged

Where a model went on from another one, the straight line between the two often holds better models than either end
(Wortsman et al., 2022: Robust fine-tuning of zero-shot models, section 3).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from training.growth import CannotGrow, start_from


@torch.no_grad()
def average(start: Path, trained: Path, share: float) -> LlamaForCausalLM:
    """(1 - share) * start + share * trained, weight by weight in fp32; a shallower start is grown first.

    Raises:
        CannotGrow: the models differ in width or vocabulary, or the start is not as deep or shallower.
    """
    grown = LlamaForCausalLM(AutoConfig.from_pretrained(trained))
    start_from(grown, start)
    other = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    for parameter, target in zip(grown.parameters(), other.parameters(), strict=True):
        parameter.lerp_(target, share)
    return grown


def main(
    start: Annotated[Path, typer.Option(help="Folder of the model that training went on from.")],
    trained: Annotated[Path, typer.Option(help="Folder of what it became, as wide, and as deep or deeper.")],
    out: Annotated[Path, typer.Option(help="Folder that gets the average.")],
    share: Annotated[float, typer.Option(min=0, max=1, help="Weight of the trained model.")] = 0.5,
) -> None:
    """Average a model and its further trained version."""
    try:
        model = average(start, trained, share)
    except CannotGrow as error:
        raise typer.BadParameter(str(error)) from None
    model.to(torch.bfloat16)  # type: ignore[arg-type]  # transformers wraps `to` without its overloads
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(trained / name, out / name)


if __name__ == "__main__":
    typer.run(main)
