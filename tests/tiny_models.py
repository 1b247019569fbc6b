"""Models of random weights in the shapes that matter, written as Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 320
CONTEXT = 256

# Odd sizes on purpose: head groups of 1, 2 and 3, head_dim apart from hidden / heads, widths that no vector divides.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-mha-tied": {"model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama-gqa": {"model_type": "llama", "num_key_value_heads": 2, "intermediate_size": 100},
    "llama3-rope": {
        "model_type": "llama",
        "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama-linear-rope-bias": {
        "model_type": "llama",
        "attention_bias": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    },
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "head_dim": 24, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "num_attention_heads": 6, "hidden_size": 96},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
}


def write_tokenizer(folder: Path, seed: str = "") -> None:
    """A byte-level BPE of VOCAB entries; another `seed` gives other merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = f"{seed} the cat sat on the mat and the dog ran to the house where a child was singing a song of summer days"
    tokenizer.train_from_iterator([text] * 20, trainer)
    extra = VOCAB - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<extra{seed}{i}>" for i in range(extra)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_model(
    folder: Path,
    shape: str = "llama-gqa",
    seed: int = 0,
    tokenizer_seed: str = "",
    scale: float = 1.0,
    **overrides: Any,
) -> Path:
    """Write a random model with its tokenizer; return the folder.

    `scale` widens the logits.
    """
    options: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "initializer_range": 0.2,
    }
    options |= SHAPES[shape] | overrides
    config = transformers.AutoConfig.for_model(**options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            model.get_output_embeddings().weight.mul_(scale)
    model.save_pretrained(folder)
    write_tokenizer(folder, tokenizer_seed)
    return folder


def hugging_face_greedy(folder: Path, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy continuation by Hugging Face `generate`, stopping at the end-of-text token."""
    return hugging_face_texts(folder, [prompt], new_tokens)[0]


def hugging_face_texts(folder: Path, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy continuations, one prompt after the other, on one thread: two starve on a busy machine."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_greedy(model, prompt, new_tokens) for prompt in prompts]
    finally:
        torch.set_num_threads(threads)


def _greedy(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def write_relative(folder: Path, llm: Path, noise: float, seed: int = 1) -> Path:
    """Write a model whose guesses often are the LLM's: the LLM with `noise` times each weight's own spread added."""
    model = transformers.AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter.std() if parameter.numel() > 1 else 0.0
            parameter.add_(noise * spread * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((llm / name).read_bytes())
    return folder
