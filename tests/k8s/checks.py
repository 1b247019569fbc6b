"""What a manifest says of the code, held against the code. Each check returns its complaints."""

from __future__ import annotations

import inspect
import shutil
import sys
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from huggingface_hub import constants as hub_constants
from huggingface_hub.utils import _auth as hub_auth

from services.common.model_files import HUB_FILES, TOKENIZER_FILES
from services.common.settings import ServiceSettings, SettingsError, load_settings
from services.gateway.server import STOP_GRACE_S
from services.gateway.settings import GatewaySettings
from services.launcher.redis_server import find_redis_server
from services.speculator.settings import SpeculatorSettings
from services.verifier.settings import VerifierSettings
from tests.k8s.environment import REFERENCE, environment
from tests.k8s.rendering import Pod, Resource, named, pods, pods_of, selects

SETTINGS: dict[str, type[ServiceSettings]] = {
    "services.gateway": GatewaySettings,
    "services.verifier": VerifierSettings,
    "services.speculator": SpeculatorSettings,
}
SECRETS = {"external-redis/url": "redis://elsewhere:6379/0"}
# The programs of the images: the environment's own, and those that come with a Redis server.
PROGRAMS = (str(Path(sys.executable).parent), str(find_redis_server().parent), "/usr/bin", "/bin")


def service_module(container: Mapping[str, Any]) -> str | None:
    """`services.gateway` of `python -m services.gateway`; None for another program."""
    words = [*container["command"], *container.get("args", ())]
    modules = [word for flag, word in pairwise(words) if flag == "-m"]
    return modules[0] if modules else None


def check_commands(pod: Pod) -> Iterator[str]:
    """Every program and module exists, probes' and hooks' programs too."""
    for container in pod.containers():
        words = [container["command"]]
        words += [probe["exec"]["command"] for _, probe in probes(container) if "exec" in probe]
        for program, *_ in words:
            if shutil.which(program, path=":".join(PROGRAMS)) is None:
                yield f"{pod.workload}: there is no program {program}"
        module = service_module(container)
        if module is not None and module not in SETTINGS:
            yield f"{pod.workload}: python -m {module} is no service"


def check_downloads(pod: Pod) -> Iterator[str]:
    """What `hf download` fetches is what the service looks for: offline it refuses a copy that lacks some of it."""
    for container in pod.containers():
        if container["command"][0] != "hf":
            continue
        words = container["args"]
        files = {word for flag, word in pairwise(words) if flag == "--include"}
        wanted = TOKENIZER_FILES if pod.workload == "gateway" else HUB_FILES
        if files != set(wanted):
            yield f"{pod.workload}/{container['name']}: downloads {sorted(files)}, the service wants {sorted(wanted)}"


def check_settings(pod: Pod, resources: list[Resource], folder: Path) -> Iterator[str]:
    """The service takes its environment and its table of the config file, and listens where the manifest says.

    folder: where the config file may be written.
    """
    for container in pod.containers():
        yield from _check_other_variables(pod, container)
        module = service_module(container)
        if module not in SETTINGS:
            continue
        try:
            settings = load_container_settings(pod, container, resources, folder)
        except SettingsError as error:
            yield f"{pod.workload}: {error}"
            continue
        if not pod.leads:
            continue  # it listens nowhere, and ends with its leader
        yield from _check_ports(pod, container, settings)
        yield from _check_grace(pod, container, settings)


def load_container_settings(
    pod: Pod, container: Mapping[str, Any], resources: list[Resource], folder: Path
) -> ServiceSettings:
    """The settings that the service would have; SettingsError when it would not start."""
    module = service_module(container)
    assert module is not None
    values = environment(pod, container, resources, SECRETS)
    for path, content in mounted_files(pod, container, resources).items():
        (folder / Path(path).name).write_text(content)
        values = {name: str(folder / Path(path).name) if value == path else value for name, value in values.items()}
    return load_settings(SETTINGS[module], module.removeprefix("services."), environ=values)


def mounted_files(pod: Pod, container: Mapping[str, Any], resources: list[Resource]) -> dict[str, str]:
    """Path to content of what ConfigMaps bring into a container."""
    config_maps = {
        volume["name"]: volume["configMap"]["name"] for volume in pod.spec["volumes"] if "configMap" in volume
    }
    return {
        f"{mount['mountPath']}/{name}": content
        for mount in container["volumeMounts"]
        if mount["name"] in config_maps
        for name, content in named(resources, "ConfigMap", config_maps[mount["name"]])["data"].items()
    }


def _check_other_variables(pod: Pod, container: Mapping[str, Any]) -> Iterator[str]:
    """A variable that is no setting is one that the hub's library reads, or stands in the command."""
    used = {name for word in container["command"] for name in REFERENCE.findall(word)}
    read = inspect.getsource(hub_constants) + inspect.getsource(hub_auth)
    for variable in container.get("env", ()):
        name = variable["name"]
        if name.startswith("SPECSERVE_") and service_module(container) is not None:
            continue  # the service itself refuses those that it does not know
        if name not in used and f'"{name}"' not in read:
            yield f"{pod.workload}: nobody reads {name}"


