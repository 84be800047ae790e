"""A package of somebody else's that declares an entry point is found, and all that we declare is there."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "somebodys-attacks"
version = "1.0"
dependencies = ["deepenc"]

[project.entry-points."deepenc.attacks"]
somebodys = "somebodys:Somebodys"
unwell = "somebodys:Missing"

[tool.hatch.build.targets.wheel]
include = ["somebodys.py"]
"""

MODULE = '''\
"""An attack in a package of its own."""

from typing import ClassVar

from deepenc.arena.case import Attack, Case, Claim


class Somebodys(Attack):
    """Hand the network back."""

    name: ClassVar[str] = "somebodys"

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        return Claim(network=case.encrypted)
'''


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the package was built and installed, without a network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "somebodys.py").write_text(MODULE)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "--no-build-isolation", "--target", str(target), str(source)],
        check=True,
        capture_output=True,
        text=True,
    )
    return target


def listed(site: Path | None) -> dict[str, str]:
    """What `deepenc list attacks` says, in a process that sees the folder."""
    path = {} if site is None else {"PYTHONPATH": str(site)}
    command = [sys.executable, "-c", "from deepenc.cli import main; main()", "list", "attacks"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | path)
    return {line.split()[0]: line for line in done.stdout.splitlines()}


def test_a_third_party_attack_is_listed_beside_ours(site: Path) -> None:
    ours, both = listed(None), listed(site)
    assert "somebodys" not in ours
    assert set(both) == {*ours, "somebodys", "unwell"}
    assert both["somebodys"].endswith("Hand the network back.")
    assert "BROKEN" in both["unwell"]


def entry_points() -> list[tuple[str, str, str]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [
        (group, name, target)
        for group, points in project["entry-points"].items()
        for name, target in points.items()
    ]


@pytest.mark.parametrize(("group", "name", "target"), entry_points())
def test_nothing_is_declared_that_does_not_work(group: str, name: str, target: str) -> None:
    module, _, attribute = target.partition(":")
    found = getattr(import_module(module), attribute)
    assert (found.__name__ if group == "deepenc.networks" else found.name) == name
