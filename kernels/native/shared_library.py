"""Loading the native library and declaring what it offers. Nothing here compiles anything."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_uint64, c_void_p
from functools import cache
from typing import TypeVar

import torch

from kernels.build import BuildError, find_library
from kernels.native.structures import (
    AttentionBatchStruct,
    AttentionLayerStruct,
    DecoderStruct,
    DraftSequenceStruct,
    DraftsStruct,
    GrownTreeStruct,
    KvCacheStruct,
    LinearStruct,
    MlpLayerStruct,
    ScaleTablesStruct,
    UnionsStruct,
)

_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "specserve_set_threads": (None, [c_int32]),
    "specserve_get_threads": (c_int32, []),
    "specserve_multiplies_in_tiles": (c_int32, []),
    "specserve_packed_words": (c_int64, [c_int32, c_int32, c_int64, c_int64]),
    "specserve_pack_linear": (None, [c_void_p, c_int32, c_int32, c_int64, c_int64, c_void_p]),
    "specserve_packed_linear": (None, [POINTER(LinearStruct), c_void_p, c_int64, c_void_p]),
    "specserve_rms_norm": (None, [c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p]),
    "specserve_tree_attention": (
        None,
        [
            POINTER(AttentionBatchStruct),
            c_void_p,
            c_void_p,
            c_void_p,
            c_int32,
            c_int64,
            c_int64,
            c_int64,
            c_float,
            c_void_p,
        ],
    ),
    "specserve_attention_block": (
        None,
        [
            POINTER(AttentionLayerStruct),
            POINTER(AttentionBatchStruct),
            c_void_p,
            c_void_p,
            c_int64,
            c_int32,
            c_int32,
            c_void_p,
        ],
    ),
    "specserve_mlp_block": (None, [POINTER(MlpLayerStruct), c_void_p, c_int64, c_int32, c_void_p]),
    "specserve_decoder_step": (
        c_int64,
        [
            POINTER(DecoderStruct),
            POINTER(KvCacheStruct),
            c_void_p,
            c_void_p,
            POINTER(AttentionBatchStruct),
            c_void_p,
            c_int64,
            c_void_p,
            c_void_p,
        ],
    ),
    "specserve_grow_trees": (
        None,
        [
            POINTER(DecoderStruct),
            POINTER(KvCacheStruct),
            c_int64,
            POINTER(DraftSequenceStruct),
            c_int64,
            POINTER(GrownTreeStruct),
        ],
    ),
    "specserve_gumbel_noise": (None, [c_uint64, c_int64, c_int64, c_void_p]),
    "specserve_draw_tokens": (None, [c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p]),
    "specserve_merge_trees": (
        None,
        [POINTER(ScaleTablesStruct), POINTER(DraftsStruct), c_int64, POINTER(UnionsStruct)],
    ),
    "specserve_kv_compaction": (None, [c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int64]),
}


Library = TypeVar("Library", bound=ctypes.CDLL)


class NativeUnavailable(RuntimeError):
    """The native kernels are not built for this machine; the message says what to do."""


@cache
def load() -> ctypes.CDLL:
    """The library, loaded once, with as many threads as torch has at that time.

    Raises:
        NativeUnavailable: it is not built for this source and this CPU, or it cannot be loaded.
    """
    library = _loaded(ctypes.CDLL)
    library.specserve_set_threads(torch.get_num_threads())
    return library


@cache
def load_for_short_calls() -> ctypes.PyDLL:
    """The same library, but a call keeps the interpreter.

    A call of load()'s gives it away, and behind it waits until the thread that has taken it gives it back. For one that
    takes microseconds that is most of the time.
    """
    load()
    return _loaded(ctypes.PyDLL)


def _loaded(kind: type[Library]) -> Library:
    try:
        path = find_library()
    except BuildError as error:
        raise NativeUnavailable(str(error)) from None
    try:
        library = kind(str(path))
    except OSError as error:
        raise NativeUnavailable(f"{path} cannot be loaded: {error}; run python -m kernels.build again") from error
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library


def native_available() -> bool:
    try:
        load()
    except NativeUnavailable:
        return False
    return True


def native_status() -> str:
    """The loaded library's path, or why there is none."""
    try:
        load()
    except NativeUnavailable as error:
        return str(error)
    return f"loaded {find_library().name}"


def set_num_threads(threads: int) -> None:
    """Threads of every later call in this process, the caller included; they share one pool.

    Raises:
        ValueError: less than one.
    """
    if threads < 1:
        raise ValueError(f"{threads} threads; at least 1 is needed")
    load().specserve_set_threads(threads)


def multiplies_in_tiles() -> bool:
    """Whether bfloat16 weights are multiplied by the tiles of AMX, which add in an order of their own."""
    return bool(load().specserve_multiplies_in_tiles())


def get_num_threads() -> int:
    return int(load().specserve_get_threads())
