"""Making a trained model deeper without changing what it computes.

Knows nothing of training: a deeper model is trained on like any other.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM


class CannotGrow(ValueError):
    """A trained model that does not fit into the new one; the message names what differs."""


def source_layers(trained: int, layers: int) -> list[tuple[int, bool]]:
    """For each of `layers` layers the trained layer it comes from, and whether it is an added copy of it.

    The copies stand right behind the layers that they were copied from, spread evenly over the depth.

    Raises:
        CannotGrow: fewer layers than are trained, or more than twice as many.
    """
    if not trained <= layers <= 2 * trained:
        raise CannotGrow(f"{layers} layers cannot grow from {trained}; ask for {trained} to {2 * trained}")
    added = layers - trained
    copied = {(2 * i + 1) * trained // (2 * added) for i in range(added)}
    return [
        entry for old in range(trained) for entry in ([(old, False), (old, True)] if old in copied else [(old, False)])
    ]


@torch.no_grad()
def start_from(model: LlamaForCausalLM, trained: Path) -> None:
    """Give `model` the weights of a trained folder of the same width, and identity blocks where it is deeper.

    An added block is a copy of the block before it whose output projections are zero (Wu et al., 2024, LLaMA Pro,
    section 3.2): the model computes what the trained one computed, and each of its projections gets a gradient.

    Raises:
        CannotGrow: another width or vocabulary, or a number of layers that cannot be reached.
    """
    weights = load_file(trained / "model.safetensors")
    depth = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))
    grown = {name: tensor for name, tensor in weights.items() if not name.startswith("model.layers.")}
    for new, (old, added) in enumerate(source_layers(depth, model.config.num_hidden_layers)):
        prefix = f"model.layers.{old}."
        for name, tensor in weights.items():
            if name.startswith(prefix):
                zero = added and name.endswith(("o_proj.weight", "down_proj.weight"))
                grown[f"model.layers.{new}.{name.removeprefix(prefix)}"] = tensor * 0 if zero else tensor
    for name, parameter in model.named_parameters():
        if name not in grown or grown[name].shape != parameter.shape:
            found = list(grown[name].shape) if name in grown else "missing"
            raise CannotGrow(f"{trained}: {name} is {found}, the new model has {list(parameter.shape)}")
        parameter.copy_(grown[name])
