"""The native library is built for the tests, whatever ran before them."""

from __future__ import annotations

import pytest

from kernels.build import build
from kernels.native import set_num_threads


@pytest.fixture(scope="session", autouse=True)
def native_library() -> None:
    build()
    set_num_threads(2)
