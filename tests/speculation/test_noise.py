from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from speculation.noise import derive_seed, gumbel_noise, uniform
from tests.speculation.statistics import ALPHA, chi_square_p_value

GOLDEN_GUMBEL_0 = [0.8770502454783382, -0.48226675601845237, 0.32786686311107]
GOLDEN_GUMBEL_1 = [1.0250510908761865, 1.727286297106048, 0.42083749453232816]
GOLDEN_UNIFORM = [0.28065978703953254, 0.3240513491340423]
GOLDEN_SEED = 3069497704473277141


def test_values_never_change() -> None:
    """A request goes on elsewhere, perhaps under another version, with the same noise."""
    assert gumbel_noise(0, 0, 3).tolist() == pytest.approx(GOLDEN_GUMBEL_0, rel=1e-12)
    assert gumbel_noise(2**64 - 1, 1234, 3).tolist() == pytest.approx(GOLDEN_GUMBEL_1, rel=1e-12)
    assert uniform(7, 5, 1, 2) == GOLDEN_UNIFORM
    assert derive_seed(42, 3) == GOLDEN_SEED


def test_batch_and_vocabulary_do_not_matter() -> None:
    batch = gumbel_noise(7, [3, 0, 900], 1031)
    assert batch.dtype == torch.float64
    for row, position in zip(batch, [3, 0, 900], strict=True):
        assert torch.equal(row, gumbel_noise(7, position, 1031))
        assert torch.equal(row[:17], gumbel_noise(7, position, 17))
    assert gumbel_noise(7, [], 5).shape == (0, 5)


@pytest.mark.parametrize(
    "noise",
    [
        pytest.param(lambda: gumbel_noise(1, 2, 20000), id="tokens"),
        pytest.param(lambda: gumbel_noise(1, list(range(2000)), 10).flatten(), id="positions"),
        pytest.param(lambda: torch.stack([gumbel_noise(seed, 0, 2) for seed in range(5000)]).flatten(), id="seeds"),
    ],
)
def test_is_gumbel(noise: object) -> None:
    assert callable(noise)
    assert stats.kstest(noise().numpy(), "gumbel_r").pvalue > ALPHA


def test_neighbours_are_independent() -> None:
    count = 20000
    base = gumbel_noise(5, 7, count)
    others = [gumbel_noise(6, 7, count), gumbel_noise(5, 8, count), base.roll(1), gumbel_noise(5 + 2**32, 7, count)]
    for other in others:
        rho = stats.spearmanr(base.numpy(), other.numpy())
        assert rho.pvalue > ALPHA


def test_argmax_draws_from_the_distribution() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01], dtype=torch.float64)
    tokens = (gumbel_noise(11, list(range(20000)), 5) + p.log()).argmax(-1)
    assert chi_square_p_value(tokens.bincount(minlength=5).numpy(), p.numpy()) > ALPHA


def test_uniform_streams() -> None:
    draws = np.array([uniform(3, position, 1, 2) for position in range(4000)])
    assert draws.min() > 0
    assert draws.max() < 1
    assert stats.kstest(draws.ravel(), "uniform").pvalue > ALPHA
    assert stats.spearmanr(draws[:, 0], draws[:, 1]).pvalue > ALPHA
    other = np.array([uniform(3, position, 2, 1)[0] for position in range(4000)])
    assert stats.spearmanr(draws[:, 0], other).pvalue > ALPHA
    assert uniform(3, 0, 1, 5)[:2] == uniform(3, 0, 1, 2)
    gumbel = gumbel_noise(3, list(range(4000)), 1)[:, 0].numpy()
    assert stats.spearmanr(draws[:, 0], gumbel).pvalue > ALPHA


def test_derived_seeds() -> None:
    seeds = {derive_seed(seed, choice) for seed in (0, 1, 2**64 - 1) for choice in range(100)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert derive_seed(9, 0) == 9


def test_is_finite_at_the_ends() -> None:
    # The extreme values that 52 bits allow: u = 2^-53 and u = 1 - 2^-53
    assert math.isfinite(-math.log(-math.log(2.0**-53)))
    assert math.isfinite(-math.log(-math.log(1 - 2.0**-53)))
    assert gumbel_noise(0, list(range(200)), 5000).isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_same_on_the_gpu() -> None:
    on_cpu = gumbel_noise(7, [3, 4], 32003)
    on_gpu = gumbel_noise(7, [3, 4], 32003, "cuda").cpu()
    assert torch.allclose(on_cpu, on_gpu, rtol=1e-13, atol=1e-13), "the bits are equal, only the logarithms may differ"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_noise_of_the_gpu_differs_by_its_logarithms_alone() -> None:
    positions = list(range(0, 4000, 97))
    expected = gumbel_noise(2**63 + 5, positions, 1000)
    torch.testing.assert_close(gumbel_noise(2**63 + 5, positions, 1000, "cuda").cpu(), expected, atol=1e-14, rtol=1e-14)
