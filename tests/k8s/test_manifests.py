"""Every overlay and component builds, is valid, and says of the code what is true."""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from prometheus_client import CollectorRegistry

from services.gateway.metrics import GatewayMetrics
from services.speculator.metrics import SpeculatorMetrics
from services.verifier.metrics import VerifierMetrics
from tests.k8s import checks
from tests.k8s.rendering import (
    COMPONENTS,
    K8S,
    OVERLAYS,
    REPOSITORY,
    Pod,
    Resource,
    named,
    overlay,
    pods,
    with_components,
)
from tests.k8s.validation import validate


@pytest.fixture(params=[*OVERLAYS, *(f"cpu-demo+{component}" for component in COMPONENTS)])
def resources(request: pytest.FixtureRequest, tmp_path: Path) -> list[Resource]:
    """Each overlay, and each component on the smallest one."""
    base, _, component = request.param.partition("+")
    return with_components(tmp_path, base, component) if component else overlay(base)


def complaints_about(resources: list[Resource], folder: Path) -> list[str]:
    found = list(checks.check_selectors(resources))
    for pod in pods(resources):
        found += checks.check_commands(pod)
        found += checks.check_downloads(pod)
        found += checks.check_settings(pod, resources, folder)
        found += checks.check_addresses(pod, resources)
        found += checks.check_hardening(pod)
        found += checks.check_probes(pod)
    return found


def test_valid_and_true(resources: list[Resource], tmp_path: Path) -> None:
    for resource in resources:
        validate(resource)
        assert resource["kind"] != "Secret", "secrets never sit in manifests"
    assert complaints_about(resources, tmp_path) == []


def test_everything_is_in_the_namespace_and_labelled(resources: list[Resource]) -> None:
    for resource in resources:
        metadata = resource["metadata"]
        assert metadata.get("namespace") == (None if resource["kind"] == "Namespace" else "specserve")
        assert metadata["labels"]["app.kubernetes.io/part-of"] == "specserve"
    for pod in pods(resources):
        assert {"app.kubernetes.io/name", "app.kubernetes.io/part-of"} <= pod.labels.keys()


def test_nothing_is_allowed_but_what_is_named(resources: list[Resource]) -> None:
    denial = named(resources, "NetworkPolicy", "default-deny")["spec"]
    assert denial == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    by_name = {pod.labels["app.kubernetes.io/name"]: pod for pod in pods(resources)}
    for source, target, port in (("gateway", "speculator", "grpc"), ("speculator", "verifier", "grpc")):
        assert list(checks.check_passage(by_name[source], by_name[target], port, resources))


Break = Callable[[list[Resource]], None]


def _container(resources: list[Resource], name: str) -> Any:
    return named(resources, "Deployment", name)["spec"]["template"]["spec"]["containers"][0]


def _config(old: str, new: str) -> Break:
    def change(resources: list[Resource]) -> None:
        for item in resources:
            if item["kind"] == "ConfigMap" and "specserve.toml" in item["data"]:
                item["data"]["specserve.toml"] = item["data"]["specserve.toml"].replace(old, new)

    return change


def _variable(name: str, value: str) -> Break:
    def change(resources: list[Resource]) -> None:
        container = _container(resources, "verifier")
        others = [variable for variable in container["env"] if variable["name"] != name]
        container["env"] = [*others, {"name": name, "value": value}]

    return change


def _pod(field: str, value: object) -> Break:
    return lambda resources: named(resources, "Deployment", "verifier")["spec"]["template"]["spec"].update(
        {field: value}
    )


