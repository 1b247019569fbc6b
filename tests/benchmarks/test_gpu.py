"""The parts of the GPU benchmark that need no GPU, and what it says without one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.dense_attention import Tree
from kernels.backend import choose_backend
from kernels.tree_attention import reference
from runtime.transformer import Transformer

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
TINY = replace(
    gpu.LLAMA_7B, vocab_size=100, hidden_size=48, intermediate_size=80, layers=2, heads=4, kv_heads=2, head_dim=12,
    context_length=64,
)  # fmt: skip

# torch says that flex attention is slow when it is not compiled, and means the user
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


@pytest.mark.parametrize("peer", gpu.PEERS)
@pytest.mark.parametrize(("context", "nodes"), [(1, 1), (37, 9), (130, 64)])
def test_peers_compute_what_ours_computes(peer: str, context: int, nodes: int) -> None:
    tree = Tree.binary(context, nodes, CPU)
    query, kv = torch.randn(nodes, 4, 16), torch.randn(2, 208, 2, 16)
    expected = tree.attend(reference.tree_attention, query, kv[0], kv[1])
    actual = tree.attend(gpu.PEERS[peer](tree), query, kv[0], kv[1])
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("peer", gpu.PEERS)
def test_a_step_with_a_peers_attention_gives_the_same_logits(peer: str) -> None:
    weights, backend = gpu.random_weights(TINY, CPU, torch.float32), choose_backend(CPU, "torch")
    other = gpu.with_attention(backend, gpu.PEERS[peer](Tree.binary(40, 8, CPU)))
    models = [Transformer(TINY, *weights, one, CPU) for one in (backend, other)]
    with torch.inference_mode():
        expected, actual = (gpu.Step.of(model, 40, 8)() for model in models)
    assert expected.shape == (8, 100)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_the_tree_is_binary() -> None:
    visible = Tree.binary(2, 7, CPU).visible()[:, 2:]
    assert visible.sum(1).tolist() == [1, 2, 2, 3, 3, 3, 3]
    assert visible[5].nonzero().squeeze(1).tolist() == [0, 2, 5]


def test_floors() -> None:
    # 2 * 20 keys and values of 2 heads, 2 * 3 queries and results of 4 heads, of 8 numbers of 2 bytes
    assert gpu.attention_bytes(20, 3, 4, 2, 8, 2) == (2 * 20 * 2 + 2 * 3 * 4) * 8 * 2
    ends, layers = gpu.random_weights(TINY, CPU, torch.float32)
    matrices = [m for layer in layers for m in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    assert gpu.weight_bytes(TINY, 4) == 4 * sum(matrix.numel() for matrix in [*matrices, ends.head])
    assert gpu.weight_bytes(gpu.LLAMA_7B, 2) == pytest.approx(13.2e9, rel=0.01)


def test_lines_of_the_tables() -> None:
    # 1 MB in a millisecond is 1 GB/s
    line = gpu.attention_line(1024, 8, {"ours": 0.001, "flex attention": 0.5}, moved=2_000_000, rate=4e12)
    assert line == ["1024", "8", "0.0010", "0.5000", "2.00", "50%"]
    times = {"ours": 3.6, "on the device": 3.3, "SDPA, dense mask": 9.0}
    assert gpu.step_line(16, times, floor_ms=3.0) == ["16", "3.600", "3.300", "9.000", "1.20", "1.10"]


def test_a_peer_that_fails_costs_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    def failing() -> float:
        raise RuntimeError("no kernel for this shape")

    assert gpu.or_failure("flex attention", lambda: 2.0) == 2.0
    failed = gpu.or_failure("flex attention", failing)
    assert "flex attention failed: no kernel for this shape" in capsys.readouterr().err
    line = gpu.attention_line(1024, 8, {"ours": 0.001, "flex attention": failed}, moved=2_000_000, rate=4e12)
    assert line == ["1024", "8", "0.0010", "fails", "2.00", "50%"]


def test_without_a_device_it_says_so_and_fails(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "gpu.md")],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())
