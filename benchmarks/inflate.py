"""A model that says what a small one says and costs what a large one costs.

    python -m benchmarks.inflate --out /tmp/inflated

For measuring speed where no trained model of that size is at hand. It is never as good as its size: its text is the
small model's. Every page that shows it calls it inflated.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file

from services.common.model_files import ModelFilesError, resolve_model
from services.launcher.settings import EMBEDDED_LLM
from training.growth import source_layers

# The key of config.json that names the model whose text it is.
INFLATED_FROM = "inflated_from"
MEMORY_BOUND_PARAMETERS = 130_000_000
MAX_COPIES = 16
# What reads the residual stream, and what writes to it.
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
WRITERS = ("o_proj", "down_proj")


class CannotInflate(ValueError):
    """A model that cannot be inflated, or a size that cannot be reached; the message says what can."""


@dataclass(frozen=True)
class Shape:
    """How a model grows. copies: of the residual stream, a power of two; heads and inner widths grow as much."""

    copies: int
    layers: int


def inflate(source: Path, out: Path, parameters: int = MEMORY_BOUND_PARAMETERS) -> Shape:
    """Write to `out` a Llama of about `parameters` parameters with the logits of the one in `source`, up to rounding.

    With c copies, x' = (x, ..., x): its mean square is that of x, so RMSNorm needs no other weight or epsilon. (Padding
    the stream with zeros would need weights divided by the square root of c, which bf16 cannot hold exactly.)
    Projections read it with the weights (W, ..., W) / c, exact as c is a power of two, and write (y, ..., y). Added
    heads and inner units have weights of zero. Added layers are copies whose output projections are zero
    (training.growth).

    Raises:
        CannotInflate: not a Llama without biases, or no such size.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "llama" or config.get("attention_bias") or config.get("mlp_bias"):
        raise CannotInflate(f"{source}: only Llama models without biases can be inflated, not {config['model_type']}")
    weights = load_file(source / "model.safetensors")
    shape = _shape_for(config, weights, parameters)
    out.mkdir(parents=True, exist_ok=True)
    save_file(_grown_weights(weights, shape, config), out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(_grown_config(config, shape, source.name), indent=2), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    return shape


def _shape_for(config: dict[str, Any], weights: dict[str, torch.Tensor], parameters: int) -> Shape:
    layers = config["num_hidden_layers"]
    inner = sum(t.numel() for name, t in weights.items() if ".layers.0." in name and t.dim() == 2)
    outer = sum(t.numel() for name, t in weights.items() if ".layers." not in name)
    copies = 1
    while copies <= MAX_COPIES:
        wanted = round((parameters - outer * copies) / (inner * copies**2))
        if wanted <= 2 * layers:
            break
        copies *= 2
    if copies > MAX_COPIES or parameters <= sum(t.numel() for t in weights.values()):
        smallest, largest = outer + inner * layers, outer * MAX_COPIES + inner * MAX_COPIES**2 * 2 * layers
        raise CannotInflate(f"cannot reach {parameters} parameters; ask for {smallest + 1} to {largest}")
    return Shape(copies, max(wanted, layers))


def _grown_config(config: dict[str, Any], shape: Shape, source: str) -> dict[str, Any]:
    grown = dict(config)
    grown["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    grown["num_key_value_heads"] = config.get("num_key_value_heads") or config["num_attention_heads"]
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        grown[name] *= shape.copies
    return grown | {"num_hidden_layers": shape.layers, INFLATED_FROM: source}


def _grown_weights(weights: dict[str, torch.Tensor], shape: Shape, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    copies = shape.copies
    grown = {
        "model.embed_tokens.weight": weights["model.embed_tokens.weight"].tile(1, copies),
        # A tied head reads all copies with the weights of the embedding: the norm before it takes the division.
        "model.norm.weight": weights["model.norm.weight"].tile(copies) / copies,
    }
    if not config.get("tie_word_embeddings"):
        grown["lm_head.weight"] = weights["lm_head.weight"].tile(1, copies)
    for new, (old, added) in enumerate(source_layers(config["num_hidden_layers"], shape.layers)):
        prefix = f"model.layers.{old}."
        for name in [name for name in weights if name.startswith(prefix)]:
            tensor = _grown_tensor(name, weights[name], copies)
            zero = added and name.split(".")[-2] in WRITERS
            grown[f"model.layers.{new}.{name.removeprefix(prefix)}"] = torch.zeros_like(tensor) if zero else tensor
    return {name: tensor.contiguous() for name, tensor in grown.items()}


def _grown_tensor(name: str, tensor: torch.Tensor, copies: int) -> torch.Tensor:
    projection = name.split(".")[-2]
    if projection in READERS:  # rows: heads or inner units, most of them new; columns: the stream
        rows = torch.zeros(copies * tensor.shape[0], copies * tensor.shape[1], dtype=tensor.dtype)
        rows[: tensor.shape[0]] = tensor.tile(1, copies) / copies
        return rows
    if projection in WRITERS:  # rows: the stream; columns: heads or inner units
        columns = torch.zeros(copies * tensor.shape[0], copies * tensor.shape[1], dtype=tensor.dtype)
        columns[:, : tensor.shape[1]] = tensor.tile(copies, 1)
        return columns
    return tensor.tile(copies)


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="New folder for the inflated model.")],
    llm: Annotated[str, typer.Option(help="The small model: a folder or a hub id.")] = EMBEDDED_LLM,
    parameters: Annotated[int, typer.Option(min=1, help="About as many parameters.")] = MEMORY_BOUND_PARAMETERS,
) -> None:
    """Writes a model with the small one's logits at a large one's cost: for measuring speed, never for its text.

    The same tokenizer and the same small drafting models fit it.
    """
    try:
        shape = inflate(resolve_model(llm), out, parameters)
    except (ModelFilesError, CannotInflate) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"wrote {out}: {shape.copies} times as wide, {shape.layers} layers", err=True)


if __name__ == "__main__":
    app()
