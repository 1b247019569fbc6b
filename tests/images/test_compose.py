"""compose.yaml: valid by the Compose specification, and true of the images and the code."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import compose_spec
import pytest
import yaml
from compose_spec.models import ComposeSpecification

from services.common.settings import load_settings
from tests.images.dockerfile import read
from tests.k8s.checks import SETTINGS
from tests.k8s.rendering import REPOSITORY, overlay

# Read by YAML first: the specification's own reader does not merge mappings (`<<`).
COMPOSE: dict[str, Any] = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if "build" in service]


def parse(document: dict[str, Any]) -> ComposeSpecification:
    return compose_spec.PyCompose.from_json(json.dumps(document)).to_spec()


def test_valid_by_the_specification() -> None:
    assert parse(COMPOSE).services is not None


def test_what_the_specification_does_not_know_is_refused() -> None:
    document = copy.deepcopy(COMPOSE)
    document["services"]["gateway"]["restarts"] = "always"
    with pytest.raises(ValueError, match="restarts"):
        parse(document)


@pytest.mark.parametrize("name", OURS)
def test_the_services_take_their_environment(name: str) -> None:
    service = SERVICES[name]
    settings = load_settings(SETTINGS[f"services.{name}"], name, environ=service["environment"])
    exposed = next(item.text for item in read(REPOSITORY / service["build"]["dockerfile"]) if item.name == "EXPOSE")
    assert int(exposed) == vars(settings)["port"]
    assert settings.drain_timeout_s < int(service["stop_grace_period"].removesuffix("s"))
    for key, value in service["environment"].items():
        if match := re.fullmatch(r"(?:redis://)?(\w+):(\d+)(?:/\d+)?", str(value)):
            host, port = match.groups()
            assert host in SERVICES, f"{key} is {value}"
            assert set(SERVICES[host]["networks"]) & set(service["networks"])
            if host in OURS:
                peer = load_settings(SETTINGS[f"services.{host}"], host, environ=SERVICES[host]["environment"])
                assert vars(peer)["port"] == int(port)
        if value.startswith("models/"):
            copied = [item.text.split()[-1] for item in read(REPOSITORY / service["build"]["dockerfile"])]
            assert value in {target.rstrip("/") for target in copied}, f"{key}: {value} is not in the image"


def test_images_are_those_of_the_manifests() -> None:
    used = {
        container["image"]
        for item in overlay("cpu-demo")
        if item["kind"] in ("Deployment", "StatefulSet")
        for container in item["spec"]["template"]["spec"]["containers"]
    }
    assert {service["image"] for service in SERVICES.values()} == used


def test_the_health_check_asks_the_gateway() -> None:
    _, *command = SERVICES["gateway"]["healthcheck"]["test"]
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert "Connection refused" in done.stderr  # nothing listens there: the program ran and asked
    assert done.returncode != 0
