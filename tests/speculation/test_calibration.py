from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speculation.calibration import CALIBRATION_FILE, Calibration, InvalidCalibration

scales = st.floats(0.01, 100)


@settings(deadline=None)  # a disk may be slow
@given(st.builds(Calibration, scales, scales))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, calibration: Calibration) -> None:
    folder = tmp_path_factory.mktemp("ssm")
    calibration.write(folder, {"reliability": [[0.5, 0.48]], "greedy_temperature": 9})
    assert Calibration.read(folder) == calibration
    document = json.loads((folder / CALIBRATION_FILE).read_text())
    assert document["measured"] == {"reliability": [[0.5, 0.48]], "greedy_temperature": 9}


def test_what_is_not_there_has_its_default(tmp_path: Path) -> None:
    assert Calibration.read(tmp_path) == Calibration(greedy_temperature=1.0, disagreement=0.4)
    (tmp_path / CALIBRATION_FILE).write_text('{"disagreement": 2, "somebody": "else"}')
    assert Calibration.read(tmp_path) == Calibration(greedy_temperature=1.0, disagreement=2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"cannot be read \(.*\); it must be a JSON object"),
        ("\xff", "cannot be read"),
        ("[1, 2]", "holds a list; it must be a JSON object"),
        ('{"greedy_temperature": 0}', r"greedy_temperature is 0; it must be a number in 0\.01\.\.100"),
        ('{"disagreement": 101}', "disagreement is 101; "),
        ('{"disagreement": NaN}', "disagreement is nan; "),
        ('{"disagreement": "0.4"}', "disagreement is '0.4'; "),
        ('{"disagreement": true}', "disagreement is True; "),
        ('{"greedy_temperature": null}', "greedy_temperature is None; "),
    ],
)
def test_a_broken_file_is_named_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / CALIBRATION_FILE
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InvalidCalibration, match=message) as caught:
        Calibration.read(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_folder_in_the_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / CALIBRATION_FILE).mkdir()
    with pytest.raises(InvalidCalibration, match="cannot be read"):
        Calibration.read(tmp_path)


@pytest.mark.parametrize("values", [{"greedy_temperature": -1.0}, {"disagreement": math.inf}])
def test_bounds(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidCalibration, match=f"{next(iter(values))} is .*; it must be a number in"):
        Calibration(**values)


def test_measurements_that_are_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        Calibration().write(tmp_path, {"loss": math.nan})
    assert not (tmp_path / CALIBRATION_FILE).exists()
