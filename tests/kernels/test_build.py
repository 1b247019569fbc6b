"""Building the native library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kernels import build, targets


def test_a_second_build_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.build()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.build() == first


def test_the_name_follows_source_and_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = {build.shared_library_path().name}
    monkeypatch.setattr(build, "cpu_identity", lambda: "another CPU")
    names.add(build.shared_library_path().name)
    (tmp_path / "library.cpp").write_text("int answer;")
    monkeypatch.setattr(build, "SOURCE", tmp_path)
    names.add(build.shared_library_path().name)
    assert len(names) == 3


def test_no_compiler_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "BUILD", tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.main([]) == 1
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
    (target / "specserve-native-0123456789abcdef.so").write_text("old")
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setattr(build, "BUILD", target)
    assert list(target.iterdir()) != [built := build.build()]
    assert list(target.iterdir()) == [built]


def test_flags_name_the_machine_of_both_architectures() -> None:
    assert "-march=native" in build.compiler_flags("x86_64")
    assert "-mcpu=native" in build.compiler_flags("aarch64")
    assert "-march=x86-64-v3" in build.compiler_flags("x86_64", "x86-64-v3")
    assert "-march=armv8-a" in build.compiler_flags("aarch64", "armv8-a")


@pytest.fixture
def portable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A build folder with a small library for each portable target and none for this CPU; not all can run here."""
    source, folder = tmp_path / "source", tmp_path / "build"
    source.mkdir()
    (source / "library.cpp").write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setattr(build, "BUILD", folder)
    assert build.main(["portable"]) == 0
    return folder


def with_features(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, features: frozenset[str]) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor : 0\nmodel name : test\nflags : {' '.join(features)}\n\nprocessor : 1\n")
    monkeypatch.setattr(targets, "CPU_INFO", info)


def test_the_most_capable_portable_library_that_runs_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, portable: Path
) -> None:
    assert len(list(portable.iterdir())) == len(targets.portable_targets())
    for target in targets.portable_targets():
        with_features(monkeypatch, tmp_path, target.features)
        assert build.find_library() == build.shared_library_path(target.name)


def test_a_cpu_that_can_run_none_of_them_is_told_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, portable: Path
) -> None:
    least = targets.portable_targets()[-1]
    with_features(monkeypatch, tmp_path, least.features - {min(least.features)})
    with pytest.raises(build.BuildError) as error:
        build.find_library()
    message = str(error.value)
    assert f"{least.name} (this CPU lacks {min(least.features)})" in message
    assert message.startswith("the native kernels are not built for this CPU; there are libraries for ")
    assert message.endswith("; run python -m kernels.build")


def test_the_library_of_this_very_cpu_comes_first(portable: Path) -> None:
    own = build.build()
    assert build.find_library() == own
    assert len(list(portable.iterdir())) == len(targets.portable_targets()) + 1


def test_an_unknown_target_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(["x86-64-v9"]) == 2
    assert "no target 'x86-64-v9'; allowed: native, " in capsys.readouterr().err


def test_building_needs_no_torch() -> None:
    program = "import sys, kernels.build; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True, cwd=build.SOURCE.parents[1])
