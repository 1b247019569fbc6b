from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest

from services.common.command_line import run_command
from services.common.settings import ServiceSettings, SettingsError, load_settings, setting, to_flags


class Rule(enum.Enum):
    GREEDY = "greedy"
    NAIVE = "naive"


@dataclass(frozen=True, kw_only=True)
class Example(ServiceSettings):
    """An example."""

    llm: str = setting("Folder or hub id.")
    draft_nodes: int = setting("Nodes of a draft.", default=16, minimum=0, maximum=256)
    ratio: float = setting("Share.", default=0.5, minimum=0)
    speculator: tuple[str, ...] = setting("Addresses.", default=())
    widths: tuple[int, ...] = setting("Widths.", default=(1, 1, 3), minimum=1)
    verbose: bool = setting("Say more.", default=False)
    cache: Path | None = setting("Cache folder.", default=None)
    dtype: Literal["float32", "bfloat16"] = setting("Storage type.", default="float32")
    rule: Rule = setting("Acceptance rule.", default=Rule.GREEDY)


def load(
    toml: str | None = None,
    environ: Mapping[str, str] | None = None,
    folder: Path | None = None,
    **flags: Any,
) -> Example:
    config = None
    if toml is not None:
        assert folder is not None
        config = folder / "config.toml"
        config.write_text(toml)
    return load_settings(
        Example, "verifier", flags={"llm": "m", "insecure": True, **flags}, config=config, environ=environ or {}
    )


def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(tmp_path: Path) -> None:
    toml = "[verifier]\ndraft_nodes = 2\n"
    environ = {"SPECSERVE_VERIFIER_DRAFT_NODES": "3"}
    assert load().draft_nodes == 16
    assert load(toml, folder=tmp_path).draft_nodes == 2
    assert load(toml, environ, tmp_path).draft_nodes == 3
    assert load(toml, environ, tmp_path, draft_nodes="4").draft_nodes == 4


def test_every_type_from_every_source(tmp_path: Path) -> None:
    toml = """
    [verifier]
    draft_nodes = 8
    ratio = 1
    speculator = ["a:1", "b:2"]
    widths = [2, 1]
    verbose = true
    cache = "/c"
    dtype = "bfloat16"
    rule = "naive"
    """
    texts = {
        "draft_nodes": "8",
        "ratio": "1",
        "speculator": "a:1, b:2",
        "widths": "2,1",
        "verbose": "yes",
        "cache": "/c",
        "dtype": "bfloat16",
        "rule": "naive",
    }
    expected = Example(
        llm="m",
        draft_nodes=8,
        ratio=1.0,
        speculator=("a:1", "b:2"),
        widths=(2, 1),
        verbose=True,
        cache=Path("/c"),
        dtype="bfloat16",
        rule=Rule.NAIVE,
        insecure=True,
    )
    environ = {f"SPECSERVE_VERIFIER_{key.upper()}": value for key, value in texts.items()}
    flags: dict[str, Any] = texts | {"speculator": ["a:1", "b:2"], "widths": ["2", "1"], "verbose": True}
    assert load(toml, folder=tmp_path) == load(environ=environ) == load(**flags) == expected
    assert isinstance(load(**flags).ratio, float)


