"""Building the native library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kernels import build


def test_a_second_build_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.build()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.build() == first


def test_the_name_follows_source_and_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = {build.library_path().name}
    monkeypatch.setattr(build, "cpu_identity", lambda: "another CPU")
    names.add(build.library_path().name)
    (tmp_path / "library.cpp").write_text("int answer;")
    monkeypatch.setattr(build, "SOURCE", tmp_path)
    names.add(build.library_path().name)
    assert len(names) == 3


def test_no_compiler_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "BUILD", tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.main() == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no C++ compiler: looked for no-such-compiler; install g++ or clang++, or set CXX to one" in error


def test_a_failing_compiler_is_quoted_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "build"
    source.mkdir()
    (source / "broken.cpp").write_text("this is not C++")
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setattr(build, "BUILD", target)
    with pytest.raises(build.BuildError, match=r"broken\.cpp"):
        build.build()
    assert list(target.iterdir()) == []


def test_stale_libraries_are_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "build"
    source.mkdir()
    target.mkdir()
    (source / "library.cpp").write_text('extern "C" int answer() { return 42; }')
    (target / "specserve-0123456789abcdef.so").write_text("old")
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setattr(build, "BUILD", target)
    assert list(target.iterdir()) != [built := build.build()]
    assert list(target.iterdir()) == [built]


def test_flags_name_the_machine_of_both_architectures() -> None:
    assert "-march=native" in build.compiler_flags("x86_64")
    assert "-mcpu=native" in build.compiler_flags("aarch64")


def test_building_needs_no_torch() -> None:
    program = "import sys, kernels.build; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True, cwd=build.SOURCE.parents[1])
