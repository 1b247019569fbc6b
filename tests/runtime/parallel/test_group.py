"""Groups of real processes over Gloo against one process, in every shape of model, degree and storage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, but not declared so

from kernels.backend import RequestedName
from runtime.config import read_config
from runtime.kv_cache import KVCache
from runtime.parallel.sharding import Degrees
from runtime.transformer import LoadOptions, Transformer
from tests.runtime.parallel.scenario import BLOCKS, CHAINS, TOKENS, VOCAB, play
from tests.tiny_models import write_model

TIMEOUT_S = 240
# Heads 8 over KV heads 2 and 1: at four ranks KV heads are held twice or by all. Three layers make unequal stages.
MODELS: dict[str, dict[str, Any]] = {
    "llama-mha-tied": {},
    "llama-gqa": {"num_attention_heads": 8},
    "llama3-rope": {},
    "llama-linear-rope-bias": {},
    "qwen2": {"num_attention_heads": 8},
    "qwen3": {},
}
DEGREES = ((2, 1), (1, 2), (2, 2), (4, 1))
# Folder, degrees, kernels, type of the weights.
Case = tuple[str, tuple[int, int], RequestedName, str]
CASES: list[Case] = [(name, degrees, "native", "auto") for name in MODELS for degrees in DEGREES]
CASES += [("llama-gqa", (2, 1), "torch", "auto"), ("llama-gqa", (2, 2), "native", "bfloat16")]
# Each rank of a stage rounds its own part of a row to int8, so that tensor parallelism makes yet another model of it.
CASES += [("llama-gqa", (1, 2), "native", "int8")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    shape = {"vocab_size": VOCAB, "num_hidden_layers": 3}
    return {name: write_model(folder / name, name, **(shape | options)) for name, options in MODELS.items()}


def run_cases(cases: list[Case], folders: dict[str, Path], out: Path, device: str) -> dict[Any, list[dict[str, Any]]]:
    """What each rank of each case has written; the same processes play all cases."""
    described = [
        {
            "folder": str(folders[name]),
            "tensor": tensor,
            "pipeline": pipeline,
            "device": device,
            "kernels": kernels,
            "dtype": dtype,
            "out": f"{out}/{index}",
        }
        for index, (name, (tensor, pipeline), kernels, dtype) in enumerate(cases)
    ]
    (out / "cases.json").write_text(json.dumps(described))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [sys.executable, "-m", "tests.runtime.parallel.rank_program", str(out / "cases.json")]
    most = max(Degrees(*degrees).ranks for _, degrees, _, _ in cases)
    processes = [
        subprocess.Popen([*command, str(rank), str(store.port)], stderr=subprocess.PIPE, text=True)
        for rank in range(most)
    ]
    try:
        errors = [process.communicate(timeout=TIMEOUT_S)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * most, "\n".join(errors)
    return {
        case: [torch.load(f"{out}/{index}.{rank}") for rank in range(Degrees(*case[1]).ranks)]
        for index, case in enumerate(cases)
    }


@pytest.fixture(scope="module")
def ranks(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[dict[str, Any]]]:
    return run_cases(CASES, folders, tmp_path_factory.mktemp("ranks"), "cpu")


@pytest.fixture(scope="module")
def whole(folders: dict[str, Path]) -> dict[Any, tuple[Transformer, KVCache, dict[str, torch.Tensor]]]:
    """What one process gives, by model, kernels and type."""
    results = {}
    for name, kernels, dtype in {(name, kernels, dtype) for name, _, kernels, dtype in CASES}:
        model = Transformer.load(folders[name], LoadOptions(device="cpu", dtype=dtype, kernels=kernels))
        cache = KVCache(model.config, BLOCKS, model.device, model.kv_dtype)
        results[name, kernels, dtype] = (model, cache, play(model, cache))
    return results


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_group_computes_what_one_process_does(case: Any, ranks: Any, whole: Any) -> None:
    played = ranks[case][0]["played"]
    name, _, *storage = case
    expected = whole[name, *storage][2]
    assert played.keys() == expected.keys()
    for part, logits in expected.items():
        if part in TOKENS:
            assert torch.equal(played[part], logits)
        else:
            # a sum that differs in its last bit may be rounded the other way to bfloat16
            tolerance = 5e-2 if case[3] == "bfloat16" else 2e-4
            torch.testing.assert_close(played[part], logits, rtol=2e-4, atol=tolerance)


@pytest.mark.parametrize("case", [case for case in CASES if case[2] == "native"], ids=str)
def test_a_rows_bits_do_not_depend_on_its_batch(case: Any, ranks: Any) -> None:
    played = ranks[case][0]["played"]
    assert len(played["together"]) == sum(CHAINS)
    assert torch.equal(played["together"], played["alone"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_cache_of_a_rank_holds_its_layers_and_kv_heads(case: Any, ranks: Any, whole: Any) -> None:
    name, (tensor, _), *storage = case
    model, cache, _ = whole[name, *storage]
    assert {rank["blocks"] for rank in ranks[case]} == {BLOCKS}, "the least of any rank"
    held_twice = max(1, tensor // model.config.kv_heads)
    assert sum(rank["cache"] for rank in ranks[case]) == cache.data.nbytes * held_twice
    for index, rank in enumerate(ranks[case]):
        share = len(rank["layers"]) / model.config.layers
        assert rank["cache"] == cache.data.nbytes * share / min(tensor, model.config.kv_heads)
        assert rank["layers"] == ranks[case][index - index % tensor]["layers"], "a stage's ranks share its layers"
    assert sorted(layer for rank in ranks[case][::tensor] for layer in rank["layers"]) == [0, 1, 2]


def test_the_memory_for_weights_shrinks_with_the_ranks(tmp_path: Path) -> None:
    """Of the processes, with weights packed for their kernels, some 300 MB: other things vary by 20."""
    large: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 20,
        "num_attention_heads": 8,
    }
    folders = {"large": write_model(tmp_path / "model", "llama-gqa", vocab_size=VOCAB, **large)}
    held: dict[tuple[int, int], int] = {}
    for degrees in ((1, 1), (2, 1), (2, 2)):  # fresh processes: memory that was given back may be taken again
        case: Case = ("large", degrees, "native", "auto")
        (out := tmp_path / f"{degrees}").mkdir()
        held[degrees] = max(rank["weights"] for rank in run_cases([case], folders, out, "cpu")[case])
    config = read_config(folders["large"])
    assert held[1, 1] >= 4 * config.parameters
    assert held[2, 1] < 0.65 * held[1, 1]
    assert held[2, 2] < 0.4 * held[1, 1]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_one_broadcast_and_its_accepted_paths_are_another(case: Any, ranks: Any) -> None:
    for rank in ranks[case][1:]:
        orders = rank["orders"]
        tree = 1 + len(CHAINS)  # steps before it
        assert orders[tree : tree + 3] == ["StepPlan", "AcceptedPaths", "StepPlan"]
        assert orders.count("AcceptedPaths") == 2, "a step that moves nothing says nothing"
        grown, end = 1, 1
        assert rank["broadcasts"] == len(orders) + grown + end, "of two long plans only the first has two"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_accepted_paths_are_kept_before_another_step_is_planned(case: Any, ranks: Any) -> None:
    for rank in ranks[case][1:]:
        assert rank["orders"][-1] == "AcceptedPaths", "no step follows"
        sources, targets = rank["moved"].unbind(2)
        assert torch.equal(sources, targets)
        assert sources.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_group_of_one_on_a_device(folders: dict[str, Path], tmp_path: Path) -> None:
    case: Case = ("llama-gqa", (1, 1), "auto", "bfloat16")
    (rank,) = run_cases([case], folders, tmp_path, "cuda:0")[case]
    model = Transformer.load(folders["llama-gqa"], LoadOptions(device="cuda", dtype="bfloat16"))
    expected = play(model, KVCache(model.config, BLOCKS, model.device, model.kv_dtype))
    for part in ("together", "tree", "following"):
        torch.testing.assert_close(rank["played"][part], expected[part], rtol=5e-2, atol=5e-2)
