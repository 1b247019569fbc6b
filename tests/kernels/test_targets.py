"""The native kernels built for lesser CPUs than this one: the same tests, in a process whose library is that build, and
the same bits.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from kernels.decoder_blocks.native import NativeAttentionBlock, NativeMlpBlock, rms_norm
from kernels.native import multiplies_in_tiles
from kernels.packed_linear.native import NativeLinear
from kernels.targets import portable_targets
from runtime.transformer import LoadOptions, Transformer
from tests.kernels.test_decoder_blocks import (
    LAYERS,
    PARENTS,
    attention_weights,
    empty_kv,
    mlp_weights,
    prompt_batch,
    tree_batch,
)
from tests.kernels.test_draft_loop import listed, sequences
from tests.tiny_models import write_model

ROOT = Path(__file__).parents[2]
TESTS = ("test_packed_linear.py", "test_tree_attention.py", "test_decoder_blocks.py")
PROGRAM = """
import pathlib, sys
from kernels import build

program = sys.argv[3]
flags = build.compiler_flags
build.BUILD = pathlib.Path(sys.argv[1])
build.compiler_flags = lambda machine, target=None: flags(machine, sys.argv[2])
exec(program)
"""
RUN_TESTS = f"""
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *{TESTS}]))
"""
SHOW_BITS = """
import torch
from tests.kernels.test_targets import bits_of_decoder_layers, bits_of_linear_layers, bits_of_norms, bits_of_trees
build.build()
print(bits_of_linear_layers({storages}), bits_of_norms(), bits_of_decoder_layers(), bits_of_trees("{folder}"))
"""
STORAGES = (torch.float32, torch.float16, torch.int8, torch.bfloat16)


def bits_of_linear_layers(storages: Sequence[torch.dtype] = STORAGES) -> str:
    """Digests, by storage, of what the loaded library computes."""
    torch.manual_seed(0)
    digests = {}
    for storage in storages:
        digest = sha256()
        for inputs, outputs in ((7, 3), (129, 17), (2051, 33), (512, 272)):
            int8 = storage is torch.int8
            linear = NativeLinear(torch.randn(outputs, inputs).to(torch.float32 if int8 else storage), int8=int8)
            digest.update(linear(torch.randn(19, inputs)).numpy().tobytes())
        digests[str(storage)] = digest.hexdigest()
    return str(digests)


def bits_of_norms() -> str:
    torch.manual_seed(0)
    digest = sha256()
    for size in (1, 20, 288, 1037):
        digest.update(rms_norm(torch.randn(5, size), torch.rand(size), 1e-5).numpy().tobytes())
    return digest.hexdigest()


def bits_of_decoder_layers() -> str:
    """Of fp32, on a prompt and a tree behind it."""
    digest = sha256()
    for layer in (replace(layer, dtype=torch.float32) for layer in LAYERS):
        attention, mlp = NativeAttentionBlock(attention_weights(layer)), NativeMlpBlock(mlp_weights(layer))
        kv = empty_kv(layer)
        for batch in (prompt_batch(layer, 0, 37), tree_batch(layer, 37, PARENTS)):
            hidden = attention(torch.randn(batch.rows, layer.hidden), kv, batch, residual=True)
            digest.update(hidden.numpy().tobytes())
            digest.update(mlp(hidden, residual=True).numpy().tobytes())
    return digest.hexdigest()


def bits_of_trees(folder: str) -> str:
    """Of a model's drafts: their tokens and confidences."""
    model = Transformer.load(Path(folder), LoadOptions(device="cpu"))
    trees = model.grow_trees(*sequences(model, 20, seed=5))
    return sha256(repr([listed(tree) for tree in trees]).encode()).hexdigest()


# Where this CPU has them: pairs of bf16 without tiles.
WITHOUT_TILES = [target.name for target in portable_targets()[1:2] if not target.missing()]
LESSER = ["x86-64-v3", *(pytest.param(name, marks=pytest.mark.slow) for name in (*WITHOUT_TILES, "x86-64"))]


def run_with_build(target: str, program: str, folder: Path) -> str:
    """What the program prints, with the library of that target."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), target, program],
        cwd=ROOT / "tests" / "kernels",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert len(list(folder.glob("specserve-*.so"))) == 1
    return done.stdout


needs_x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="builds for lesser x86-64 CPUs")


@needs_x86_64
@pytest.mark.parametrize("target", LESSER)
def test_lesser_targets(target: str, tmp_path: Path) -> None:
    run_with_build(target, RUN_TESTS, tmp_path)


@needs_x86_64
def test_bits_are_the_same_on_lesser_cpus(tmp_path: Path) -> None:
    """But for bf16 weights where this one multiplies them by tiles."""
    storages = STORAGES[:-1] if multiplies_in_tiles() else STORAGES
    folder = str(write_model(tmp_path / "model"))
    program = SHOW_BITS.format(storages=storages, folder=folder)
    shown = run_with_build("x86-64-v3", program, tmp_path).split()
    expected = [bits_of_linear_layers(storages), bits_of_norms(), bits_of_decoder_layers(), bits_of_trees(folder)]
    assert shown == " ".join(expected).split()
