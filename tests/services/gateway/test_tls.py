"""TLS of the gateway: towards its verifier, and towards its clients."""

from __future__ import annotations

import logging
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from services.common.model_files import tokenizer_hash
from services.common.tls import INSECURE, Security, Tls, TlsFiles
from tests.certificates import Authority
from tests.services.gateway.conftest import RunningGateway, in_thread, wait_until
from tests.services.gateway.scripted_verifier import Facts, Script, ScriptedVerifier, running


@contextmanager
def verifier(folder: Path, security: Security) -> Iterator[str]:
    """A verifier of one token; yields its address."""
    servicer = ScriptedVerifier(Facts(tokenizer_hash(folder)), Script(lambda request: [300, 0]))
    with in_thread(lambda: running(servicer, security=security)) as (port, _):
        yield f"127.0.0.1:{port}"


def tls(files: dict[str, Path]) -> Tls:
    return Tls(TlsFiles(files["tls_cert"], files["tls_key"], files["tls_ca"]))


def test_the_gateway_and_its_verifier_know_each_other(
    start_gateway: Callable[..., RunningGateway], byte_level_folder: Path, tmp_path: Path
) -> None:
    authority = Authority()
    with verifier(byte_level_folder, tls(authority.files(tmp_path / "verifier"))) as address:
        gateway = start_gateway(verifier=address, **authority.files(tmp_path / "gateway"))
        assert gateway.get("/ready").status_code == 200
        assert gateway.client.completions.create(model="scripted", prompt="x").choices[0].finish_reason == "stop"


@pytest.mark.parametrize("case", ["gateway without", "verifier without", "gateway of others", "verifier of others"])
def test_a_hop_without_the_right_certificates_serves_nothing(
    case: str, start_gateway: Callable[..., RunningGateway], byte_level_folder: Path, tmp_path: Path
) -> None:
    ours, others = Authority(), Authority()
    theirs = others if case == "verifier of others" else ours
    files = theirs.files(tmp_path / "verifier", trusted=ours)
    with verifier(byte_level_folder, INSECURE if case == "verifier without" else tls(files)) as address:
        mine = (others if case == "gateway of others" else ours).files(tmp_path / "gateway", trusted=ours)
        gateway = start_gateway(verifier=address, **({} if case == "gateway without" else mine))
        assert set(gateway.get("/ready").json()["missing"]) == {"verifier"}
        with pytest.raises(openai.InternalServerError) as caught:
            gateway.client.completions.create(model="scripted", prompt="x")
        assert (caught.value.status_code, caught.value.code) == (503, "verifier_unavailable")


def test_renewed_certificates_reach_the_verifier_without_a_restart(
    start_gateway: Callable[..., RunningGateway], byte_level_folder: Path, tmp_path: Path
) -> None:
    ours, others = Authority(), Authority()
    with verifier(byte_level_folder, tls(ours.files(tmp_path / "verifier"))) as address:
        gateway = start_gateway(verifier=address, **others.files(tmp_path / "gateway", trusted=ours))
        assert gateway.get("/ready").status_code == 503
        ours.files(tmp_path / "gateway")
        wait_until(lambda: gateway.get("/ready").status_code == 200)
        assert gateway.client.completions.create(model="scripted", prompt="x").choices[0].finish_reason == "stop"


def test_https(start_gateway: Callable[..., RunningGateway], tmp_path: Path) -> None:
    files = Authority().files(tmp_path)
    gateway = start_gateway(https_cert=files["tls_cert"], https_key=files["tls_key"])
    url = gateway.url.replace("http:", "https:")
    gateway.says("hello")
    with openai.DefaultHttpxClient(verify=ssl.create_default_context(cafile=files["tls_ca"])) as http:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http)
        assert client.completions.create(model="scripted", prompt="x").choices[0].text == "hello"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"{gateway.url}/health")


def test_a_renewed_certificate_takes_effect_at_the_next_connection(
    start_gateway: Callable[..., RunningGateway], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A renewal of both files; a broken one in between changes nothing; what is open stays open."""
    caplog.set_level(logging.INFO, logger="services.common.tls")
    first, second = (Authority().files(tmp_path / name) for name in ("first", "second"))
    served = Authority().files(tmp_path / "served")
    cert, key = served["tls_cert"], served["tls_key"]

    def renew(files: dict[str, Path]) -> None:
        cert.write_bytes(files["tls_cert"].read_bytes())
        key.write_bytes(files["tls_key"].read_bytes())

    renew(first)
    url = start_gateway(https_cert=cert, https_key=key).url.replace("http:", "https:")

    def trusting(files: dict[str, Path]) -> httpx.Client:
        return httpx.Client(base_url=url, verify=ssl.create_default_context(cafile=files["tls_ca"]), trust_env=False)

    def admits(files: dict[str, Path]) -> bool:
        with trusting(files) as client:
            try:
                return client.get("/health").status_code == 200
            except httpx.ConnectError:
                return False

    with trusting(first) as still_open:
        assert still_open.get("/health").status_code == 200
        assert (admits(first), admits(second)) == (True, False)
        key.write_bytes(second["tls_key"].read_bytes())
        assert (admits(first), admits(second)) == (True, False)
        renew(second)
        assert (admits(first), admits(second)) == (False, True)
        assert still_open.get("/health").status_code == 200
    events = [record.getMessage() for record in caplog.records if record.name == "services.common.tls"]
    assert events == ["new certificates refused; the old ones stay", "new certificates"]


def test_the_pair_for_https_is_checked_at_the_start(byte_level_folder: Path, tmp_path: Path) -> None:
    first, second = (Authority().files(tmp_path / name) for name in "ab")
    command = [sys.executable, "-m", "services.gateway", "--insecure", "--model", str(byte_level_folder)]
    flags = ["--port", "0", "--https-cert", str(first["tls_cert"])]
    alone = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=30)
    assert (alone.returncode, len(alone.stderr.splitlines())) == (2, 1)
    assert "give both" in alone.stderr
    flags += ["--https-key", str(second["tls_key"])]
    mixed = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=30)
    assert mixed.returncode == 1
    assert "--https-key" in mixed.stderr.splitlines()[-1]
