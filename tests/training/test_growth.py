"""A deeper model starts as the function that the trained one is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from training.growth import CannotGrow, source_layers, start_from
from training.pretrain import build_llama


def llama(layers: int, width: int = 32) -> LlamaForCausalLM:
    return build_llama(60, 0, 32, width, layers, heads=2, kv_heads=1, intermediate_size=48)


@pytest.mark.parametrize("layers", range(4, 9))
def test_the_added_blocks_change_nothing_but_can_learn(layers: int, tmp_path: Path) -> None:
    torch.manual_seed(1)
    trained = llama(4)
    trained.save_pretrained(tmp_path)
    deeper = llama(layers)
    start_from(deeper, tmp_path)
    ids = torch.randint(0, 60, (2, 12))
    torch.testing.assert_close(deeper(input_ids=ids).logits, trained(input_ids=ids).logits)
    deeper(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in deeper.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_added_blocks_are_spread_over_the_depth() -> None:
    assert source_layers(4, 6) == [(0, False), (1, False), (1, True), (2, False), (3, False), (3, True)]


def test_what_cannot_grow_says_why(tmp_path: Path) -> None:
    llama(2).save_pretrained(tmp_path)
    with pytest.raises(CannotGrow, match="5 layers cannot grow from 2; ask for 2 to 4"):
        start_from(llama(5), tmp_path)
    with pytest.raises(CannotGrow, match=r"is \[60, 32\], the new model has \[60, 64\]"):
        start_from(llama(2, width=64), tmp_path)
