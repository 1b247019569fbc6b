"""How a small model's probabilities become estimates of what the LLM will accept. Steers drafts, never the output."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

CALIBRATION_FILE = "speculation.json"

_LEAST, _MOST = 0.01, 100.0


class InvalidCalibration(ValueError):
    """A calibration that cannot be used; the message is one line: where it stands, what was found, what is allowed."""


@dataclass(frozen=True)
class Calibration:
    """Two scales of one small model against one LLM; both fall as the model gets better.

    With q the small model's distribution, as the request's parameters make it, child x of a node is accepted with
    probability, by estimate,

    greedy_temperature: for a greedy request: P(x is the LLM's argmax) = softmax(log q / greedy_temperature)_x. Above 1
        the model is surer of itself than it should be.
    disagreement: scale b of log p - log q, taken as Gumbel noise. With shared noise g:
        P(argmax(log p + g) = x) = softmax((log q + g) / b)_x. For sampled children the first draw is accepted with
        probability 1 - TV(p, q), with TV(p, q) = 0.6 min(b, 1) (1 - sum q^2).

    Raises:
        InvalidCalibration: a value that is no number in 0.01..100.
    """

    greedy_temperature: float = 1.0
    disagreement: float = 0.4

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_scale(name, value)

    @classmethod
    def read(cls, folder: Path) -> Calibration:
        """The calibration in a model's folder: the keys of the fields in speculation.json, others are ignored.

        A field that is not there has its default; so have all without a file.

        Raises:
            InvalidCalibration: the file cannot be read, is no JSON object, or a field is out of bounds.
        """
        path = folder / CALIBRATION_FILE
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError) as error:
            raise InvalidCalibration(f"{path}: cannot be read ({error}); it must be a JSON object") from None
        if not isinstance(document, dict):
            raise InvalidCalibration(f"{path}: holds a {type(document).__name__}; it must be a JSON object")
        try:
            return cls(**{field.name: document[field.name] for field in fields(cls) if field.name in document})
        except InvalidCalibration as error:
            raise InvalidCalibration(f"{path}: {error}") from None

    def write(self, folder: Path, measurements: Mapping[str, object]) -> None:
        """Write speculation.json into a model's folder.

        measurements: what the values were fitted to and how well, for readers; JSON values, put under "measured".
        """
        document = {**asdict(self), "measured": dict(measurements)}
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / CALIBRATION_FILE).write_text(text + "\n", encoding="utf-8")


def check_scale(name: str, value: object) -> None:
    """Raise InvalidCalibration unless the value is a number that may divide log-probabilities."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not _LEAST <= value <= _MOST:  # refuses NaN too
        raise InvalidCalibration(f"{name} is {value!r}; it must be a number in {_LEAST:g}..{_MOST:g}")
