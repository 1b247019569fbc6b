# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# Triton has no type hints, and the parameters of a kernel are not Python values.
"""The best children of the nodes of a frontier on the GPU, in Triton: the first two launches of a level.

With T the temperature and b the scale, everything follows from the energies e = x + T g: the order of the tokens, and
log softmax((x / T + g) / b) = (e - max e) / (T b) - log sum exp((e - max e) / (T b)).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.tree_growth.levels import TreeRules, Trees

TOKEN_BITS = 20
MAX_VOCAB = 1 << TOKEN_BITS
MIN_TILE, MAX_TILE = 1024, 4096

_LAST_TOKEN = tl.constexpr(MAX_VOCAB - 1)
_LOWEST = tl.constexpr(-(2**63))
HIGHEST = tl.constexpr(2**63 - 1)
# SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): the increment and the finalizer's two multipliers.
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_MULTIPLY_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = tl.constexpr(0x94D049BB133111EB)

# Of buffers with a few numbers for each tree, which are views of larger ones and may start anywhere: code for each
# alignment would be compiled anew for each number of trees.
UNALIGNED = ["floor", "depth", "nodes", "temperature", "scale", "noise_keys", "noisy", "lengths", "block_tables"]


@triton.jit
def _gumbel_noise(key, token):
    """float64: standard Gumbel noise of tokens; the same integers on every device."""
    word = key + (token + 1).to(tl.uint64) * _GAMMA
    word = (word ^ (word >> 30)) * _MULTIPLY_1
    word = (word ^ (word >> 27)) * _MULTIPLY_2
    word = word ^ (word >> 31)
    # u = (top 52 bits + 1/2) / 2^52 lies strictly inside (0, 1) and is exact; g = -log(-log u)
    uniform = ((word >> 12).to(tl.int64).to(tl.float64) + 0.5) * 2.0**-52
    return -tl.log(-tl.log(uniform))


@triton.jit
def _energies(logits, row, tree, vocab, token, inside, temperature, noise_keys, noisy, levels, level, NOISY):
    """float64: e of tokens behind a row; -inf outside of the vocabulary."""
    place = logits + row.to(tl.int64) * vocab + token
    energy = tl.load(place, mask=inside, other=-float("inf")).to(tl.float64)
    if NOISY:  # noqa: SIM102  # decided by the compiler, the other on the device
        if tl.load(noisy + tree) != 0:
            key = tl.load(noise_keys + tree * levels + level).to(tl.uint64, bitcast=True)
            energy += tl.load(temperature + tree) * _gumbel_noise(key, token)
    return energy


@triton.jit(
    do_not_specialize=["vocab", "width", "levels", "level"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def _tile_kernel(
    logits,  # [rows, vocab]
    above,  # [rows], confidences of the rows' nodes
    temperature,
    scale,
    noise_keys,  # [trees, levels]
    noisy,
    keys,  # [rows, tiles, BEST]
    maxima,  # [rows, tiles]
    sums,
    vocab,
    width,
    levels,
    level,
    NOISY: tl.constexpr,
    TILE: tl.constexpr,
    BEST: tl.constexpr,
):
    row, tile = tl.program_id(0), tl.program_id(1)
    if tl.load(above + row) == -float("inf"):
        return
    tree = row // width
    token = tile * TILE + tl.arange(0, TILE)
    inside = token < vocab
    energy = _energies(logits, row, tree, vocab, token, inside, temperature, noise_keys, noisy, levels, level, NOISY)
    place = row * tl.num_programs(1) + tile
    top = tl.max(energy, axis=0)
    below = (energy - tl.where(top == -float("inf"), 0.0, top)) * _sharpness(temperature, scale, tree)
    tl.store(maxima + place, top)
    tl.store(sums + place, tl.sum(tl.exp(below.to(tl.float32)), axis=0))
    # Integers in the order of the energies, whose lowest bits make room for the token: of equal ones the first wins.
    bits = energy.to(tl.int64, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ HIGHEST, bits)
    key = tl.where(inside, (ordered | _LAST_TOKEN) - token, _LOWEST)
    tl.store(keys + place.to(tl.int64) * BEST + tl.arange(0, BEST), tl.topk(key, BEST))


@triton.jit
def _sharpness(temperature, scale, tree):
    """1 / (T b)"""
    return 1.0 / (tl.load(temperature + tree) * tl.load(scale + tree))


@triton.jit(
    do_not_specialize=["vocab", "width", "levels", "level", "children"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def _children_kernel(
    logits,  # [rows, vocab]
    above,  # [rows], confidences of the rows' nodes
    temperature,
    scale,
    noise_keys,  # [trees, levels]
    noisy,
    keys,  # [rows, tiles, BEST]
    maxima,  # [rows, tiles]
    sums,
    token_ids,  # [rows, children]
    confidences,
    vocab,
    width,
    levels,
    level,
    children,
    NOISY: tl.constexpr,
    BEST: tl.constexpr,
    TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0)
    rank = tl.arange(0, BEST)
    target = row * children + rank
    parent = tl.load(above + row)
    if parent == -float("inf"):
        tl.store(token_ids + target, tl.zeros([BEST], tl.int64), mask=rank < children)
        tl.store(confidences + target, tl.full([BEST], -float("inf"), tl.float64), mask=rank < children)
        return
    tree = row // width
    given = keys + row.to(tl.int64) * (TILES * BEST)
    offset = tl.arange(0, CHUNK)
    best = tl.topk(tl.load(given + offset, mask=offset < TILES * BEST, other=_LOWEST), BEST)
    for first in range(CHUNK, TILES * BEST, CHUNK):
        chunk = tl.load(given + first + offset, mask=first + offset < TILES * BEST, other=_LOWEST)
        best = tl.topk(tl.cat(best, tl.topk(chunk, BEST), can_reorder=True), BEST)
    token = _LAST_TOKEN - (best & _LAST_TOKEN)
    inside = (rank < children) & (token < vocab)
    energy = _energies(logits, row, tree, vocab, token, inside, temperature, noise_keys, noisy, levels, level, NOISY)
    tile = tl.arange(0, TILES_PADDED)
    tops = tl.load(maxima + row * TILES + tile, mask=tile < TILES, other=-float("inf"))
    shares = tl.load(sums + row * TILES + tile, mask=tile < TILES, other=0.0)
    top, sharpness = tl.max(tops, axis=0), _sharpness(temperature, scale, tree)
    total = tl.sum(shares * tl.exp((tops - top) * sharpness), axis=0)
    chance = (energy - top) * sharpness - tl.log(total)
    # Rounding must not make a child surer than its parent; NaN stays.
    tl.store(confidences + target, parent + tl.where(chance > 0, 0.0, chance), mask=rank < children)
    tl.store(token_ids + target, tl.where(inside, token, 0), mask=rank < children)


def tile_of(vocab: int, best: int, largest: int = MAX_TILE) -> int:
    """Tokens of a tile, a power of two: as few as leave the best of all tiles to one chunk, within the bounds."""
    whole: int = triton.next_power_of_2(vocab)
    wanted: int = max(MIN_TILE, triton.next_power_of_2(triton.cdiv(vocab * best, MAX_TILE)))
    return max(best, min(wanted, largest, whole))


def best_children(
    logits: torch.Tensor, rules: TreeRules, trees: Trees, largest_tile: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and confidences [S, W, children] of the best children of each node of the frontier."""
    count, width, vocab = logits.shape
    children = min(trees.confidences.shape[1], vocab)
    best = max(2, triton.next_power_of_2(children))
    tile = tile_of(vocab, best, largest_tile)
    tiles = triton.cdiv(vocab, tile)
    chunk = max(best, min(largest_tile, triton.next_power_of_2(tiles * best)))
    keys = logits.new_empty(count * width, tiles, best, dtype=torch.int64)
    maxima = logits.new_empty(count * width, tiles, dtype=torch.float64)
    sums = logits.new_empty(count * width, tiles)
    token_ids = logits.new_empty(count, width, children, dtype=torch.int64)
    confidences = logits.new_empty(count, width, children, dtype=torch.float64)
    noisy = rules.noise_keys is not None
    # without noise its pointers are not read
    noise = (rules.noise_keys, rules.noisy) if noisy else (rules.nodes, rules.nodes)
    given = (logits, trees.frontier.confidences, rules.temperature, rules.scale, *noise)
    levels = 0 if rules.noise_keys is None else rules.noise_keys.shape[1]
    sizes = (vocab, width, levels, trees.level)
    _tile_kernel[(count * width, tiles)](
        *given, keys, maxima, sums, *sizes, NOISY=noisy, TILE=tile, BEST=best, **compiler_options(tile)
    )
    _children_kernel[(count * width,)](
        *given,
        keys,
        maxima,
        sums,
        token_ids,
        confidences,
        *sizes,
        children,
        NOISY=noisy,
        BEST=best,
        TILES=tiles,
        TILES_PADDED=triton.next_power_of_2(tiles),
        CHUNK=chunk,
        **compiler_options(chunk),
    )
    return token_ids, confidences


def compiler_options(tile: int) -> dict[str, int]:
    """Of a program whose largest tensors have so many elements."""
    return {"num_warps": min(8, max(4, tile // 256)), "enable_fp_fusion": True}