def test_flags_made_from_values_give_the_same_values(capsys: pytest.CaptureFixture[str]) -> None:
    values: dict[str, object] = {
        "llm": "m",
        "draft_nodes": 3,
        "speculator": ("a:1", "b:2"),
        "verbose": False,
        "cache": None,
        "rule": Rule.NAIVE,
        "insecure": True,
    }
    seen: list[Example] = []

    def run(settings: Example, config: Path | None) -> int:
        seen.append(settings)
        return 7

    with pytest.raises(SystemExit) as exit_:
        run_command(Example, "verifier", run, to_flags(values))
    assert exit_.value.code == 7
    assert seen == [Example(llm="m", draft_nodes=3, speculator=("a:1", "b:2"), rule=Rule.NAIVE, insecure=True)]


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[verifier]\ndraft_node = 1", "unknown key 'draft_node' in [verifier]; did you mean 'draft_nodes'?"),
        ("[verifier]\ncolour = 1", "unknown key 'colour' in [verifier]; allowed: "),
        ("[verify]\n", "unknown key 'verify' at the top; allowed: the tables [gateway], "),
        ("draft_nodes = 1", "unknown key 'draft_nodes' at the top"),
        ("[verifier]\ndraft_nodes = '1'", "draft_nodes in [verifier]: got '1'; allowed: an integer"),
        ("[verifier]\ndraft_nodes = true", "draft_nodes in [verifier]: got True; allowed: an integer"),
        ("[verifier]\ndraft_nodes = 257", "draft_nodes in [verifier]: got 257; allowed: from 0 to 256"),
        ("[verifier]\nratio = -1", "ratio in [verifier]: got -1.0; allowed: at least 0"),
        ("[verifier]\nratio = nan", "ratio in [verifier]: got nan; allowed: at least 0"),
        ("[verifier]\nwidths = [1, 0]", "widths in [verifier]: got 0; allowed: at least 1"),
        ("[verifier]\nspeculator = 'a:1'", "speculator in [verifier]: got 'a:1'; allowed: a list of texts"),
        ("[verifier]\ndtype = 'int8'", "dtype in [verifier]: got 'int8'; allowed: one of float32, bfloat16"),
        ("[verifier]\nrule = 'best'", "rule in [verifier]: got 'best'; allowed: one of greedy, naive"),
        ("[verifier\n", "not TOML"),
    ],
)
def test_bad_files_are_named(toml: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as error:
        load(toml, folder=tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_environment_and_flags_are_named() -> None:
    with pytest.raises(SettingsError, match="SPECSERVE_VERIFIER_DRAFT_NODES: got 'x'; allowed: an integer"):
        load(environ={"SPECSERVE_VERIFIER_DRAFT_NODES": "x"})
    with pytest.raises(SettingsError, match="unknown environment variable SPECSERVE_VERIFIER_DRAFT; did you mean"):
        load(environ={"SPECSERVE_VERIFIER_DRAFT": "1"})
    with pytest.raises(SettingsError, match="--verbose: got 'maybe'; allowed: true or false"):
        load(verbose="maybe")
    with pytest.raises(SettingsError, match=r"--config /nowhere\.toml: cannot read it"):
        load_settings(Example, "verifier", config=Path("/nowhere.toml"), environ={})


def test_a_missing_setting_says_how_to_give_it() -> None:
    with pytest.raises(SettingsError) as error:
        load_settings(Example, "verifier", environ={})
    for way in ("--llm", "SPECSERVE_VERIFIER_LLM", "[verifier]", "Folder or hub id"):
        assert way in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"insecure": False}, "no certificates: give --tls-cert, --tls-key and --tls-ca, or --insecure"),
        ({"tls_ca": "/ca"}, "both --insecure and --tls-ca are given; give --insecure or certificates"),
        ({"insecure": False, "tls_cert": "/c"}, "--tls-cert is given without --tls-key and --tls-ca"),
        ({"insecure": False, "tls_cert": "/c", "tls_ca": "/ca"}, "--tls-cert is given without --tls-key;"),
    ],
)
def test_certificates_or_insecure(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as error:
        load(**flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_environment_names_the_file(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[verifier]\nllm = 'from the file'\n[gateway]\nport = 1\n")
    settings = load_settings(Example, "verifier", flags={"insecure": True}, environ={"SPECSERVE_CONFIG": str(config)})
    assert settings.llm == "from the file"


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_command(Example, "verifier", lambda settings, config: 1, ["--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(Example):
        assert "--" + field.name.replace("_", "-") in text
    for part in ("An example.", "--config", "SPECSERVE_VERIFIER_", "required", "default 16", "float32|bfloat16"):
        assert part in text


def test_a_bad_command_line_exits_with_2_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_command(Example, "verifier", lambda settings, config: 1, ["--llm", "m", "--draft-nodes", "999"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: --draft-nodes: got 999; allowed: from 0 to 256\n"
