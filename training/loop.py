"""The optimisation loop that pretraining and distillation share: schedule, checkpoints, resume, progress.

Knows nothing of what is learned: the caller gives the loss of a step.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from training.distributed import Group
from training.files import cannot_write, write_json, write_state

LossOfStep = Callable[[int, int], torch.Tensor]


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """Matrix products in bf16 where the device computes them natively, fp32 elsewhere."""
    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=native)


@dataclass(frozen=True)
class LoopSettings:
    """One run's length and learning rate.

    steps: optimiser steps in all. parts: forward passes a step. tokens_per_step: for the rate shown.
    warmup, decay: fractions of `steps` with a rising and a falling learning rate.
    """

    steps: int
    parts: int
    tokens_per_step: int
    learning_rate: float
    warmup: float = 0.02
    decay: float = 0.3
    weight_decay: float = 0.1
    evaluate_every: int = 250
    checkpoint_every: int = 50
    tell_every_s: float = 60.0  # where no bar can be drawn

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, constant, linear decay to zero."""
        rising = (step + 1) / max(1, int(self.steps * self.warmup))
        falling = (self.steps - step) / max(1, int(self.steps * self.decay))
        return self.learning_rate * min(1.0, rising, falling)


class TrainingRun:
    """Trains `model`, keeping everything needed to go on in `folder/checkpoints`.

    measure: name of what is held out. group: processes that train together; each calls this alike.
    """

    def __init__(
        self, model: PreTrainedModel, folder: Path, settings: LoopSettings, measure: str, group: Group | None = None
    ) -> None:
        self.model = model
        self._leads = group is None or group.leads
        self.measure = measure
        self.folder = folder
        self.settings = settings
        self.held_out: list[tuple[int, float]] = []
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
        chosen = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in chosen]
        rate = settings.learning_rate
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=rate, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        ]
        self.step = self._resume()

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "last.pt"

    def _resume(self) -> int:
        if not self._checkpoint.exists():
            return 0
        state = torch.load(self._checkpoint, map_location=self.model.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.held_out = [tuple(entry) for entry in state["held_out"]]
        return int(state["step"])

    def _save(self) -> None:
        """A kill at any moment leaves a whole checkpoint, this one or the one before."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "held_out": self.held_out,
        }
        write_state(self._checkpoint, state)

    def train(self, loss_of_step: LossOfStep, held_out: Callable[[], float]) -> None:
        """Run the remaining steps. `loss_of_step(step, part)` gives a share of the step's mean loss."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.model.train()
        with Progress(*columns, TimeRemainingColumn(), refresh_per_second=1, disable=not self._leads) as progress:
            bar = progress.add_task("training", total=self.settings.steps, completed=self.step)
            started, first, told = time.monotonic(), self.step, time.monotonic()
            while self.step < self.settings.steps:
                loss = self._one_step(loss_of_step)
                self.step += 1
                speed = (self.step - first) * self.settings.tokens_per_step / (time.monotonic() - started)
                line = f"loss {loss:.3f}, {speed:,.0f} tokens/s"
                progress.update(bar, advance=1, description=line)
                if not progress.console.is_terminal and time.monotonic() - told > self.settings.tell_every_s:
                    told = time.monotonic()
                    progress.console.print(f"step {self.step} of {self.settings.steps}: {line}")
                last = self.step == self.settings.steps
                if self._leads and (last or self.step % self.settings.evaluate_every == 0):
                    self.held_out.append((self.step, held_out()))
                    progress.console.print(f"step {self.step}: {self.measure} {self.held_out[-1][1]:.4f}")
                if self._leads and (last or self.step % self.settings.checkpoint_every == 0):
                    self._save()

    def _one_step(self, loss_of_step: LossOfStep) -> float:
        total = 0.0
        for part in range(self.settings.parts):
            with autocast(self.model.device):
                loss = loss_of_step(self.step, part)
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.settings.rate(self.step)
            optimizer.step()
            optimizer.zero_grad()
        return total

    def export(self, tokenizer: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write a Hugging Face folder: safetensors in `dtype`, config, tokenizer, and what was held out.

        Raises:
            CannotWrite: no space is left, or the folder cannot be written to.
        """
        module: nn.Module = self.model  # whose `to` is annotated
        module.to(dtype)
        try:
            self.model.save_pretrained(self.folder)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                if tokenizer.resolve() != self.folder.resolve():
                    shutil.copy(tokenizer / name, self.folder / name)
        except (OSError, SafetensorError) as error:
            raise cannot_write(self.folder, error) from None
        values = [{"step": step, "value": round(value, 4)} for step, value in self.held_out]
        record = {"measure": self.measure, "held_out": values}
        write_json(self.folder / "training.json", record)
