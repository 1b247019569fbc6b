"""Random numbers that are a function of (seed, position, token id) alone: no state, no order of calls, no device.

Draft and verification see the same noise however often, wherever and in whatever batch they ask for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

# SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): the increment and the finalizer's two multipliers.
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLY_1 = 0xBF58476D1CE4E5B9
_MULTIPLY_2 = 0x94D049BB133111EB
_WORD = 2**64

# Keeps the numbers of the two kinds apart; arbitrary.
_GUMBEL_DOMAIN = 0x67756D62
_UNIFORM_DOMAIN = 0x756E6966


def gumbel_noise(
    seed: int, positions: int | Sequence[int], vocab_size: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Standard Gumbel noise of every token at a position; float64 [vocab], or [n, vocab] for n positions.

    The underlying integers are equal on every device and in every process, and a token's noise does not depend on
    vocab_size; the two logarithms may differ in the last bit between devices. argmax(log p + noise) is a draw from p
    (Gumbel-max trick).
    """
    keys = gumbel_keys(seed, [positions] if isinstance(positions, int) else positions)
    noise = gumbel_noise_of(torch.tensor(keys, dtype=torch.int64, device=device), vocab_size)
    return noise[0] if isinstance(positions, int) else noise


def gumbel_keys(seed: int, positions: Iterable[int]) -> list[int]:
    """What the noise of each position follows from, int64."""
    start = _start(seed, _GUMBEL_DOMAIN)
    return [_signed(_mix(start + position * _GAMMA)) for position in positions]


def gumbel_noise_of(keys: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """`gumbel_noise` of the positions with these `gumbel_keys`: int64 [n] -> float64 [n, vocab]."""
    tokens = torch.arange(1, vocab_size + 1, dtype=torch.int64, device=keys.device).mul_(_signed(_GAMMA))
    bits = _mix_tensor_(tokens + keys[:, None])
    # u = (top 52 bits + 1/2) / 2^52 lies strictly inside (0, 1) and is exact in float64; g = -log(-log u)
    uniforms = _logical_shift(bits, 12).double().add_(0.5).mul_(2.0**-52)
    return uniforms.log_().neg_().log_().neg_()


def uniform(seed: int, position: int, stream: int, count: int) -> list[float]:
    """`count` independent uniform numbers in (0, 1); every stream of a position has its own.

    They are independent of the Gumbel noise of the same seed.
    """
    key = _mix(_mix(_start(seed, _UNIFORM_DOMAIN) + position * _GAMMA) ^ _mix(stream % _WORD))
    return [((_mix(key + (i + 1) * _GAMMA) >> 12) + 0.5) * 2.0**-52 for i in range(count)]


def derive_seed(seed: int, choice_index: int) -> int:
    """Seed of the n-th choice of a request, in 0..2^64-1; the first choice keeps the request's own."""
    return seed if choice_index == 0 else _mix(_mix(seed) + choice_index * _GAMMA)


def _start(seed: int, domain: int) -> int:
    """What the keys of all positions of a seed have in common."""
    return _mix(_mix(seed % _WORD) ^ domain)


def _mix(word: int) -> int:
    word %= _WORD
    word = (word ^ (word >> 30)) * _MULTIPLY_1 % _WORD
    word = (word ^ (word >> 27)) * _MULTIPLY_2 % _WORD
    return word ^ (word >> 31)


def _mix_tensor_(words: torch.Tensor) -> torch.Tensor:
    """_mix on int64 [...] in place, whose products wrap modulo 2^64."""
    words.bitwise_xor_(_logical_shift(words, 30)).mul_(_signed(_MULTIPLY_1))
    words.bitwise_xor_(_logical_shift(words, 27)).mul_(_signed(_MULTIPLY_2))
    return words.bitwise_xor_(_logical_shift(words, 31))


def _logical_shift(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Right shift of int64 that fills with zeros, as for unsigned words."""
    return (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned word."""
    return word - _WORD if word >= _WORD // 2 else word
