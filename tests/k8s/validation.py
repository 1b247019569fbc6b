"""Strict validation: the schemas of Kubernetes itself, and our own for the kinds that others define."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

from tests.k8s.rendering import Resource, pods

KUBERNETES_VERSION = kubernetes_validate.latest_version()
SCHEMAS = Path(__file__).parent / "schemas"


def validate(resource: Resource) -> None:
    """
    Raises:
        jsonschema.ValidationError: a field is missing, unknown or of another type.
    """
    own = SCHEMAS / f"{resource['kind'].lower()}.json"
    if own.exists():
        schema: dict[str, Any] = json.loads(own.read_text())
        jsonschema.Draft202012Validator(schema).validate(resource)
        if resource["kind"] == "LeaderWorkerSet":
            _validate_pod_templates(resource)
    else:
        kubernetes_validate.validate(resource, KUBERNETES_VERSION, strict=True)


def _validate_pod_templates(resource: Resource) -> None:
    """Pod templates are Kubernetes' own, whatever kind they stand in."""
    for pod in pods([resource]):
        template = {"metadata": {"labels": dict(pod.labels)}, "spec": copy.deepcopy(dict(pod.spec))}
        wrapped = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": pod.workload},
            "spec": {"selector": {"matchLabels": dict(pod.labels)}, "template": template},
        }
        kubernetes_validate.validate(wrapped, KUBERNETES_VERSION, strict=True)
