"""Tests NiiVue's script: fetched with its checksum, never a wrong one, with its licences beside it."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from voxquilt.filesystem import checksum
from voxquilt.report import niivue


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """A folder to fetch into, and a registry whose package has a given script."""
    monkeypatch.setattr(niivue, "SCRIPT", tmp_path / "vendor/niivue.umd.js")

    def serve(content: bytes) -> None:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as package:
            member = tarfile.TarInfo("package/dist/niivue.umd.js")
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))
        monkeypatch.setattr(niivue, "_packed", lambda *_: packed.getvalue())

    return serve


def test_what_comes_is_kept_only_with_the_right_checksum(
    registry: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is not fetched again."""
    registry(b"something else")
    with pytest.raises(OSError, match="another checksum"):
        niivue.fetch()
    assert not niivue.SCRIPT.exists()
    registry(b"the script")
    monkeypatch.setattr(niivue, "SHA256", "5d4e2d5b0e1d8a6a" * 4)
    with pytest.raises(OSError, match="another checksum"):
        niivue.fetch()
    (niivue.SCRIPT.parent.parent / "x").write_bytes(b"the script")
    monkeypatch.setattr(niivue, "SHA256", checksum(niivue.SCRIPT.parent.parent / "x"))
    niivue.fetch()
    assert niivue.is_here()
    assert [path.name for path in niivue.SCRIPT.parent.iterdir()] == ["niivue.umd.js"]
    monkeypatch.setattr(niivue, "_packed", lambda *_: pytest.fail("fetched again"))
    niivue.fetch()
    niivue.SCRIPT.write_bytes(b"damaged")
    assert not niivue.is_here()


def test_a_registry_that_cannot_be_reached_is_one_message(
    registry: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With exit status 2."""

    def fails(*_: str) -> bytes:
        raise OSError("no network")

    monkeypatch.setattr(niivue, "_packed", fails)
    with pytest.raises(SystemExit) as end:
        niivue.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_licences_of_the_script_and_of_what_it_bundles_are_beside_it() -> None:
    """In the package itself, since npm's has none of its own."""
    vendor = Path(niivue.__file__).parent / "vendor"
    own, others = ((vendor / f"{name}.txt").read_text() for name in ("NIIVUE_LICENSE", "THIRD_PARTY_LICENSES"))
    assert "Copyright (c) 2021, Niivue" in own
    assert "Redistributions in binary form" in own
    for package in (
        "gl-matrix",
        "fflate",
        "nifti-reader-js",
        "zarrita",
        "array-equal",
        "numcodecs",
        "uuid",
        "structured-clone",
    ):
        assert package in others
    assert others.count("Permission") >= 8