BREAKS: dict[str, tuple[Break, str]] = {
    "module": (
        lambda r: _container(r, "gateway").update(command=["python", "-m", "services.gatewey"]),
        "services.gatewey",
    ),
    "program": (lambda r: _container(r, "gateway").update(command=["pythoon"]), "no program pythoon"),
    "variable": (_variable("SPECSERVE_VERIFIER_DRAFT_NODE", "3"), "SPECSERVE_VERIFIER_DRAFT_NODE"),
    "value": (_variable("SPECSERVE_VERIFIER_DRAFT_NODES", "many"), "SPECSERVE_VERIFIER_DRAFT_NODES"),
    "other variable": (_variable("HF_HOMES", "/models"), "nobody reads HF_HOMES"),
    "config key": (_config("max_sequences", "max_sequence"), "max_sequence"),
    "config table": (_config("[verifier]", "[verifyer]"), "verifyer"),
    "listening port": (_variable("SPECSERVE_VERIFIER_PORT", "50055"), "listens on"),
    "address": (_variable("SPECSERVE_VERIFIER_SPECULATOR", "speculators:50052"), "no Service speculators"),
    "probe": (lambda r: _container(r, "verifier")["livenessProbe"]["grpc"].update(port=1), "asks port 1"),
    "no probe": (lambda r: _container(r, "verifier").pop("startupProbe"), "startupProbe missing"),
    "grace": (_pod("terminationGracePeriodSeconds", 30), "killed after 30 s"),
    "policy": (lambda r: r.remove(named(r, "NetworkPolicy", "speculator")), "no ingress rule"),
    "selector": (lambda r: named(r, "Service", "gateway")["spec"]["selector"].update(a="b"), "selects no pod"),
    "root": (_pod("securityContext", {"runAsNonRoot": False}), "may run as root"),
    "writable": (
        lambda r: _container(r, "gateway")["securityContext"].pop("readOnlyRootFilesystem"),
        "securityContext is",
    ),
    "image": (lambda r: _container(r, "gateway").update(image="specserve/gateway"), "not pinned"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_not_true_is_found(name: str, tmp_path: Path) -> None:
    change, expected = BREAKS[name]
    resources = copy.deepcopy(overlay("cpu-demo"))
    change(resources)
    assert any(expected in complaint for complaint in complaints_about(resources, tmp_path))


@pytest.mark.parametrize("kind", ["Deployment", "NetworkPolicy", "ServiceMonitor", "Certificate", "Issuer"])
def test_unknown_fields_are_refused(kind: str) -> None:
    resource = copy.deepcopy(next(item for item in overlay("gpu") if item["kind"] == kind))
    resource["spec"]["replica"] = 1
    with pytest.raises(jsonschema.ValidationError):
        validate(resource)


def _metric_names() -> set[str]:
    registry = CollectorRegistry()
    for metrics in (GatewayMetrics, VerifierMetrics, SpeculatorMetrics):
        metrics(registry)
    names: set[str] = set()
    for family in registry.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count", "")}.get(family.type, ("",))
        names |= {family.name + suffix for suffix in suffixes}
    return names


def test_the_autoscalers_ask_for_metrics_that_exist() -> None:
    component = K8S / "components" / "autoscaling"
    texts = [path.read_text() for path in component.glob("*.yaml")]
    asked = set(re.findall(r"specserve_\w+", "\n".join(texts)))
    assert asked
    assert asked <= _metric_names()
    offered = set(re.findall(r"specserve_\w+", (component / "prometheus-adapter.yaml").read_text()))
    scalers = [item for item in overlay("gpu") if item["kind"] == "HorizontalPodAutoscaler"]
    assert {metric["pods"]["metric"]["name"] for item in scalers for metric in item["spec"]["metrics"]} == offered
    for scaler in scalers:
        target = scaler["spec"]["scaleTargetRef"]
        assert "replicas" not in named(overlay("gpu"), target["kind"], target["name"])["spec"]


def test_images_have_the_version_of_the_project() -> None:
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    for name in OVERLAYS:
        images = yaml.safe_load((K8S / "overlays" / name / "kustomization.yaml").read_text())["images"]
        ours = [image["newTag"] for image in images if image["name"].startswith("specserve-")]
        assert len(ours) == 3
        assert {tag.removesuffix("-cuda") for tag in ours} == {version}


def test_every_folder_has_a_page() -> None:
    folders = {K8S, *(path for path in K8S.rglob("*") if path.is_dir())}
    assert [folder for folder in sorted(folders) if not (folder / "README.md").is_file()] == []


def _grpc_pod(resources: list[Resource], name: str) -> Pod:
    return next(pod for pod in pods(resources) if pod.workload == name)


@pytest.mark.parametrize("name", ["verifier", "speculator"])
def test_threads_follow_the_limit(name: str, tmp_path: Path) -> None:
    resources = overlay("gpu")
    pod = _grpc_pod(resources, name)
    (container,) = pod.spec["containers"]
    settings = checks.load_container_settings(pod, container, resources, tmp_path)
    assert vars(settings)["threads"] == int(container["resources"]["limits"]["cpu"])


def test_the_ranks_of_a_node_share_its_limit(tmp_path: Path) -> None:
    resources = overlay("gpu-multi-node")
    group = [pod for pod in pods(resources) if pod.kind == "LeaderWorkerSet"]
    assert len(group) == 2, "a leader and a worker"
    for pod in group:
        (container,) = pod.spec["containers"]
        (ranks,) = re.findall(r"--nproc-per-node=(\d+)", " ".join(container["command"]))
        settings = checks.load_container_settings(pod, container, resources, tmp_path)
        assert vars(settings)["threads"] * int(ranks) == int(container["resources"]["limits"]["cpu"])
