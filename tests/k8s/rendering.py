"""The manifests as `kubectl kustomize` renders them, and the containers in them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
K8S = REPOSITORY / "k8s"
OVERLAYS = sorted(folder.name for folder in (K8S / "overlays").iterdir() if folder.is_dir())
COMPONENTS = sorted(folder.name for folder in (K8S / "components").iterdir() if folder.is_dir())
KUBECTL = Path(sys.executable).parent / "kubectl"
TIMEOUT_S = 60.0

Resource = dict[str, Any]


def render(folder: Path) -> list[Resource]:
    """What a cluster would be given; fails with kubectl's own message when the folder does not build."""
    command = [str(KUBECTL), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    assert done.stderr == "", f"{' '.join(command)} warns: {done.stderr}"
    return [document for document in yaml.safe_load_all(done.stdout) if document is not None]


@cache
def overlay(name: str) -> list[Resource]:
    """The resources of an overlay; shared by the tests, which do not change them."""
    return render(K8S / "overlays" / name)


def with_components(folder: Path, base: str, *components: str) -> list[Resource]:
    """A copy of an overlay in `folder`, with these components listed in it as an operator would list them."""
    shutil.copytree(K8S / "overlays" / base, folder, dirs_exist_ok=True)
    path = folder / "kustomization.yaml"
    text = path.read_text().replace("../../base", os.path.relpath(K8S / "base", folder))
    kustomization = yaml.safe_load(text)
    kustomization["components"] = [os.path.relpath(K8S / "components" / component, folder) for component in components]
    path.write_text(yaml.safe_dump(kustomization))
    return render(folder)


def named(resources: list[Resource], kind: str, name: str) -> Resource:
    """The resource of that kind and name; exactly one must be there."""
    found = [item for item in resources if item["kind"] == kind and item["metadata"]["name"] == name]
    assert len(found) == 1, f"{len(found)} of {kind}/{name}, 1 expected"
    return found[0]


@dataclass(frozen=True)
class Pod:
    """A pod template and the workload that makes pods of it."""

    workload: str
    kind: str
    labels: Mapping[str, str]
    spec: Mapping[str, Any]

    @property
    def leads(self) -> bool:
        """False for the pods of a group that only take part in what its leader serves."""
        return not self.workload.endswith("-worker")

    def containers(self) -> Iterator[Mapping[str, Any]]:
        """Init containers first, as they run."""
        yield from self.spec.get("initContainers", ())
        yield from self.spec["containers"]

    def ports(self) -> dict[str, int]:
        """The named ports of the pod."""
        return {port["name"]: port["containerPort"] for item in self.containers() for port in item.get("ports", ())}


def pods(resources: list[Resource]) -> list[Pod]:
    """The pod templates of all workloads; of a LeaderWorkerSet the leader's and the worker's."""
    found: list[Pod] = []
    for item in resources:
        spec = item.get("spec", {})
        templates = {item["metadata"]["name"]: spec.get("template")} if "template" in spec else {}
        if item["kind"] == "LeaderWorkerSet":
            group = spec["leaderWorkerTemplate"]
            templates = {
                f"{item['metadata']['name']}-{role}": group[f"{role}Template"]
                for role in ("leader", "worker")
                if f"{role}Template" in group
            }
        for name, template in templates.items():
            found.append(Pod(name, item["kind"], template["metadata"]["labels"], template["spec"]))
    return found


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector (matchLabels and `In` expressions) picks a pod with these labels."""
    for expression in selector.get("matchExpressions", ()):
        assert expression["operator"] == "In", f"operator {expression['operator']} is not used here"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    wanted: Mapping[str, str] = selector.get("matchLabels", {})
    return all(labels.get(key) == value for key, value in wanted.items())


def pods_of(service: Resource, resources: list[Resource]) -> list[Pod]:
    """The pods that a Service sends to."""
    return [pod for pod in pods(resources) if selects({"matchLabels": service["spec"]["selector"]}, pod.labels)]
