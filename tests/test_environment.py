"""environment.yml lists what pyproject.toml lists, no more and no less."""

import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
CONDA_NAMES = {"torch": "pytorch-cpu", "matplotlib": "matplotlib-base"}

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))


def conda_packages() -> dict[str, str]:
    """Name and version of every conda line but the pip section."""
    lines = [line for line in ENVIRONMENT["dependencies"] if isinstance(line, str)]
    # conda's single "=" is no Python specifier: 3.12 means 3.12.*
    requirements = [Requirement(line.replace("=", "==") + ".*" if is_pin(line) else line) for line in lines]
    assert len({r.name for r in requirements}) == len(requirements), "a package stands twice"
    return {r.name: str(r.specifier) for r in requirements}


def is_pin(line: str) -> bool:
    return "=" in line and not any(operator in line for operator in ("==", ">=", "<=", "!=", "~="))


def test_same_dependencies():
    requirements = [Requirement(line) for line in PROJECT["dependencies"]]
    expected = {CONDA_NAMES.get(r.name, r.name): str(r.specifier) for r in requirements}
    listed = conda_packages()
    del listed["python"], listed["pip"]
    assert listed == expected


def test_python_is_one_that_the_package_admits():
    pinned = conda_packages()["python"].removeprefix("==").removesuffix(".*")
    assert pinned in SpecifierSet(PROJECT["requires-python"])


def test_the_package_itself_comes_from_the_checkout():
    assert ENVIRONMENT["name"] == PROJECT["name"]
    assert ENVIRONMENT["channels"] == ["conda-forge"]
    assert [line for line in ENVIRONMENT["dependencies"] if not isinstance(line, str)] == [{"pip": ["-e ."]}]
