"""Hugging Face folders as GGUF files, llama.cpp's format, with the same weights.

llama.cpp's own script knows tokenizers by a hash of what they do and refuses any other. This one writes the vocabulary
and leaves the splitting of text alone: the benchmark sends token ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from benchmarks.configurations import Precision

FILE_TYPES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
    "float16": gguf.LlamaFileType.MOSTLY_F16,
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class CannotConvert(ValueError):
    """A model that this converter does not know; the message says what it knows."""


def write_gguf(source: Path, out: Path, precision: Precision) -> None:
    """Write the Llama in `source` with matrices in `precision`; vectors stay in float32.

    Raises:
        CannotConvert: another family, biases, scaled positions, or a tokenizer that is not byte-level BPE.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    _check(config, source)
    writer = gguf.GGUFWriter(out, "llama")
    _add_shape(writer, config)
    writer.add_file_type(FILE_TYPES[precision])
    _add_vocabulary(writer, source, config)
    for name, tensor in load_file(source / "model.safetensors").items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        _add_tensor(writer, name, tensor, config, precision)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection in llama.cpp's order.

    Within a head, Hugging Face rotates row i with row i + d/2, llama.cpp row 2i with row 2i + 1.
    """
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _check(config: dict[str, Any], source: Path) -> None:
    rope = (config.get("rope_parameters") or config.get("rope_scaling") or {}).get("rope_type", "default")
    biases = config.get("attention_bias") or config.get("mlp_bias")
    if config["model_type"] != "llama" or rope != "default" or biases:
        raise CannotConvert(
            f"{source}: only Llama models without biases and with plain rotary positions are converted, not "
            f"{config['model_type']} with {rope} positions"
        )


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _add_shape(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    head_dim = _head_dim(config)
    theta = (config.get("rope_parameters") or config).get("rope_theta", 10000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _add_vocabulary(writer: gguf.GGUFWriter, source: Path, config: dict[str, Any]) -> None:
    model = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise CannotConvert(f"{source}: only byte-level BPE tokenizers are converted, not {model['type']}")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    added = tokenizer.get_added_tokens_decoder()
    tokens, kinds = [], []
    for index in range(config["vocab_size"]):
        token = tokenizer.id_to_token(index)
        tokens.append(f"[PAD{index}]" if token is None else token)
        if token is None:
            kinds.append(gguf.TokenType.UNUSED)
        elif index in added:
            kinds.append(gguf.TokenType.CONTROL if added[index].special else gguf.TokenType.USER_DEFINED)
        else:
            kinds.append(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_add_bos_token(False)


def _add_tensor(
    writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, config: dict[str, Any], precision: Precision
) -> None:
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, inner = stem.split(".", 3)
        target = f"blk.{layer}.{NAMES[inner]}"
        if inner == "self_attn.q_proj":
            tensor = interleave(tensor, config["num_attention_heads"])
        if inner == "self_attn.k_proj":
            tensor = interleave(tensor, config.get("num_key_value_heads") or config["num_attention_heads"])
    else:
        target = OUTER_NAMES[stem]
    kind: gguf.GGMLQuantizationType | None = None
    if tensor.dim() == 1 or precision == "float32":
        data: npt.NDArray[Any] = tensor.float().numpy()
    elif precision == "float16":
        data = tensor.to(torch.float16).numpy()
    else:  # numpy has no bfloat16: its bytes, two to a number
        data = tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint8)
        kind = gguf.GGMLQuantizationType.BF16
    writer.add_tensor(f"{target}.weight", data, raw_dtype=kind)
