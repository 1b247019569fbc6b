"""Which settings of the peers are tried, and which rows of the table they have.

Of several candidates for a row, the fastest in a short trial on the machine and models at hand takes part.
"""

from __future__ import annotations

import json

from benchmarks.configurations import Configuration, Precision

SHORT_NAMES: dict[Precision, str] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
WIDTHS: dict[str, int] = {"float32": 32, "float16": 16, "bfloat16": 16}
"""Bits of a weight."""
LLAMA_PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "float16")
DRAFT_LENGTHS = (2, 3, 4, 6, 8)
LEAST_PROBABILITIES = (0.0, 0.5)
VLLM_DRAFT_LENGTH = 5

# The cache in float32 and no fused attention, which computes in float16: what our own arithmetic is.
EXACT = ("--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off")
EXACT_DRAFT = ("--spec-draft-type-k", "f32", "--spec-draft-type-v", "f32")
LLAMA_EXACT = Configuration(
    "llama.cpp-fp32", "llama.cpp, fp32 weights and cache", "llama.cpp", drafts=False, flags=EXACT
)


def llama_candidates() -> list[Configuration]:
    """Plain decoding with llama.cpp's own defaults for the cache (fp16) and attention, by precision of the weights."""
    return [
        Configuration("llama.cpp", f"llama.cpp, {SHORT_NAMES[dtype]}", "llama.cpp", drafts=False, dtype=dtype)
        for dtype in LLAMA_PRECISIONS
    ]


def llama_draft_candidates(plain: Configuration) -> list[Configuration]:
    """Its drafting model beside the fastest plain setting, by length of the draft and by when it stops drafting."""
    return [
        Configuration(
            "llama.cpp-draft",
            f"llama.cpp with its draft model, {SHORT_NAMES[plain.dtype]}, {length} tokens from p >= {least:g}",
            "llama.cpp",
            drafts=True,
            dtype=plain.dtype,
            flags=(
                *("--spec-type", "draft-simple", "--spec-draft-n-max", str(length)),
                *("--spec-draft-p-min", f"{least:g}", *plain.flags),
            ),
        )
        for least in LEAST_PROBABILITIES
        for length in DRAFT_LENGTHS
    ]


def vllm_configuration(dtype: Precision = "bfloat16") -> Configuration:
    """Plain decoding."""
    return Configuration("vllm", f"vLLM CPU, {SHORT_NAMES[dtype]}", "vLLM", drafts=False, dtype=dtype)


def vllm_draft_configuration(length: int = VLLM_DRAFT_LENGTH, dtype: Precision = "bfloat16") -> Configuration:
    """With the small model as its draft model; the server adds the model's name to the flags."""
    title = f"vLLM CPU with a draft model, {SHORT_NAMES[dtype]}, {length} tokens"
    flags = ("--speculative-config", json.dumps({"method": "draft_model", "num_speculative_tokens": length}))
    return Configuration("vllm-draft", title, "vLLM", drafts=True, dtype=dtype, flags=flags)
