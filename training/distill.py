"""Distil a small speculative model (SSM) from a language model's own outputs.

    python -m training.distill --llm models/default-llm --corpus text.txt --out models/default-ssm

The LLM first continues passages of the corpus, greedily and sampled; then the SSM learns the LLM's distribution
(Hinton et al., 2015) on those continuations and on the corpus, whose windows alternate in each step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import track
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from training.corpus import CorpusFile, TokenArray, sample_windows, spread_windows, tokenize_corpus
from training.loop import LoopSettings, TrainingRun, autocast, pick_device
from training.pretrain import build_llama

PROMPT_TOKENS = 32
BATCH = 64


@torch.inference_mode()
def continuations(llm: Any, corpus: TokenArray, tokens: int, length: int, file: Path) -> TokenArray:
    """The LLM's continuations of random passages, `tokens` in all, in rows of `length`: half greedy, half sampled.

    They are kept in `file`, so that a repeated call goes on where the last one was ended.
    """
    rows = list(np.load(file)) if file.exists() else []
    rounds = -(-tokens // (BATCH * length))
    for index in track(range(len(rows) // BATCH, rounds), description="LLM outputs"):
        rng = np.random.default_rng((17, index))
        prompts = sample_windows(corpus, BATCH, PROMPT_TOKENS, rng).to(llm.device)
        torch.manual_seed(index)
        with autocast(llm.device):
            output = llm.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=index % 2 == 1,
                top_k=0,
                min_new_tokens=length - PROMPT_TOKENS,
                max_new_tokens=length - PROMPT_TOKENS,
                pad_token_id=llm.config.eos_token_id,
            )
        rows.extend(output.cpu().numpy().astype(np.uint16))
        np.save(file, np.stack(rows))
    return np.stack(rows)


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over positions of KL(teacher || student), from logits [windows, length, vocab]."""
    return functional.kl_div(
        functional.log_softmax(student.float().flatten(0, 1), dim=-1),
        functional.log_softmax(teacher.float().flatten(0, 1), dim=-1),
        reduction="batchmean",
        log_target=True,
    )


@torch.inference_mode()
def agreement(student: PreTrainedModel, llm: PreTrainedModel, windows: torch.Tensor) -> float:
    """How often the student's most likely token is the LLM's, over all positions of `windows`."""
    hits = 0
    for batch in windows.split(8):
        with autocast(student.device):
            own, other = student(input_ids=batch).logits, llm(input_ids=batch).logits
        hits += int((own.argmax(-1) == other.argmax(-1)).sum())
    return hits / windows.numel()


def main(
    llm: Annotated[Path, typer.Option(help="Folder of the language model.")],
    corpus: Annotated[list[str], typer.Option(help="Text file, or FILE:REPEATS; repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder that gets the SSM; checkpoints go to OUT/checkpoints.")],
    tokens: Annotated[int, typer.Option(help="Training tokens in all.")] = 8_000_000,
    output_tokens: Annotated[int, typer.Option(help="Tokens of the LLM's own outputs to learn from.")] = 1_500_000,
    hidden_size: int = 192,
    layers: int = 2,
    heads: int = 3,
    kv_heads: int = 1,
    intermediate_size: int = 384,
    window: Annotated[int, typer.Option(help="Tokens of a training window.")] = 256,
    batch: Annotated[int, typer.Option(help="Windows of an optimiser step.")] = 32,
    learning_rate: float = 3e-3,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 means all.")] = 0,
    seed: int = 0,
) -> None:
    """Distil an SSM; a killed run goes on from its last checkpoint when the command is repeated."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    teacher: Any = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
    teacher.to(pick_device()).eval()
    text, held_out = tokenize_corpus([CorpusFile.parse(name) for name in corpus], _tokenizer(llm))
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    outputs = continuations(teacher, text, output_tokens, window, out / "checkpoints" / "outputs.npy")
    own_held_out, own = outputs[:BATCH], outputs[BATCH:]
    with teacher.device:
        student = build_llama(
            teacher.config.vocab_size,
            teacher.config.eos_token_id,
            teacher.config.max_position_embeddings,
            hidden_size,
            layers,
            heads,
            kv_heads,
            intermediate_size,
        )

    def loss_of_step(step: int, part: int) -> torch.Tensor:
        rng = np.random.default_rng((seed, step))
        rows = own[rng.integers(0, len(own), batch // 2)].astype(np.int64)
        windows = torch.cat([sample_windows(text, batch - batch // 2, window, rng), torch.from_numpy(rows)])
        windows = windows.to(teacher.device)
        with torch.no_grad():
            target = teacher(input_ids=windows).logits
        return distillation_loss(student(input_ids=windows).logits, target)

    settings = LoopSettings(
        steps=tokens // (batch * window), parts=1, tokens_per_step=batch * window, learning_rate=learning_rate
    )
    run = TrainingRun(student, out, settings, "share of held-out positions where the LLM's first choice differs")
    windows = torch.cat([torch.from_numpy(own_held_out.astype(np.int64)), spread_windows(held_out, BATCH, window)])
    windows = windows.to(teacher.device)
    run.train(loss_of_step, lambda: 1 - agreement(student, teacher, windows))
    run.export(llm)


def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


if __name__ == "__main__":
    typer.run(main)
