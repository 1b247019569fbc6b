"""Runs the containers of an overlay as processes of this machine: command, environment and probes as written.

What only a cluster has is replaced, and nothing else:

| in the manifest | here |
|---|---|
| a port that a container declares | a free loopback port |
| `0.0.0.0`, `* -::*` | `127.0.0.1` |
| NAME:PORT of a Service | the loopback port of the container behind it |
| the path of a ConfigMap | a folder with its files |
| the path of an emptyDir or a claim | a folder, the same one for all that mount the same claim |
| `/app`, the working folder of an image | the repository |
| the path of a secret, a variable from one | a folder with the files that the test gives, the content of one |
| the model hub | a server on loopback that has the embedded models under the ids that the overlay names |
| LWS_LEADER_ADDRESS and its port | loopback, and a free port |
| the 8 GPUs of a node | one rank for each pod: `--nproc-per-node=1`, and SPECSERVE_VERIFIER_TENSOR_PARALLEL=1 |
| the cores of a limit | one thread, by SPECSERVE_*_THREADS |
| a GPU (`device = "cuda"`) | the CPU, by SPECSERVE_*_DEVICE |
| a pod's own memory | one percent of this machine's, by SPECSERVE_*_KV_MEMORY |
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.k8s.checks import PROGRAMS, mounted_files, probes, service_module
from tests.k8s.environment import LEADER_ADDRESS, command, environment
from tests.k8s.rendering import REPOSITORY, Pod, Resource, pods, pods_of
from tests.ports import free_port

PROBE_PERIOD_S = 0.1
LOG_TAIL = 3000


class Substitutions:
    """The table above, for the pods of one overlay; `folder` holds what they mount."""

    def __init__(self, resources: list[Resource], folder: Path) -> None:
        self._resources = resources
        self._folder = folder
        self._rendezvous = str(free_port())
        self._ports = {(pod.workload, port): free_port() for pod in pods(resources) for port in pod.ports().values()}

    def port(self, pod: Pod, port: str | int) -> int:
        """The loopback port of a named or numbered port of a pod."""
        return self._ports[pod.workload, pod.ports()[port] if isinstance(port, str) else port]

    def text(self, pod: Pod, container: Mapping[str, Any], text: str) -> str:
        """An argument, a value or a file of a container, with everything replaced, in one pass."""
        addresses = {address: f"127.0.0.1:{port}" for address, port in self._addresses()}
        others = {str(number): str(self.port(pod, number)) for number in pod.ports().values()}
        others |= {mount["mountPath"]: str(self.mount(pod, mount)) for mount in container["volumeMounts"]}
        others |= {
            "--nproc-per-node=8": "--nproc-per-node=1",
            "--master-port=29500": f"--master-port={self._rendezvous}",
        }
        addresses |= {LEADER_ADDRESS: "127.0.0.1"}
        others |= {"/app": str(REPOSITORY), "0.0.0.0": "127.0.0.1", "* -::*": "127.0.0.1"}
        pattern = rf"(?<![\w.-])({_any_of(addresses)})(?![\w.-])|(?<![\w.:/-])({_any_of(others)})(?![\w.-])"
        return re.sub(pattern, lambda match: (addresses | others)[match[0]], text)

    def mount(self, pod: Pod, mount: Mapping[str, Any]) -> Path:
        """The folder that stands for a mounted volume."""
        claims = {
            volume["name"]: volume["persistentVolumeClaim"]["claimName"]
            for volume in pod.spec["volumes"]
            if "persistentVolumeClaim" in volume
        }
        owner = "claim" if mount["name"] in claims else pod.workload
        folder = self._folder / owner / str(claims.get(mount["name"], mount["name"]))
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _addresses(self) -> Iterator[tuple[str, int]]:
        for service in self._resources:
            if service["kind"] == "Service":
                for entry in service["spec"]["ports"]:
                    for pod in pods_of(service, self._resources):
                        yield f"{service['metadata']['name']}:{entry['port']}", self.port(pod, entry["targetPort"])


@dataclass(frozen=True)
class Given:
    """What comes from outside the manifests: variables for every container, and files by secret."""

    environment: Mapping[str, str]
    secrets: Mapping[str, Mapping[str, bytes]]

    def secret_values(self) -> dict[str, str]:
        """By `name/key`."""
        return {
            f"{name}/{key}": content.decode() for name, files in self.secrets.items() for key, content in files.items()
        }


def _any_of(texts: Iterable[str]) -> str:
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))


class Container:
    """One container as a process."""

    def __init__(
        self,
        pod: Pod,
        container: Mapping[str, Any],
        resources: list[Resource],
        substitutions: Substitutions,
        given: Given,
    ) -> None:
        self.pod = pod
        self.spec = container
        self._substitutions = substitutions
        self._fill_config_maps(resources)
        self._fill_secrets(given.secrets)
        values = environment(pod, container, resources, given.secret_values())
        self.command = [self._text(word) for word in command(container, values)]
        self._environment = {name: self._text(value) for name, value in values.items()}
        self._environment |= {"PATH": ":".join(PROGRAMS), "PYTHONPATH": str(REPOSITORY)}
        self._environment |= {"HOME": self._text("/home/specserve")} | dict(given.environment) | self._smaller()
        self.log = substitutions.mount(pod, {"name": f"{container['name']}-log"}) / "log"

    def _text(self, text: str) -> str:
        return self._substitutions.text(self.pod, self.spec, text)

    def _fill_config_maps(self, resources: list[Resource]) -> None:
        for path, content in mounted_files(self.pod, self.spec, resources).items():
            Path(self._text(path)).write_text(self._text(content))

    def _fill_secrets(self, secrets: Mapping[str, Mapping[str, bytes]]) -> None:
        volumes = {volume["name"]: volume["secret"] for volume in self.pod.spec["volumes"] if "secret" in volume}
        for mount in self.spec["volumeMounts"]:
            if mount["name"] in volumes:
                folder = self._substitutions.mount(self.pod, mount)
                for name, content in secrets[volumes[mount["name"]]["secretName"]].items():
                    (folder / name).write_bytes(content)

    def _smaller(self) -> dict[str, str]:
        section = (service_module(self.spec) or "").removeprefix("services.").upper()
        if section not in ("VERIFIER", "SPECULATOR"):
            return {}
        values = {"DEVICE": "cpu", "KV_MEMORY": "0.01", "THREADS": "1"}
        if self.pod.kind == "LeaderWorkerSet":
            values["TENSOR_PARALLEL"] = "1"
        return {f"SPECSERVE_{section}_{name}": value for name, value in values.items()}

    def run(self, timeout_s: float) -> None:
        """To its end, as an init container."""
        done = subprocess.run(
            self.command,
            env=self._environment,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{self.command}: {done.stdout}{done.stderr}"

    @contextmanager
    def running(self) -> Iterator[None]:
        """Started; after stop() it must end within its grace period, with code 0 unless torchrun reports the signal."""
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                self.command, env=self._environment, cwd=REPOSITORY, stdout=log, stderr=log, start_new_session=True
            )
        self._process = process
        try:
            yield
            code = process.wait(self.pod.spec["terminationGracePeriodSeconds"])
            assert code == 0 or self.command[0] == "torchrun", f"{self.pod.workload} ended with {code}: {self.tail()}"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def stop(self) -> None:
        self._process.terminate()

    def port(self, name: str) -> int:
        return self._substitutions.port(self.pod, name)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-LOG_TAIL:]

    def wait_until_probed(self, timeout_s: float) -> list[str]:
        """Wait until every probe passes; their names."""
        deadline = time.monotonic() + timeout_s
        names: list[str] = []
        for name, probe in probes(self.spec):
            while not self._passes(probe):
                assert self._process.poll() is None, f"{self.pod.workload} ended: {self.tail()}"
                assert time.monotonic() < deadline, f"the {name} of {self.pod.workload} does not pass: {self.tail()}"
                time.sleep(PROBE_PERIOD_S)
            names.append(name)
        return names

    def _passes(self, probe: Mapping[str, Any]) -> bool:
        timeout_s = probe.get("timeoutSeconds", 1)
        if "grpc" in probe:
            return _grpc_passes(self._substitutions.port(self.pod, probe["grpc"]["port"]), probe["grpc"], timeout_s)
        if "httpGet" in probe:
            action = probe["httpGet"]
            return _http_passes(self._substitutions.port(self.pod, action["port"]), action, timeout_s)
        words = [self._text(word) for word in probe["exec"]["command"]]
        return (
            subprocess.run(words, env=self._environment, capture_output=True, timeout=timeout_s, check=False).returncode
            == 0
        )


class HealthStub(Protocol):
    """What the type stub of the health service lacks."""

    Check: Callable[..., health_pb2.HealthCheckResponse]


def _grpc_passes(port: int, action: Mapping[str, Any], timeout_s: float) -> bool:
    request = health_pb2.HealthCheckRequest(service=action.get("service", ""))
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: HealthStub = health_pb2_grpc.HealthStub(channel)  # type: ignore[assignment]  # see HealthStub
        try:
            return stub.Check(request, timeout=timeout_s).status == health_pb2.HealthCheckResponse.SERVING
        except grpc.RpcError:
            return False


def _http_passes(port: int, action: Mapping[str, Any], timeout_s: float) -> bool:
    url = f"{action.get('scheme', 'HTTP').lower()}://127.0.0.1:{port}{action['path']}"
    try:
        # The kubelet asks any certificate.
        status = httpx.get(url, timeout=timeout_s, trust_env=False, verify=False).status_code
    except httpx.HTTPError:
        return False
    return 200 <= status < 400


@contextmanager
def running(resources: list[Resource], folder: Path, given: Given, timeout_s: float) -> Iterator[dict[str, Container]]:
    """All pods of an overlay: init containers to their end, then everything at once; yields them by workload."""
    substitutions = Substitutions(resources, folder)
    with ExitStack() as stack:
        containers: dict[str, Container] = {}
        for pod in sorted(pods(resources), key=lambda pod: pod.kind != "Job"):
            first = pod.spec["containers"] if pod.kind == "Job" else pod.spec.get("initContainers", ())
            for container in first:
                Container(pod, container, resources, substitutions, given).run(timeout_s)
        for pod in pods(resources):
            if pod.kind != "Job":
                (container,) = pod.spec["containers"]
                containers[pod.workload] = Container(pod, container, resources, substitutions, given)
                stack.enter_context(containers[pod.workload].running())
        yield containers
        for each in containers.values():
            each.stop()
