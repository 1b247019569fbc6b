"""The Dockerfiles: linted, true of the code, and, slowly, carried out on this machine until each service serves."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from services.launcher.readiness import Probe, grpc_probe, http_probe
from tests.images.dockerfile import Instruction, Replay, Stage, read
from tests.k8s.rendering import REPOSITORY, overlay, pods
from tests.ports import free_port

SERVICES = ("gateway", "speculator", "verifier")
HADOLINT = Path(sys.executable).parent / "hadolint"
START_TIMEOUT_S = 120.0
# What a service must be told to start alone, beside its addresses.
MODELS = {
    "gateway": {"MODEL": "models/default-llm"},
    "speculator": {"SSM": "models/default-ssm-1,models/default-ssm-2", "KV_MEMORY": "0.01"},
    "verifier": {"LLM": "models/default-llm", "KV_MEMORY": "0.01"},
}


def dockerfile(service: str) -> Path:
    return REPOSITORY / "services" / service / "Dockerfile"


def texts(service: str, name: str) -> list[str]:
    return [instruction.text for instruction in read(dockerfile(service)) if instruction.name == name]


@pytest.mark.parametrize("service", SERVICES)
def test_hadolint_has_nothing_to_say(service: str) -> None:
    done = subprocess.run([HADOLINT, dockerfile(service)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_finds_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python:latest\nRUN cd /tmp && apt-get install g++\n")
    done = subprocess.run([HADOLINT, tmp_path / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert {"DL3007", "DL3008"} <= set(re.findall(r"DL\d+", done.stdout))


@pytest.mark.parametrize("service", SERVICES)
def test_pinned_bases_and_no_root(service: str) -> None:
    stages: set[str] = set()
    for text in texts(service, "FROM"):
        image, _, name = text.partition(" AS ")
        assert image in stages or re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", image), image
        stages.add(name)
    assert texts(service, "USER")[-1] == "10001:10001"


@pytest.mark.parametrize("service", SERVICES)
def test_the_repository_is_the_context_and_no_other_service_is_copied(service: str) -> None:
    """In several stages, of which the last takes what the first has installed for this service."""
    assert len(texts(service, "FROM")) >= 2
    assert any(text.startswith("--from=build /opt/venv") for text in texts(service, "COPY"))
    sources = [word for text in texts(service, "COPY") if "--from" not in text for word in text.split()[:-1]]
    for source in sources:
        assert list(REPOSITORY.glob(source)), source
    services = {source for source in sources if source.startswith("services/")}
    assert services == {"services/__init__.py", "services/common", f"services/{service}"}
    installed = [extra for text in texts(service, "RUN") for extra in re.findall(r'"\.\[(\w+)\]"', text)]
    assert installed == [service]
    builds = any("python -m kernels.build" in text for text in texts(service, "RUN"))
    assert builds == (service != "gateway"), "kernels are built in the images that compute"


@pytest.mark.parametrize("service", SERVICES)
def test_the_command_is_that_of_the_manifests(service: str) -> None:
    (pod,) = (pod for pod in pods(overlay("cpu-demo")) if pod.workload == service)
    (container,) = pod.spec["containers"]
    assert json.loads(texts(service, "CMD")[0]) == container["command"]
    assert int(texts(service, "EXPOSE")[0]) in pod.ports().values()
    assert pod.spec["securityContext"]["runAsUser"] == 10001


def test_instructions_are_read_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("# a comment\nFROM a AS b\nRUN one \\\n    && two\n")
    assert read(tmp_path / "Dockerfile") == [Instruction("FROM", "a AS b"), Instruction("RUN", "one && two")]


@contextmanager
def serving(service: str, stage: Stage) -> Iterator[tuple[Probe, Path]]:
    """The image's command in its environment, with a probe for it and its log."""
    port = free_port()
    settings = {"PORT": str(port), "INSECURE": "true"} | MODELS[service]
    environment = {**stage.environment, "HOME": str(stage.folder)}
    environment |= {f"SPECSERVE_{service.upper()}_{name}": value for name, value in settings.items()}
    log = stage.folder / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            json.loads(stage.command), cwd=stage.folder, env=environment, stdout=stream, stderr=stream
        )
    address = f"127.0.0.1:{port}"
    try:
        yield http_probe(f"http://{address}/health") if service == "gateway" else grpc_probe(address), log
        process.terminate()
        assert process.wait(START_TIMEOUT_S) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def wait_for(probe: Probe, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while (missing := asyncio.run(probe())) is not None:
        assert time.monotonic() < deadline, f"{missing}: {log.read_text()}"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("service", SERVICES)
def test_the_image_s_steps_give_a_service_that_serves(service: str, tmp_path: Path) -> None:
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("SPECSERVE_", "PYTHONPATH"))}
    # Where torch's build comes from is this machine's business here.
    stage = Replay(REPOSITORY, tmp_path, {"TORCH_INDEX": ""}, outside).run(dockerfile(service))
    others = ["fastapi", "uvicorn", "redis", "tokenizers"] if service != "gateway" else ["torch", "numpy"]
    program = f"import importlib.util as u; print([name for name in {['torch', *others]} if u.find_spec(name)])"
    done = subprocess.run(["python", "-c", program], env=stage.environment, timeout=60, capture_output=True, check=True)
    with_torch = service != "gateway"
    assert done.stdout.decode().strip() == str(["torch"] if with_torch else [])
    with serving(service, stage) as (probe, log):
        wait_for(probe, log)
    if with_torch:
        assert re.search(r"because=.*loaded specserve-(x86-64|armv8)", log.read_text()), log.read_text()
