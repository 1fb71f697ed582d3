"""The image's recipe: everything it copies is there, nothing else gets in, and no engine."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def steps(root: Path) -> list[tuple[str, str]]:
    """Instruction and arguments, comments left out and continued lines joined."""
    text = (root / "deploy" / "docker" / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [
        (word, rest) for word, _, rest in (x.partition(" ") for x in joined.split("\n")) if word
    ]


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text())


def arguments(steps: list[tuple[str, str]], instruction: str) -> list[str]:
    return [rest for word, rest in steps if word == instruction]


def copied(steps: list[tuple[str, str]]) -> set[str]:
    """What is copied from the checkout."""
    plain = [rest for rest in arguments(steps, "COPY") if not rest.startswith("--from")]
    return {path for rest in plain for path in rest.split()[:-1]}


def test_what_is_copied_is_what_the_package_is_built_from(
    steps: list[tuple[str, str]], project: dict[str, Any], root: Path
) -> None:
    packages = set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    metadata = {
        "pyproject.toml",
        project["project"]["readme"],
        *project["project"]["license-files"],
    }
    assert copied(steps) == packages | metadata | {"deploy/gateway.lock.txt"}
    assert all((root / path).exists() for path in copied(steps))


def test_nothing_else_of_the_checkout_is_sent(steps: list[tuple[str, str]], root: Path) -> None:
    lines = (root / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied(steps)


def test_both_stages_have_one_python_that_is_supported(steps: list[tuple[str, str]]) -> None:
    images = {rest.split()[0] for rest in arguments(steps, "FROM")}
    assert len(arguments(steps, "FROM")) == 2
    (image,) = images
    assert image in {"python:3.11-slim", "python:3.12-slim", "python:3.13-slim"}


def test_packages_are_the_tested_ones_and_no_engine(steps: list[tuple[str, str]]) -> None:
    runs = " ".join(arguments(steps, "RUN"))
    installs = re.findall(r"pip\S*(?: --python \S+)? install [^&]*", runs)
    assert len(installs) == 2
    assert all("-c deploy/gateway.lock.txt" in install for install in installs)
    assert [re.findall(r'"(.*?)"', install) for install in installs] == [
        [".[cache,forecast,gpu,keda,knative,kubernetes,picker]"],
        [".[compile]"],
    ]
    assert not re.search("torch|vllm", runs)


def test_it_runs_as_nobody_in_particular(
    steps: list[tuple[str, str]], project: dict[str, Any]
) -> None:
    (user,) = arguments(steps, "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "a number, which Kubernetes can tell from root"
    assert f"useradd --uid {user.partition(':')[0]} " in " ".join(arguments(steps, "RUN"))
    (entry,) = arguments(steps, "ENTRYPOINT")
    assert entry == '["tidegate"]'
    assert "tidegate" in project["project"]["scripts"]


def test_the_engines_image_has_the_vllm_that_is_tested_and_the_whole_package(
    root: Path, project: dict[str, Any]
) -> None:
    text = (root / "deploy" / "docker" / "engine.Dockerfile").read_text()
    (base,) = re.findall(r"^FROM vllm/vllm-openai:v(\S+)$", text, re.MULTILINE)
    assert f"vllm=={base}\n" in (root / "deploy" / "engine-cuda.txt").read_text()
    copied = {
        word for rest in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for word in rest.split()
    }
    packages = set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    assert copied == packages | {"LICENSE", "README.md", "pyproject.toml"}
    assert "vllm.general_plugins" in project["project"]["entry-points"]
