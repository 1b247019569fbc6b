"""What a transformer looks like, read from a Hugging Face `config.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


class UnsupportedModel(ValueError):
    """A model folder that cannot be served; the message is one line and says why."""


@dataclass(frozen=True)
class RopeScaling:
    """Stretching of the rotary embedding.

    kind: "default", "linear" (Chen et al., 2023) or "llama3" (by wavelength; Llama 3.1 model card).
    original_context: context length before the stretch; low_frequency, high_frequency: the band that "llama3" blends.
    """

    kind: str = "default"
    factor: float = 1.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder of the Llama family.

    attention_bias: biases of the query, key and value projections. output_bias: bias of the output projection.
    head_norm: RMS norm of every query and key head (Qwen3).
    context_length: tokens of the longest sequence; a sliding window shortens it: up to its length it makes no
        difference, and beyond it is not implemented.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    norm_epsilon: float
    rope_theta: float
    rope_scaling: RopeScaling
    tied_embeddings: bool
    attention_bias: bool
    output_bias: bool
    head_norm: bool
    eos_token_ids: tuple[int, ...]

    @property
    def kv_entry_numel(self) -> int:
        """Numbers that one token keeps in the KV cache, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        matrices = self.hidden_size * (2 * query + 2 * key + 3 * self.intermediate_size)
        biases = self.attention_bias * (query + 2 * key) + self.output_bias * self.hidden_size
        return matrices + biases + 2 * self.hidden_size + self.head_norm * 2 * self.head_dim

    @property
    def end_parameters(self) -> int:
        """Parameters before and behind the layers: embedding, final norm and head; a tied head counts once."""
        return self.hidden_size * (self.vocab_size * (1 if self.tied_embeddings else 2) + 1)

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.end_parameters


def read_config(folder: Path) -> ModelConfig:
    """Read `folder/config.json` (and the end-of-text tokens of `generation_config.json`).

    Raises:
        UnsupportedModel: no folder, no or broken JSON, a missing key, another family, activation or RoPE type.
    """
    if not folder.is_dir():
        raise UnsupportedModel(f"{folder}: no such model folder")
    raw = _read_json(folder / "config.json")
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise UnsupportedModel(f"{folder}: model family {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    if (activation := raw.get("hidden_act", "silu")) != "silu":
        raise UnsupportedModel(f"{folder}: activation {activation!r} is not supported; supported: silu")
    if raw.get("mlp_bias"):
        raise UnsupportedModel(f"{folder}: biases in the MLP are not supported")
    if raw.get("quantization_config"):
        raise UnsupportedModel(f"{folder}: quantized checkpoints are not supported; use an fp32, fp16 or bf16 one")
    try:
        return _parse(raw, folder)
    except KeyError as error:
        raise UnsupportedModel(f"{folder}/config.json lacks the key {error}") from None


def _parse(raw: Mapping[str, Any], folder: Path) -> ModelConfig:
    family = raw["model_type"]
    heads = raw["num_attention_heads"]
    attention_bias = family == "qwen2" or bool(raw.get("attention_bias", False))
    return ModelConfig(
        family=family,
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        layers=raw["num_hidden_layers"],
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        context_length=_context_length(raw),
        norm_epsilon=raw.get("rms_norm_eps", 1e-6),
        rope_theta=float(_rope(raw).get("rope_theta") or raw.get("rope_theta") or 10000.0),
        rope_scaling=_rope_scaling(raw, folder),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=attention_bias,
        output_bias=attention_bias and family != "qwen2",
        head_norm=family == "qwen3",
        eos_token_ids=_eos_token_ids(raw, folder),
    )


def _context_length(raw: Mapping[str, Any]) -> int:
    context = int(raw["max_position_embeddings"])
    window = raw.get("sliding_window")
    if window and raw.get("use_sliding_window", True):
        return min(context, int(window))
    return context


def _rope(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    rope: Mapping[str, Any] = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    return rope


def _rope_scaling(raw: Mapping[str, Any], folder: Path) -> RopeScaling:
    rope = _rope(raw)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise UnsupportedModel(f"{folder}: RoPE type {kind!r} is not supported; supported: default, linear, llama3")
    if kind == "default":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    return RopeScaling(
        "llama3",
        float(rope["factor"]),
        float(rope["low_freq_factor"]),
        float(rope["high_freq_factor"]),
        int(rope["original_max_position_embeddings"]),
    )


def _eos_token_ids(raw: Mapping[str, Any], folder: Path) -> tuple[int, ...]:
    generation = folder / "generation_config.json"
    eos = (_read_json(generation) if generation.exists() else {}).get("eos_token_id", raw.get("eos_token_id"))
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnsupportedModel(f"{path.parent}: {path.name} is missing; a Hugging Face model folder has one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UnsupportedModel(f"{path} is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise UnsupportedModel(f"{path} holds a {type(parsed).__name__}, not an object")
    return parsed


def inverse_frequencies(config: ModelConfig) -> list[float]:
    """Angle per position of each pair of rotated channels, [head_dim / 2] (Su et al., 2021; scaling as configured)."""
    base = [config.rope_theta ** (-2 * i / config.head_dim) for i in range(config.head_dim // 2)]
    scaling = config.rope_scaling
    if scaling.kind == "linear":
        return [frequency / scaling.factor for frequency in base]
    if scaling.kind == "llama3":
        return [_llama3_frequency(frequency, scaling) for frequency in base]
    return base


def _llama3_frequency(frequency: float, scaling: RopeScaling) -> float:
    # Turns within the original context decide: few turns are stretched, many are kept, between them a linear blend.
    turns = scaling.original_context * frequency / (2 * math.pi)
    keep = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
    keep = min(1.0, max(0.0, keep))
    return (1 - keep) * frequency / scaling.factor + keep * frequency
