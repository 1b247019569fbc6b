"""Pretrain a small Llama from scratch on text files.

    python -m training.pretrain --corpus text.txt --tokenizer models/default-llm --out models/default-llm
    torchrun --nproc-per-node 2 -m training.pretrain ...    # several GPUs, or several processes of a CPU

Knows nothing of speculation. Matrices are trained with Muon, the rest with AdamW, on a
warm-up / constant / linear-decay schedule, so that a run can be ended early by resuming it with fewer `--tokens`.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from training.corpus import CorpusFile, TokenArray, end_of_text, sample_windows, spread_windows, tokenize_corpus
from training.distributed import joined_group
from training.growth import start_from
from training.loop import LoopSettings, TrainingRun, autocast


class Attention(StrEnum):
    """How transformers computes it."""

    SDPA = "sdpa"
    EAGER = "eager"


def build_llama(
    vocab_size: int,
    eos: int,
    context: int,
    hidden_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate_size: int,
) -> LlamaForCausalLM:
    """A randomly initialised Llama with tied embeddings."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=eos,
        eos_token_id=eos,
        initializer_range=0.02,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: TokenArray, context: int, windows: int = 32) -> float:
    """Mean next-token loss in nats over `windows` fixed windows of held-out text."""
    model.eval()
    device = next(model.parameters()).device
    batches = spread_windows(tokens, windows, context).split(8)
    with autocast(device):
        losses = [float(model(input_ids=b.to(device), labels=b.to(device)).loss) * len(b) for b in batches]
    model.train()
    return sum(losses) / windows


def main(
    corpus: Annotated[list[str], typer.Option(help="Text file, or FILE:REPEATS; repeatable.")],
    tokenizer: Annotated[Path, typer.Option(help="Folder with tokenizer.json.")],
    out: Annotated[Path, typer.Option(help="Folder that gets the model; checkpoints go to OUT/checkpoints.")],
    init: Annotated[
        Path | None, typer.Option(help="Trained folder to go on from, as wide as the new model and at most as deep.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Training tokens in all.")] = 40_000_000,
    hidden_size: int = 384,
    layers: int = 8,
    heads: int = 6,
    kv_heads: int = 2,
    intermediate_size: int = 1024,
    context: Annotated[int, typer.Option(help="Context length that the model declares, in tokens.")] = 1024,
    window: Annotated[int, typer.Option(help="Tokens of a training window; 0 means CONTEXT.")] = 0,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of an optimiser step.")] = 8192,
    micro_batch_tokens: Annotated[int, typer.Option(help="Tokens of a forward pass.")] = 8192,
    learning_rate: float = 2e-3,
    attention: Annotated[
        Attention, typer.Option(help="How it is computed: eager is faster on a CPU at windows of some hundred tokens.")
    ] = Attention.SDPA,
    compile: Annotated[bool, typer.Option(help="Fuse operations with torch.compile.")] = True,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 means all.")] = 0,
    seed: int = 0,
) -> None:
    """Pretrain a Llama; a killed run goes on from its last checkpoint when the command is repeated."""
    with joined_group() as group:
        if threads:
            torch.set_num_threads(threads)
        torch.manual_seed(seed)
        vocabulary = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        training, held_out = tokenize_corpus([CorpusFile.parse(text) for text in corpus], vocabulary)
        if group.leads:
            typer.echo(f"{len(training):,} training tokens, {len(held_out):,} held out")
        with group.device:
            model = build_llama(
                vocabulary.get_vocab_size(),
                end_of_text(vocabulary),
                context,
                hidden_size,
                layers,
                heads,
                kv_heads,
                intermediate_size,
            )
        model.set_attn_implementation(attention.value)
        if init is not None:
            start_from(model, init)
        window = window or context
        batch = batch_tokens // window
        if batch == 0 or batch % group.size:  # else processes would wait for each other for ever
            raise typer.BadParameter(
                f"--batch-tokens {batch_tokens} is {batch} windows of {window}; give a multiple of "
                f"{group.size * window}, so that each of {group.size} processes has as many"
            )
        own = group.share(batch)
        parts = -(-len(own) // max(1, micro_batch_tokens // window))
        if compile:
            model.compile()  # in place: what is saved keeps the names of its weights
        learner = group.wrap(model)

        def loss_of_step(step: int, part: int) -> torch.Tensor:
            windows = sample_windows(training, batch, window, np.random.default_rng((seed, step)))
            ids = windows[own][part::parts].to(group.device)
            loss: torch.Tensor = learner(input_ids=ids, labels=ids).loss
            return loss * (len(ids) * group.size / batch)  # gradients are averaged over the group

        settings = LoopSettings(
            steps=tokens // batch_tokens, parts=parts, tokens_per_step=batch_tokens, learning_rate=learning_rate
        )
        run = TrainingRun(model, out, settings, "held-out loss in nats", group)
        run.train(loss_of_step, lambda: held_out_loss(model, held_out, context))
        if group.leads:
            run.export(tokenizer)
        group.wait()


if __name__ == "__main__":
    typer.run(main)
