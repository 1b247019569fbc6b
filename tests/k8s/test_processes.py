"""Each container's command, as written, starts on this machine; its probes pass; the whole answers a request."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx
import pytest
import redis
import trustme

from services.gateway.api_keys import hash_key, new_key
from tests.k8s.hub import hub
from tests.k8s.processes import Container, Given, Substitutions, running
from tests.k8s.rendering import REPOSITORY, Resource, named, overlay, pods, with_components

START_TIMEOUT_S = 120.0
MODELS = REPOSITORY / "models"
PROBES = ["startupProbe", "readinessProbe", "livenessProbe"]


def models_of(resources: list[Resource]) -> dict[str, Path]:
    """The embedded models under the ids that an overlay names."""
    (ids,) = (item["data"] for item in resources if item["metadata"]["name"].startswith("specserve-models"))
    return {ids["llm"]: MODELS / "default-llm", ids["ssm"]: MODELS / "default-ssm-1"}


def certificates(resources: list[Resource]) -> dict[str, dict[str, bytes]]:
    """Files by secret, as cert-manager would issue them, for the loopback address beside the names of the Services."""
    authority = trustme.CA()
    secrets: dict[str, dict[str, bytes]] = {}
    for item in resources:
        if item["kind"] == "Certificate" and not item["spec"].get("isCA"):
            secrets[item["spec"]["secretName"]] = pem_files(authority, *item["spec"]["dnsNames"], "127.0.0.1")
    return secrets


def pem_files(authority: trustme.CA, *names: str) -> dict[str, bytes]:
    issued = authority.issue_cert(*names)
    return {
        "tls.crt": b"".join(blob.bytes() for blob in issued.cert_chain_pems),
        "tls.key": issued.private_key_pem.bytes(),
        "ca.crt": authority.cert_pem.bytes(),
    }


def run_and_ask(resources: list[Resource], folder: Path) -> None:
    with hub(models_of(resources)) as endpoint:
        given = Given({"HF_ENDPOINT": endpoint, "OMP_NUM_THREADS": "1"}, certificates(resources))
        with running(resources, folder, given, START_TIMEOUT_S) as containers:
            assert {pod.workload for pod in pods(resources) if pod.kind != "Job"} == containers.keys()
            for container in containers.values():
                assert container.wait_until_probed(START_TIMEOUT_S) == (PROBES if container.pod.leads else [])
                if "metrics" in container.pod.ports():
                    url = f"http://127.0.0.1:{container.port('metrics')}/metrics"
                    assert f"specserve_{container.spec['name']}_" in httpx.get(url, trust_env=False).text
            with httpx.Client(timeout=START_TIMEOUT_S, trust_env=False) as client:
                ask(client, f"http://127.0.0.1:{containers['gateway'].port('http')}")


def test_redis_has_its_records_again_after_a_restart(tmp_path: Path) -> None:
    resources = overlay("cpu-demo")
    (pod,) = (pod for pod in pods(resources) if pod.workload == "redis")
    (spec,) = pod.spec["containers"]
    container = Container(pod, spec, resources, Substitutions(resources, tmp_path), Given({}, {}))
    with redis.Redis(port=container.port("redis")) as client:
        for attempt in range(2):
            with container.running():
                container.wait_until_probed(START_TIMEOUT_S)
                assert client.get("record") == (b"tokens" if attempt else None)
                client.set("record", "tokens")
                client.close()
                container.stop()


def test_what_secrets_bring(redis_url: str, tmp_path: Path) -> None:
    """HTTPS, API keys and a Redis elsewhere."""
    copy, run = tmp_path / "overlay", tmp_path / "run"
    copy.mkdir()
    resources = with_components(copy, "cpu-demo", "https", "api-keys", "external-redis")
    authority, key = trustme.CA(), new_key()
    secrets = {
        "gateway-https": pem_files(authority, "127.0.0.1"),
        "gateway-api-keys": {"keys": hash_key(key).encode()},
        "external-redis": {"url": redis_url.encode()},
    }
    context = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
    with running(resources, run, Given({"OMP_NUM_THREADS": "1"}, secrets), START_TIMEOUT_S) as containers:
        assert containers.keys() == {"gateway", "verifier", "speculator"}
        for container in containers.values():
            assert container.wait_until_probed(START_TIMEOUT_S) == PROBES
        url = f"https://127.0.0.1:{containers['gateway'].port('http')}"
        with httpx.Client(timeout=START_TIMEOUT_S, trust_env=False, verify=context) as client:
            assert client.get(f"{url}/v1/models").status_code == 401
            client.headers["Authorization"] = f"Bearer {key}"
            ask(client, url)


def ask(client: httpx.Client, url: str) -> None:
    """A request is served."""
    model = client.get(f"{url}/v1/models").json()["data"][0]["id"]
    body = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "model": model}
    answer = client.post(f"{url}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize("name", ["cpu-demo", "gpu", "gpu-multi-node"])
def test_an_overlay_serves(name: str, tmp_path: Path) -> None:
    run_and_ask(overlay(name), tmp_path)


def test_weights_from_a_volume(tmp_path: Path) -> None:
    copy, run = tmp_path / "overlay", tmp_path / "run"
    copy.mkdir()
    resources = with_components(copy, "cpu-demo", "weights-from-volume")
    models = next(item for item in resources if item["metadata"]["name"].startswith("specserve-models"))
    models["data"] = {"llm": "someone/large", "ssm": "someone/small"}
    run_and_ask(resources, run)


def test_addresses_and_paths_are_replaced_and_nothing_else(tmp_path: Path) -> None:
    resources = overlay("cpu-demo")
    pod = next(pod for pod in pods(resources) if pod.workload == "gateway")
    (container,) = pod.spec["containers"]
    substitutions = Substitutions(resources, tmp_path)

    def replaced(text: str) -> str:
        return substitutions.text(pod, container, text)

    assert replaced("8000") == str(substitutions.port(pod, "http"))
    assert replaced("verifier:50051").startswith("127.0.0.1:")
    assert replaced("/etc/specserve/specserve.toml") == str(tmp_path / "gateway" / "config" / "specserve.toml")
    assert replaced("/app/models/default-llm") == str(MODELS / "default-llm")
    for text in ("80001", "/tmpfile", "my-verifier:50051", "/application", "services.gateway"):
        assert replaced(text) == text
    assert named(resources, "Service", "gateway")
