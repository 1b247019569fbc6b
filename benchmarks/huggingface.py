"""Hugging Face `generate`, plain or assisted, timed in a process of its own.

    echo '["Once upon a time"]' | python -m benchmarks.huggingface --llm models/default-llm

Reads a JSON list of prompts, writes one JSON answer a line. The time of an answer is that of `generate` alone, from
token ids to token ids: no HTTP, no tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from typing import Annotated, Any

import torch
import transformers
import typer
from transformers.generation.streamers import BaseStreamer

from benchmarks.samples import Answer
from services.common.model_files import resolve_model

WARM_UP_TOKENS = 16


class _FirstToken(BaseStreamer):
    """Notes when the first new token came."""

    def __init__(self) -> None:
        self.puts = 0
        self.time = 0.0

    def put(self, value: torch.Tensor) -> None:
        self.puts += 1
        if self.puts == 2:  # the first is the prompt
            self.time = time.perf_counter()

    def end(self) -> None:
        """Nothing is held back."""


class Generator:
    """One model, with an assistant or without."""

    def __init__(self, llm: str, assistant: str | None, dtype: str, device: str) -> None:
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_model(llm))
        self._model = _load(llm, dtype, device)
        self._assistant = None if assistant is None else _load(assistant, dtype, device)
        self._steps = 0
        self._model.register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        self._steps += 1

    def complete(self, prompt: str, new_tokens: int) -> Answer:
        """Greedy, up to end-of-text or `new_tokens`; Hugging Face's defaults for everything else."""
        ids = self._tokenizer(prompt, return_tensors="pt")["input_ids"].to(self._model.device)
        first, self._steps = _FirstToken(), 0
        started = time.perf_counter()
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            assistant_model=self._assistant,
            pad_token_id=self._model.config.eos_token_id,
            streamer=first,
        )
        tokens = output[0].tolist()
        total_s = time.perf_counter() - started
        return Answer(
            text=self._text(ids[0].tolist(), tokens),
            tokens=len(tokens) - ids.shape[1],
            events=first.puts - 1,
            llm_steps=self._steps,
            first_token_s=first.time - started,
            total_s=total_s,
        )

    def _text(self, prompt: list[int], tokens: list[int]) -> str:
        before, text = (
            self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for ids in (prompt, tokens)
        )
        return str(text).removeprefix(str(before))


def _load(name: str, dtype: str, device: str) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=getattr(torch, dtype))
    return model.eval().to(device)


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    llm: Annotated[str, typer.Option(help="Folder or hub id of the model.")],
    assistant: Annotated[str | None, typer.Option(help="The small model of assisted generation.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16: of the weights and the arithmetic.")] = "float32",
    new_tokens: Annotated[int, typer.Option(min=2, help="Most tokens of an answer.")] = 128,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all cores.")] = 0,
) -> None:
    """Answers the prompts on standard input, after a short warm-up that is not reported."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    prompts: list[str] = json.load(sys.stdin)
    generator = Generator(llm, assistant, dtype, device)
    generator.complete(prompts[0], min(WARM_UP_TOKENS, new_tokens))
    for prompt in prompts:
        print(json.dumps(dataclasses.asdict(generator.complete(prompt, new_tokens))), flush=True)


if __name__ == "__main__":
    app()
