"""The kernels for the CPU: C++ that is built for the machine at set-up and loaded with ctypes."""

from kernels.native.shared_library import (
    NativeUnavailable,
    get_num_threads,
    multiplies_in_tiles,
    native_available,
    native_status,
    set_num_threads,
)

__all__ = [
    "NativeUnavailable",
    "get_num_threads",
    "multiplies_in_tiles",
    "native_available",
    "native_status",
    "set_num_threads",
]
