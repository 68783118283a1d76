"""Tests that a weights format of another package works with the real command, as docs/extending.md shows."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from packages import install_documented
from synthetic import Over50, noise, read, run, save

from voxquilt.errors import ConfigError
from voxquilt.models.weights.detect import check_is_weights, kind_of
from voxquilt.models.weights.reading import read_by_format
from voxquilt.models.weights.registry import WEIGHTS, ReadOptions

JOB = (
    "data.inputs=in",
    "data.patch_size=8",
    "callbacks.writer.tensorboard=false",
    "callbacks.writer.report=false",
    "callbacks.writer.compress=false",
)
NET = ("model.net._target_=synthetic.Over50",)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A package in a folder, as an installer leaves it, a volume, and weights in the format."""
    install_documented("npz_weights.py", tmp_path / "package")
    save(tmp_path / "in/a.nii", noise((9, 8, 10)))
    np.savez(tmp_path / "weights.npz", **{name: value.numpy() for name, value in Over50().state_dict().items()})
    return tmp_path


def test_the_documented_format_predicts_from_outside_the_package(place: Path) -> None:
    """With one file and one line the command reads the weights that it refused before."""
    arguments = (*JOB, *NET, "ckpt_path=weights.npz")
    done = run("predict.py", *arguments, cwd=place)
    assert done.returncode == 2
    assert "weights.npz is not a file of weights: it is NumPy arrays (.npz)" in done.stderr
    done = run("predict.py", *arguments, cwd=place, env={"PYTHONPATH": str(place / "package")})
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(read(place / "outputs/a_labels.nii"), noise((9, 8, 10)) > 50)


def test_a_missing_network_is_reported_as_for_built_in_formats(place: Path) -> None:
    """By the check of the configuration, before torch is loaded."""
    (place / "stub/torch").mkdir(parents=True)
    (place / "stub/torch/__init__.py").write_text("raise ImportError('torch was imported for a light error')\n")
    path = f"{place / 'package'}:{place / 'stub'}"
    done = run("predict.py", *JOB, "ckpt_path=weights.npz", cwd=place, env={"PYTHONPATH": path})
    assert done.returncode == 2
    assert done.stderr.startswith("voxquilt: weights.npz is weights without a network: say which network they are for")


class Broken:
    """A format that raises while it inspects a file."""

    needs_network = False

    def recognises(self, path: Path) -> bool:
        raise ZeroDivisionError("no")


class NoNetwork:
    """A format that does not return a network."""

    needs_network = False

    def recognises(self, path: Path) -> bool:
        return path.suffix == ".none"

    def read(self, path: Path, options: object) -> object:
        return 3


def installed(folder: Path, monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    """Entry points of a package in the running interpreter."""
    (folder / "own-1.0.dist-info").mkdir(parents=True)
    lines = "".join(f"{name} = {value}\n" for name, value in points.items())
    (folder / "own-1.0.dist-info/entry_points.txt").write_text(f"[voxquilt.weights]\n{lines}")
    (folder / "own-1.0.dist-info/METADATA").write_text("Name: own\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(folder))


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Entry points are read once per process: clear them before and after a test."""
    WEIGHTS.__dict__.pop("_added", None)
    yield
    WEIGHTS.__dict__.pop("_added", None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, which saves a program here
def test_a_format_that_fails_or_gives_no_network_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One message each; files that built-in formats recognise are not affected."""
    name = __name__
    installed(tmp_path / "own", monkeypatch, none=f"{name}:NoNetwork", broken=f"{name}:Broken", gone="nowhere:Format")
    (tmp_path / "a.none").write_bytes(b"some text")
    check_is_weights(tmp_path / "a.none")
    assert kind_of(tmp_path / "a.none") == "none"
    with pytest.raises(ConfigError, match=r"a\.none: the weights format 'none' made a int; wanted is a network"):
        read_by_format(tmp_path / "a.none", ReadOptions())
    with pytest.raises(ConfigError, match=r"a\.none \(none\) is a network by itself, .*leave it out"):
        read_by_format(tmp_path / "a.none", ReadOptions(torch.nn.Identity()))
    (tmp_path / "b.pt").write_bytes(b"some text")
    with pytest.raises(ConfigError, match=r"b\.pt: the weights format 'broken' failed .* ZeroDivisionError: no"):
        kind_of(tmp_path / "b.pt")
    with pytest.raises(ConfigError, match=r"'gone' cannot be imported from nowhere:Format, .* voxquilt\.weights"):
        WEIGHTS.load("gone")
    torch.jit.script(torch.nn.Identity()).save(tmp_path / "c.pt")
    assert kind_of(tmp_path / "c.pt") == "torchscript"