def _check_ports(pod: Pod, container: Mapping[str, Any], settings: ServiceSettings) -> Iterator[str]:
    edge = "http" if isinstance(settings, GatewaySettings) else "grpc"
    assert isinstance(settings, GatewaySettings | VerifierSettings | SpeculatorSettings)
    wanted = {edge: settings.port, "metrics": settings.metrics_port}
    if not isinstance(settings, GatewaySettings):
        wanted["health"] = settings.health_port
    declared = {name: port for name, port in pod.ports().items() if name != "rendezvous"}
    if wanted != declared:
        yield f"{pod.workload}: the service listens on {wanted}, the manifest says {declared}"
    for address in (settings.host, settings.metrics_host):
        if address != "0.0.0.0":
            yield f"{pod.workload}: listens on {address}, where nobody reaches it"
    for name, probe in probes(container):
        action = probe["httpGet"] if "httpGet" in probe else probe["grpc"]
        if action["port"] not in (*pod.ports(), *pod.ports().values()):
            yield f"{pod.workload}: the {name} asks port {action['port']}"


def _check_grace(pod: Pod, container: Mapping[str, Any], settings: ServiceSettings) -> Iterator[str]:
    pre_stop = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    needed = pre_stop + settings.drain_timeout_s + STOP_GRACE_S
    grace = pod.spec["terminationGracePeriodSeconds"]
    if not grace > needed:
        yield f"{pod.workload}: killed after {grace} s, its drain takes {needed:g} s"


def probes(container: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        if name in container:
            yield name, container[name]


def check_addresses(pod: Pod, resources: list[Resource]) -> Iterator[str]:
    """NAME:PORT of another service is a Service with that port, whose network policies let this pod through."""
    if not pod.leads:
        return  # it talks to its group alone
    services = {item["metadata"]["name"]: item for item in resources if item["kind"] == "Service"}
    for container in pod.containers():
        for name, value in environment(pod, container, resources, SECRETS).items():
            host, _, port = value.removeprefix("redis://").partition("/")[0].rpartition(":")
            if not (name.endswith(("_VERIFIER", "_SPECULATOR", "_REDIS_URL"))) or host == "elsewhere":
                continue
            ports = {str(entry["port"]): entry for entry in services.get(host, {}).get("spec", {}).get("ports", ())}
            if port not in ports:
                yield f"{pod.workload}: {name} is {value}, and no Service {host} has port {port}"
                continue
            yield from (
                complaint
                for target in pods_of(services[host], resources)
                for complaint in check_passage(pod, target, ports[port]["targetPort"], resources)
            )


def check_passage(source: Pod, target: Pod, port: str, resources: list[Resource]) -> Iterator[str]:
    """The source's policies let it out to that port of the target, and the target's let it in."""
    policies = [item["spec"] for item in resources if item["kind"] == "NetworkPolicy"]
    for pod, peer, direction, key in ((source, target, "egress", "to"), (target, source, "ingress", "from")):
        rules = [
            rule
            for policy in policies
            if selects(policy["podSelector"], pod.labels)
            for rule in policy.get(direction, ())
        ]
        if not any(_allows(rule, key, peer, port, target) for rule in rules):
            yield f"no {direction} rule of {pod.workload} lets {source.workload} reach {target.workload}:{port}"


def _allows(rule: Mapping[str, Any], key: str, peer: Pod, port: str, target: Pod) -> bool:
    ports = [entry["port"] for entry in rule.get("ports", ())]
    peers = rule.get(key)
    reaches = peers is None or any(
        "namespaceSelector" not in item and selects(item["podSelector"], peer.labels) for item in peers
    )
    return reaches and (not ports or port in ports or target.ports()[port] in ports)


def check_selectors(resources: list[Resource]) -> Iterator[str]:
    """Whatever selects pods selects some; the ports that it names are theirs."""
    for item in resources:
        where = f"{item['kind']}/{item['metadata']['name']}"
        match item["kind"]:
            case "Service":
                selector, ports = (
                    {"matchLabels": item["spec"]["selector"]},
                    [p["targetPort"] for p in item["spec"]["ports"]],
                )
            case "PodDisruptionBudget":
                selector, ports = item["spec"]["selector"], []
            case "NetworkPolicy":
                selector = item["spec"]["podSelector"]
                ports = [p["port"] for rule in item["spec"].get("ingress", ()) for p in rule.get("ports", ())]
            case _:
                continue
        chosen = [pod for pod in pods(resources) if selects(selector, pod.labels)]
        if not chosen:
            yield f"{where} selects no pod"
        for pod in chosen:
            yield from (f"{where}: {pod.workload} has no port {port}" for port in ports if port not in pod.ports())


def check_hardening(pod: Pod) -> Iterator[str]:
    """What the pod security standard `restricted` asks, and a root file system that nobody writes to."""
    spec = pod.spec
    context = spec["securityContext"]
    if not (context.get("runAsNonRoot") and isinstance(context.get("runAsUser"), int) and context["runAsUser"] > 0):
        yield f"{pod.workload}: may run as root"
    if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield f"{pod.workload}: has no seccomp profile"
    if spec.get("automountServiceAccountToken") is not False or spec.get("enableServiceLinks") is not False:
        yield f"{pod.workload}: gets a token or the links of other services"
    for container in pod.containers():
        wanted = {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        if container.get("securityContext") != wanted:
            yield f"{pod.workload}/{container['name']}: securityContext is {container.get('securityContext')}"
        resources = container.get("resources", {})
        if not {"cpu", "memory"} <= resources.get("requests", {}).keys() or "memory" not in resources.get("limits", {}):
            yield f"{pod.workload}/{container['name']}: resources are {resources}"
        if ":" not in container["image"] or container["image"].endswith(":latest"):
            yield f"{pod.workload}/{container['name']}: image {container['image']} is not pinned"


def check_probes(pod: Pod) -> Iterator[str]:
    """Whatever serves has all three probes."""
    for container in pod.spec["containers"]:
        missing = {"startupProbe", "readinessProbe", "livenessProbe"} - container.keys()
        if container.get("ports") and missing:
            yield f"{pod.workload}: {', '.join(sorted(missing))} missing"
