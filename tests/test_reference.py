"""Tests the reference of the documentation's site; `make docs` builds it."""

import re
import tomllib

import yaml
from synthetic import ROOT

import voxquilt


def test_the_reference_shows_every_public_name_once() -> None:
    """But constants, TorchIO's modules, and torch's loader."""
    shown = re.findall(r"^::: (\S+)\.(\w+)$", (ROOT / "docs/reference.md").read_text(), re.MULTILINE)
    named = {name: getattr(voxquilt, name) for name in voxquilt.__all__ if name not in ("SubjectsLoader",)}
    public = {name: value.__module__ for name, value in named.items() if callable(value)}
    assert sorted(name for _, name in shown) == sorted(public)
    assert {name: module for module, name in shown} == public


def test_the_site_has_every_document() -> None:
    """So that none is only found by chance."""
    text = (ROOT / "mkdocs.yml").read_text()
    for document in (ROOT / "docs").glob("*.md"):
        assert re.search(rf"(- |: ){document.name}$", text, re.MULTILINE), document.name


def test_the_citation_names_the_version_and_the_licence() -> None:
    """Of the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert citation["version"] == voxquilt.__version__


def test_the_package_says_that_it_is_typed() -> None:
    """To type checkers of users, by PEP 561's marker."""
    assert (ROOT / "src/voxquilt/py.typed").is_file()
