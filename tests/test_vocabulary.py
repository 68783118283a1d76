"""Tests registries: names of other packages are found beside our own and never replace them."""

from pathlib import Path

import pytest

from voxquilt.errors import ConfigError
from voxquilt.stitching import blend
from voxquilt.stitching.blend_registry import BLENDS
from voxquilt.vocabulary import Registry

GROUP = "voxquilt.tests"


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """One own entry, and a package with three: a working one, one that cannot be imported, one of the same name."""
    info = tmp_path / "package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nhann = nowhere:X\nroot = math:sqrt\ngone = nowhere:X\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return Registry("blend", {"hann": "voxquilt.stitching.blend:HANN"}, GROUP)


def test_names_of_packages_come_after_our_own_and_do_not_replace_them(registry: Registry) -> None:
    """In iteration, membership and loading."""
    assert list(registry) == ["hann", "root", "gone"]
    assert registry.own == ("hann",)
    assert registry.load("hann") is blend.HANN
    assert registry.load("root")(4) == 2
    assert "root" in registry
    assert "nothing" not in registry


def test_an_entry_that_cannot_be_loaded_is_an_error_that_names_it(registry: Registry) -> None:
    """An unknown name with the nearest one, and an entry of a package with its origin."""
    with pytest.raises(ConfigError, match=r"stitch\.x must be one of hann, root, gone; .* Did you mean hann\?"):
        registry.check("han", "stitch.x")
    for other in (3, None, ["hann"]):
        with pytest.raises(ConfigError, match="must be one of hann"):
            registry.check(other, "stitch.x")
    with pytest.raises(ConfigError, match=r"the blend 'gone' cannot be imported from nowhere:X, .* voxquilt\.tests"):
        registry.load("gone")


@pytest.mark.parametrize("name", BLENDS.own)
def test_every_entry_of_the_blend_registry_loads_a_blend(name: str) -> None:
    """Each is a Blend."""
    assert isinstance(BLENDS.load(name), blend.Blend)
