"""What every service has of the cluster, in every overlay: the list that the manifests promise."""

from __future__ import annotations

import math
from typing import Any

import pytest

from services.common.settings import ServiceSettings
from services.verifier.settings import VerifierSettings
from tests.k8s import checks
from tests.k8s.environment import environment
from tests.k8s.rendering import OVERLAYS, Pod, Resource, named, overlay, pods, pods_of, selects

SERVICES = ("gateway", "verifier", "speculator", "redis")


@pytest.fixture(params=OVERLAYS)
def resources(request: pytest.FixtureRequest) -> list[Resource]:
    return overlay(request.param)


def of_kind(resources: list[Resource], kind: str) -> list[Resource]:
    return [item for item in resources if item["kind"] == kind]


def pod_of(resources: list[Resource], service: str) -> Pod:
    """The pod that answers for a service."""
    (pod,) = (pod for pod in pods(resources) if pod.labels["app.kubernetes.io/name"] == service and pod.leads)
    return pod


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_has_all_that_it_needs(service: str, resources: list[Resource]) -> None:
    pod = pod_of(resources, service)
    assert pod.kind in ("Deployment", "StatefulSet", "LeaderWorkerSet")
    assert pods_of(named(resources, "Service", service), resources) == [pod]
    assert pod.spec["serviceAccountName"] == named(resources, "ServiceAccount", service)["metadata"]["name"]
    for kind, field in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        own = [item for item in of_kind(resources, kind) if item["spec"][field]]
        assert any(selects(item["spec"][field], pod.labels) for item in own), f"no {kind}"
    (container,) = pod.spec["containers"]
    assert not list(checks.check_probes(pod))
    if service != "redis":  # which ends at once
        assert container["lifecycle"]["preStop"]


@pytest.mark.parametrize("service", ["verifier", "speculator"])
def test_grpc_services_have_the_native_probe(service: str, resources: list[Resource]) -> None:
    (container,) = pod_of(resources, service).spec["containers"]
    assert [set(probe) & {"grpc", "exec", "httpGet"} for _, probe in checks.probes(container)] == [{"grpc"}] * 3


def test_the_service_monitor_picks_the_metrics_of_each_service() -> None:
    resources = overlay("gpu")
    (monitor,) = of_kind(resources, "ServiceMonitor")
    picked = [
        item
        for item in of_kind(resources, "Service")
        if selects(monitor["spec"]["selector"], item["metadata"]["labels"])
    ]
    assert {pod.workload for item in picked for pod in pods_of(item, resources)} == {*SERVICES} - {"redis"}
    for endpoint in monitor["spec"]["endpoints"]:
        for item in picked:
            assert endpoint["port"] in [port["name"] for port in item["spec"]["ports"]]


@pytest.mark.parametrize("name", ["gpu", "gpu-multi-node"])
def test_verifiers_scale_by_the_depth_of_their_queue(name: str) -> None:
    scaler = named(overlay(name), "HorizontalPodAutoscaler", "verifier")["spec"]
    assert [metric["pods"]["metric"]["name"] for metric in scaler["metrics"]] == [
        "specserve_verifier_waiting_sequences"
    ]
    assert named(overlay(name), scaler["scaleTargetRef"]["kind"], "verifier")


def test_a_group_has_a_rank_for_each_gpu_and_part_of_the_model(tmp_path: Any) -> None:
    resources = overlay("gpu-multi-node")
    group = named(resources, "LeaderWorkerSet", "verifier")["spec"]["leaderWorkerTemplate"]
    roles = [pod for pod in pods(resources) if pod.kind == "LeaderWorkerSet"]
    assert len(roles) == group["size"] == 2
    settings: list[ServiceSettings] = []
    for pod in roles:
        (container,) = pod.spec["containers"]
        (ranks,) = (
            int(word.partition("=")[2]) for word in container["command"] if word.startswith("--nproc-per-node=")
        )
        assert ranks == int(container["resources"]["limits"]["nvidia.com/gpu"])
        settings.append(checks.load_container_settings(pod, container, resources, tmp_path))
        assert isinstance(settings[-1], VerifierSettings)
        degrees = settings[-1].tensor_parallel, settings[-1].pipeline_parallel
        assert math.prod(degrees) == ranks * group["size"]
        assert ranks % degrees[0] == 0, "a stage stays within a node"
        assert environment(pod, container, resources, {})["LWS_GROUP_SIZE"] == str(group["size"])
    assert settings[0] == settings[1], "all ranks have the same settings"
