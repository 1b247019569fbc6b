from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.common.model_files import ModelFilesError
from services.common.settings import SettingsError, fields_of
from services.gateway.settings import GatewaySettings
from services.launcher.plan import Plan, Planner
from services.launcher.settings import EMBEDDED_SSMS, UpSettings
from services.speculator.settings import SpeculatorSettings
from services.verifier.settings import VerifierSettings


@pytest.fixture
def settings(tmp_path: Path) -> UpSettings:
    for name in ("llm", "ssm-a", "ssm-b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    ssms = (str(tmp_path / "ssm-a"), str(tmp_path / "ssm-b"))
    return UpSettings(llm=str(tmp_path / "llm"), ssm=ssms, port=0, speculator_process=True)


def make(settings: UpSettings, config: Path | None = None, environ: Mapping[str, str] | None = None) -> Plan:
    return Planner(settings, config, Path("/run/example"), environ or {}).plan()


def flags(plan: Plan, name: str) -> dict[str, list[str]]:
    """Values by flag of one service's command line."""
    (service,) = (service for service in plan.services if service.name == name)
    assert service.command[:3] == (sys.executable, "-m", f"services.{name.partition('-')[0]}")
    values: dict[str, list[str]] = {}
    for argument in service.command[3:]:
        flag, _, value = argument.partition("=")
        values.setdefault(flag, []).append(value)
    return values


def test_the_services_are_told_of_each_other(settings: UpSettings) -> None:
    plan = make(settings)
    assert [service.name for service in plan.services] == ["redis", "speculator", "verifier", "gateway"]
    speculator, verifier, gateway = (flags(plan, name) for name in ("speculator", "verifier", "gateway"))
    assert speculator["--ssm"] == list(settings.ssm)
    assert verifier["--llm"] == gateway["--model"] == [settings.llm]
    assert verifier["--speculator"] == [f"127.0.0.1:{speculator['--port'][0]}"]
    assert gateway["--verifier"] == [f"127.0.0.1:{verifier['--port'][0]}"]
    assert gateway["--redis-url"] == ["unix:///run/example/redis.sock"]
    assert plan.url == f"http://127.0.0.1:{gateway['--port'][0]}"
    assert all("--insecure" in part for part in (speculator, verifier, gateway))
    assert all(part.get("--host", ["127.0.0.1"]) == ["127.0.0.1"] for part in (speculator, verifier)), "on loopback"
    assert all(service.alive for service in plan.services), "none may hang unnoticed"
    ports = {part["--port"][0] for part in (speculator, verifier, gateway)}
    assert len(ports) == 3
    assert "0" not in ports


def test_the_embedded_small_model_drafts_for_the_embedded_large_one_alone() -> None:
    assert UpSettings().drafting == EMBEDDED_SSMS[:1]
    assert UpSettings(speculator=False).drafting == ()
    assert UpSettings(llm="other").drafting == ()
    assert UpSettings(llm="other", ssm=("small",)).drafting == ("small",)


def test_every_flag_is_a_setting_of_its_service(settings: UpSettings) -> None:
    plan = make(replace(settings, threads=1))
    classes: dict[str, type] = {
        "speculator": SpeculatorSettings,
        "verifier": VerifierSettings,
        "gateway": GatewaySettings,
    }
    for name, cls in classes.items():
        known = {"--" + field.name.replace("_", "-") for field in fields_of(cls)}
        assert flags(plan, name).keys() <= known


def test_one_process_drafts_and_verifies(settings: UpSettings) -> None:
    plan = make(replace(settings, speculator_process=False), environ={"SPECSERVE_SPECULATOR_BEAM": "3"})
    assert [service.name for service in plan.services] == ["redis", "verifier", "gateway"]
    command = plan.services[1].command
    assert command[:3] == (sys.executable, "-m", "services.launcher.one_process")
    own, drafting = command[3 : command.index("--")], command[command.index("--") + 1 :]
    assert f"--llm={settings.llm}" in own
    assert not [flag for flag in own if flag.startswith("--speculator")]
    assert [flag for flag in drafting if flag.startswith("--ssm")] == [f"--ssm={ssm}" for ssm in settings.ssm]
    assert "--insecure" in drafting


@pytest.mark.parametrize(
    "apart",
    [{"speculator_process": True}, {"speculator_per_ssm": True}, {"speculator_port": 20_017}, {"tensor_parallel": 2}],
)
def test_what_puts_the_speculator_into_a_process_of_its_own(apart: dict[str, Any], settings: UpSettings) -> None:
    together = replace(settings, speculator_process=False)
    assert together.one_process
    assert not together.speculators
    assert not replace(together, **apart).one_process
    assert replace(together, **apart).speculators
    assert not replace(together, speculator=False).one_process


def test_without_a_speculator(settings: UpSettings) -> None:
    plan = make(replace(settings, speculator=False))
    assert "speculator" not in [service.name for service in plan.services]
    assert "--speculator" not in flags(plan, "verifier")


def test_without_a_small_model_drafts_are_looked_up(settings: UpSettings) -> None:
    plan = make(replace(settings, ssm=()))
    speculator = flags(plan, "speculator")
    assert "--ssm" not in speculator
    assert flags(plan, "verifier")["--speculator"] == [f"127.0.0.1:{speculator['--port'][0]}"]


def test_a_speculator_for_each_small_model(settings: UpSettings, free_port: Callable[[], int]) -> None:
    port = free_port()
    environ = {"SPECSERVE_SPECULATOR_METRICS_PORT": "9100", "SPECSERVE_SPECULATOR_PROMPT_LOOKUP": "true"}
    plan = make(replace(settings, speculator_per_ssm=True, speculator_port=port), environ=environ)
    names = [service.name for service in plan.services]
    assert names == ["redis", "speculator-1", "speculator-2", "verifier", "gateway"]
    first, second = flags(plan, "speculator-1"), flags(plan, "speculator-2")
    assert (first["--ssm"], second["--ssm"]) == ([settings.ssm[0]], [settings.ssm[1]])
    assert first["--port"] == [str(port)] != second["--port"]
    addresses = [f"127.0.0.1:{each['--port'][0]}" for each in (first, second)]
    assert flags(plan, "verifier")["--speculator"] == addresses
    only_the_first = {"--no-prompt-lookup", "--suffix-index-tokens", "--metrics-port"}
    assert not only_the_first & first.keys()
    assert only_the_first <= second.keys()
    known = {"--" + field.name.replace("_", "-") for field in fields_of(SpeculatorSettings)}
    assert {flag.replace("--no-", "--") for flag in second} <= known


def test_one_small_model_or_none_has_one_speculator(settings: UpSettings) -> None:
    for ssm in ((), settings.ssm[:1]):
        plan = make(replace(settings, ssm=ssm, speculator_per_ssm=True))
        assert [service.name for service in plan.services] == ["redis", "speculator", "verifier", "gateway"]


def test_with_a_redis_that_runs_already(settings: UpSettings) -> None:
    plan = make(replace(settings, redis_url="redis://example:6379/0"))
    assert "redis" not in [service.name for service in plan.services]
    assert flags(plan, "gateway")["--redis-url"] == ["redis://example:6379/0"]


def test_shared_settings_reach_each_service_that_does_not_give_its_own(settings: UpSettings, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[verifier]\nlog_level = 'debug'\ndraft_nodes = 3\n")
    settings = replace(settings, log_level="warning", threads=2, tensor_parallel=2)
    plan = make(settings, config, {"SPECSERVE_SPECULATOR_THREADS": "1"})
    assert flags(plan, "gateway")["--log-level"] == ["warning"]
    assert "--log-level" not in flags(plan, "verifier")
    assert flags(plan, "verifier")["--threads"] == flags(plan, "verifier")["--tensor-parallel"] == ["2"]
    assert "--threads" not in flags(plan, "speculator")
    assert "--threads" not in flags(plan, "gateway")
    assert flags(plan, "verifier")["--pipeline-parallel"] == ["1"]
    assert all("--config" in service.command for service in plan.services[1:])


def test_a_service_setting_that_up_decides_is_refused(settings: UpSettings) -> None:
    with pytest.raises(SettingsError, match=r"port of \[gateway\] is decided by `specserve up`"):
        make(settings, environ={"SPECSERVE_GATEWAY_PORT": "9000"})
    with pytest.raises(SettingsError, match=r"tls_cert of \[verifier\] is decided by `specserve up`"):
        make(settings, environ={"SPECSERVE_VERIFIER_TLS_CERT": "/cert.pem"})


@pytest.mark.parametrize("service", ["speculator", "verifier", "gateway"])
def test_all_services_drain_as_long_as_up_waits_for_them(service: str, settings: UpSettings) -> None:
    settings = replace(settings, drain_timeout_s=7.0)
    assert flags(make(settings), service)["--drain-timeout-s"] == ["7.0"]
    with pytest.raises(SettingsError, match=rf"drain_timeout_s of \[{service}\] is decided by `specserve up`"):
        make(settings, environ={f"SPECSERVE_{service.upper()}_DRAIN_TIMEOUT_S": "60"})


def test_a_taken_port_is_named_before_anything_starts(settings: UpSettings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"--verifier-port: cannot listen on 127.0.0.1:{port}"):
            make(replace(settings, verifier_port=port))


def test_a_port_that_is_given_twice_is_named(settings: UpSettings, free_port: Callable[[], int]) -> None:
    port = free_port()
    for host in ("127.0.0.1", "0.0.0.0"):
        with pytest.raises(SettingsError, match=f"--port: cannot listen on {host}:{port}"):
            make(replace(settings, host=host, port=port, verifier_port=port))


def test_a_missing_model_is_named_before_anything_starts(settings: UpSettings) -> None:
    with pytest.raises(ModelFilesError, match="model /nowhere: no such folder"):
        make(replace(settings, ssm=("/nowhere",)))


def test_the_url_is_one_that_a_client_can_use(settings: UpSettings, free_port: Callable[[], int]) -> None:
    port = free_port()
    assert make(replace(settings, host="0.0.0.0", port=port)).url == f"http://127.0.0.1:{port}"
