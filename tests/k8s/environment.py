"""The environment of a container, with what it takes from elsewhere in the manifests."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from tests.k8s.rendering import Pod, Resource, named

LEADER_ADDRESS = "verifier-0.verifier.specserve"
REFERENCE = re.compile(r"\$\(([A-Za-z_]\w*)\)")


def environment(
    pod: Pod, container: Mapping[str, Any], resources: list[Resource], secrets: Mapping[str, str]
) -> dict[str, str]:
    """Name to value, as the kubelet would set them.

    secrets: values by `name/key`; an optional one that is missing leaves its variable unset.
    Raises AssertionError when a source names what is not there.
    """
    values: dict[str, str] = group_variables(pod)
    for variable in container.get("env", ()):
        assert variable["name"] not in values, f"{pod.workload} gives {variable['name']} twice"
        value = _value(variable, pod, resources, secrets)
        if value is not None:
            values[variable["name"]] = value
    return values


def group_variables(pod: Pod) -> dict[str, str]:
    """What the LeaderWorkerSet controller tells the pods of a group of two."""
    if pod.kind != "LeaderWorkerSet":
        return {}
    index = "0" if pod.leads else "1"
    return {"LWS_LEADER_ADDRESS": LEADER_ADDRESS, "LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": index}


def command(container: Mapping[str, Any], values: Mapping[str, str]) -> list[str]:
    """Command and arguments with $(NAME) expanded."""
    words = [*container["command"], *container.get("args", ())]
    return [REFERENCE.sub(lambda match: values[match[1]], word) for word in words]


def _value(variable: Mapping[str, Any], pod: Pod, resources: list[Resource], secrets: Mapping[str, str]) -> str | None:
    if "value" in variable:
        return str(variable["value"])
    ((kind, source),) = variable["valueFrom"].items()
    match kind:
        case "configMapKeyRef":
            return str(named(resources, "ConfigMap", source["name"])["data"][source["key"]])
        case "secretKeyRef":
            key = f"{source['name']}/{source['key']}"
            assert key in secrets or source.get("optional"), f"{variable['name']} needs the secret {key}"
            return secrets.get(key)
        case "resourceFieldRef":
            return _resource(pod, source)
    raise AssertionError(f"{variable['name']}: a source of kind {kind} is not used here")


def _resource(pod: Pod, source: Mapping[str, str]) -> str:
    (container,) = (item for item in pod.containers() if item["name"] == source["containerName"])
    group, resource = source["resource"].split(".")
    quantity = str(container["resources"][group][resource])
    # The kubelet rounds up to the divisor, 1 by default.
    return str(math.ceil(float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)))
