"""Tests voxquilt-export: the file predicts as its checkpoint did, with its settings, or it is not written."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from forks import Server, checked
from synthetic import noise, read, save
from torch import Tensor, nn

from voxquilt.errors import ConfigError
from voxquilt.export import exporting, writers
from voxquilt.export.command import main
from voxquilt.export.comparison import compare, outputs_of
from voxquilt.models.weights.detect import kind_of
from voxquilt.models.weights.onnx_header import fixed_patch, read_header
from voxquilt.models.weights.reading import read_exported, read_onnx, read_torchscript
from voxquilt.models.weights.stored_settings import FORMAT, KEY, carried

NET = {
    "_target_": "monai.networks.nets.UNet", "spatial_dims": 3, "in_channels": 2, "out_channels": 3,
    "channels": [4, 8, 8], "strides": [2, 2], "num_res_units": 1,
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "format": FORMAT,
    "images": ["t1", "t2"],
    "data": {"patch_size": 16, "patch_overlap": 8, "padding_mode": "reflect", "divisible_by": 1},
    "preprocess": {"_target_": "voxquilt.Preprocess", "orientation": "LPS", "spacing": 1.25, "intensity": None},
    "model": {"net": NET, "squeeze_axis": None, "activation": None},
    "stitch": {"overlap_mode": "hann", "products": ["probabilities"], "class_names": ["none", "some", "more"]},
}
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

KINDS = {"net.onnx": "onnx", "net.pt2": "exported", "net.ts": "torchscript"}


def checkpoint(path: Path, settings: Mapping[str, Any] = SETTINGS) -> nn.Module:
    """Write a checkpoint as train.py does; returns its network."""
    torch.manual_seed(0)
    node = dict(settings["model"]["net"])
    net = exporting.build(node, "net").eval()
    weights = {f"net.{key}": value for key, value in net.state_dict().items()}
    torch.save({"state_dict": weights, "pytorch-lightning_version": "2.6.6", KEY: dict(settings)}, path)
    return net


def of_class(name: str, **model: Any) -> dict[str, Any]:
    """Settings of a network of this file, with one image."""
    model = {"net": {"_target_": f"test_export.{name}"}, "squeeze_axis": None, "activation": None} | model
    return SETTINGS | {"images": ["t1"], "model": model}


class OneWeight(nn.Module):
    """A network with a weight, so that there is something to load."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))


class Named(OneWeight):
    """Two outputs by name."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"seg": torch.cat([x, -x], 1), "edge": x * 2}


class Listed(OneWeight):
    """Two outputs in a list."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [torch.cat([x, -x], 1), x * 2]


class Flat(nn.Conv2d):
    """A 2-D network."""

    def __init__(self) -> None:
        super().__init__(1, 2, 3, padding=1)


class FewPatches(OneWeight):
    """Does otherwise for many patches, so that torch.export cannot leave their number free."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 3 if x.shape[0] < 100 else x


class PerBatch(OneWeight):
    """Depends on the number of patches, which tracing makes a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.shape[0])


class Looks(OneWeight):
    """Branches on values, which no exporter can follow."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 0 else x


class Random(OneWeight):
    """Gives other outputs each time."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class NotANumber(OneWeight):
    """Gives NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs().neg().sqrt()


class Text(nn.Module):
    """An output that is not a tensor."""

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x, "text"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two images, its exports, and a subject."""
    folder = tmp_path_factory.mktemp("export")
    checkpoint(folder / "best.ckpt")
    for n, name in enumerate(("t1", "t2")):
        save(folder / f"in/a/{name}.nii", noise((20, 18, 22), n).astype(np.float32) / 50 - 1)
    for name in KINDS:
        main([str(folder / "best.ckpt"), str(folder / name)])
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The only message of an export that is refused with exit status 2."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("voxquilt: ") == 1
    assert "Traceback" not in printed.err
    return printed.err


def left(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# Round trip


def test_every_format_predicts_as_the_checkpoint_with_its_settings(place: Path, forks: Server) -> None:
    """The same command, with nothing but another file: volumes agree to 1e-4."""
    images = 'data.images={t1: "in/{subject}/t1.nii", t2: "in/{subject}/t2.nii"}'
    made = {}
    for name in ("best.ckpt", *KINDS):
        options = (f"ckpt_path={name}", f"output_dir=out_{name}", "callbacks.writer.compress=false")
        job = forks.start(images, *options, cwd=place)
        assert checked(job.wait()) == 0, job.text
        assert f"from {name}: data.patch_size=" in job.text
        made[name] = read(place / f"out_{name}/a_probabilities.nii")
    wanted = made.pop("best.ckpt")
    assert wanted.shape == (20, 18, 22, 3)
    assert wanted.std() > 0.01
    for volume in made.values():
        np.testing.assert_allclose(volume, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", KINDS)
def test_the_settings_are_those_of_the_checkpoint_without_its_network(place: Path, name: str) -> None:
    """The file is a network by itself, and takes patches of the size that it says."""
    settings = carried(place / "best.ckpt")
    assert settings is not None
    del settings["model"]["net"]
    settings["data"]["patch_size"] = [16, 16, 16]
    assert carried(place / name) == settings
    assert kind_of(place / name) == KINDS[name]


def test_settings_in_an_archive_are_checked_as_those_of_a_checkpoint(tmp_path: Path) -> None:
    """A file may not say that it is trusted."""
    script = torch.jit.trace(nn.Identity(), torch.zeros(1))
    text = '{"format": 1, "model": {"trust_checkpoint": true}}'
    torch.jit.save(script, tmp_path / "a.ts", _extra_files={KEY: text})
    with pytest.raises(ConfigError, match=r"model\.trust_checkpoint, which no checkpoint may bring"):
        carried(tmp_path / "a.ts")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_file_takes_any_number_of_patches(place: Path, name: str, count: int) -> None:
    """And gives the network's outputs."""
    reader = {"net.onnx": read_onnx, "net.pt2": read_exported, "net.ts": read_torchscript}[name]
    (network,) = reader(place / name)
    wanted = checkpoint(place / "again.ckpt")
    batch = torch.randn(count, 2, 16, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(network(batch), wanted(batch), atol=1e-5, rtol=1e-4)


def test_the_module_and_the_settings_of_the_class_path_work_from_the_shell(place: Path, tmp_path: Path) -> None:
    """`python -m voxquilt.export` says what it wrote and how near it is; a class of the user's is found beside him."""
    (tmp_path / "mine.py").write_text("from torch import nn\nclass Net(nn.Conv3d):\n    pass\n")
    node = {"_target_": "mine.Net", "in_channels": 1, "out_channels": 2, "kernel_size": 1}
    net = nn.Conv3d(1, 2, 1)
    weights = {f"net.{key}": value for key, value in net.state_dict().items()}
    settings = SETTINGS | {"images": ["t1"], "model": {"net": node}}
    torch.save({"state_dict": weights, KEY: settings}, tmp_path / "a.ckpt")
    command = [sys.executable, "-m", "voxquilt.export", "a.ckpt", "a.pt2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "the checkpoint names mine.Net" in done.stderr
    assert "--allow 'my_package.*'" in done.stderr
    done = subprocess.run([*command, "--allow", "mine.*"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith(
        "a.pt2: patches of 16 x 16 x 16, any number at a time. Outputs differ from those of a.c"
    )


# Options


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_patch_and_batch_size_can_be_chosen(place: Path, tmp_path: Path, suffix: str) -> None:
    """They are the only ones that the file takes, and its settings say so; patches share the same part of them."""
    path = tmp_path / f"a.{suffix}"
    main([str(place / "best.ckpt"), str(path), "--patch-size", "[8,12,16]", "--batch-size", "2"])
    (network,) = (read_onnx if suffix == "onnx" else read_exported)(path)
    assert network.sizes == (2, 2, 8, 12, 16)
    settings = carried(path)
    assert settings is not None
    assert settings["data"]["patch_size"] == [8, 12, 16]
    assert settings["data"]["patch_overlap"] == [4, 6, 8]


def test_a_2d_network_is_exported_without_the_squeezed_axis(tmp_path: Path) -> None:
    """Patches of (I, K) voxels for model.squeeze_axis=1."""
    settings = of_class("Flat", squeeze_axis=1)
    checkpoint(tmp_path / "a.ckpt", settings)
    main([str(tmp_path / "a.ckpt"), str(tmp_path / "a.onnx"), "--allow", "test_export.*", "--patch-size", "8,1,12"])
    assert fixed_patch(tmp_path / "a.onnx") == (8, 12)


@pytest.mark.parametrize(("name", "outputs"), [("Named", ["seg", "edge"]), ("Listed", ["out0", "out1"])])
def test_several_outputs_keep_their_names(tmp_path: Path, name: str, outputs: Sequence[str]) -> None:
    """Those of a mapping, or the ones that a list's outputs get in a run."""
    checkpoint(tmp_path / "a.ckpt", of_class(name))
    for suffix in ("onnx", "pt2", "ts"):
        main([str(tmp_path / "a.ckpt"), str(tmp_path / f"a.{suffix}"), "--allow", "test_export.*"])
    assert [value.name for value in read_header(tmp_path / "a.onnx").outputs] == outputs
    batch = torch.randn(2, 1, 16, 16, 16)
    made = read_onnx(tmp_path / "a.onnx")[0](batch)
    assert torch.equal(made[outputs[0]], torch.cat([batch, -batch], 1))
    assert torch.equal(made[outputs[1]], batch * 2)


def test_a_network_that_cannot_leave_the_batch_free_takes_one_patch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the answer says so."""
    checkpoint(tmp_path / "a.ckpt", of_class("FewPatches"))
    main([str(tmp_path / "a.ckpt"), str(tmp_path / "a.onnx"), "--allow", "test_export.*"])
    assert "patches of 16 x 16 x 16, 1 at a time" in capsys.readouterr().out
    assert read_header(tmp_path / "a.onnx").inputs[0].sizes == (1, 1, 16, 16, 16)


def test_weights_that_one_file_cannot_hold_lie_beside_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both files are named, and are found when they are moved together."""
    monkeypatch.setattr(writers, "ONE_FILE", 1000)
    main([str(place / "best.ckpt"), str(tmp_path / "a.onnx")])
    assert f"{tmp_path / 'a.onnx'} and {tmp_path / 'a.onnx.data'}: patches" in capsys.readouterr().out
    assert left(tmp_path) == ["a.onnx", "a.onnx.data"]
    (tmp_path / "moved").mkdir()
    for name in ("a.onnx", "a.onnx.data"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    batch = torch.randn(1, 2, 16, 16, 16)
    made = read_onnx(tmp_path / "moved/a.onnx")[0](batch)
    torch.testing.assert_close(made, read_onnx(place / "net.onnx")[0](batch), atol=1e-6, rtol=1e-6)


def test_the_file_says_nothing_of_the_machine_that_wrote_it(place: Path) -> None:
    """Exporters note where the network's source lies."""
    model = onnx.load(place / "net.onnx")
    assert [entry.key for entry in model.metadata_props] == [KEY]
    assert all(not node.metadata_props for node in model.graph.node)
    assert b"site-packages" not in (place / "net.onnx").read_bytes()


# What is refused


@pytest.mark.parametrize(
    ("name", "suffix", "message"),
    [
        ("PerBatch", "ts", "gives other outputs than the network, by up to"),
        ("Random", "onnx", "gives other outputs than the network, by up to"),
        ("Random", "pt2", "gives other outputs than the network, by up to"),
        ("NotANumber", "pt2", "by up to nan"),
        ("Looks", "pt2", "the network cannot be exported by torch.export: "),
        ("Looks", "onnx", "the network cannot be exported by torch.export: "),
    ],
)
def test_a_file_with_other_outputs_is_not_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, suffix: str, message: str
) -> None:
    """For another number of patches, for random outputs, for NaN; nor one that cannot be written. Nothing is left."""
    checkpoint(tmp_path / "a.ckpt", of_class(name))
    text = refused(capsys, tmp_path / "a.ckpt", tmp_path / f"a.{suffix}", "--allow", "test_export.*")
    assert message in text
    assert left(tmp_path) == ["a.ckpt"]


def test_a_difference_is_compared_with_the_range_of_the_outputs() -> None:
    """0.9e-4 and 1.1e-4 of a range of 10."""
    wanted = torch.linspace(-5, 5, 11).reshape(1, 1, 11)
    found = compare(Path("a.onnx"), [wanted], [wanted + 0.9e-3])
    assert found.largest == pytest.approx(0.9e-3, rel=1e-3)
    assert found.share == pytest.approx(0.9e-4, rel=1e-3)
    with pytest.raises(ConfigError, match=r"a\.onnx gives other outputs than the network, by up to 0\.0011"):
        compare(Path("a.onnx"), [wanted], [wanted + 1.1e-3])
    with pytest.raises(ConfigError, match=r"by up to nan"):
        compare(Path("a.onnx"), [wanted, wanted], [wanted * float("nan"), wanted])
    for other in ([wanted, wanted], [wanted[..., :-1]]):
        with pytest.raises(ConfigError, match=r"a\.onnx gives outputs of"):
            compare(Path("a.onnx"), [wanted], other)
    with pytest.raises(ConfigError, match="not all of its outputs are tensors"):
        outputs_of(Text(), wanted)


def test_an_existing_file_is_kept_unless_it_is_to_be_replaced(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the new one cannot be made; never the checkpoint itself."""
    (tmp_path / "a.ts").write_text("mine")
    assert "a.ts is there already" in refused(capsys, place / "best.ckpt", tmp_path / "a.ts")
    refused(capsys, place / "best.ckpt", tmp_path / "a.ts", "--overwrite", "--patch-size", "14")
    assert (tmp_path / "a.ts").read_text() == "mine"
    main([str(place / "best.ckpt"), str(tmp_path / "a.ts"), "--overwrite"])
    assert kind_of(tmp_path / "a.ts") == "torchscript"
    capsys.readouterr()
    (tmp_path / "same.ts").write_bytes((place / "best.ckpt").read_bytes())
    assert "is there already" in refused(capsys, tmp_path / "same.ts", tmp_path / "same.ts", "--overwrite")
    assert left(tmp_path) == ["a.ts", "same.ts"]


def test_a_folder_that_cannot_be_written_is_one_message(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the operating system says it."""

    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(exporting.tempfile, "TemporaryDirectory", fail)
    assert "Permission denied" in refused(capsys, place / "best.ckpt", tmp_path / "a.ts")


def bare(path: Path) -> Path:
    torch.save(nn.Conv3d(1, 1, 1).state_dict(), path)
    return path


WRONG: dict[str, tuple[Callable[[Path, Path], Sequence[object]], str]] = {
    "no file": (lambda p, t: (t / "no.ckpt", t / "a.onnx"), "there is no file"),
    "suffix": (lambda p, t: (p / "best.ckpt", t / "a.txt"), "a.txt: the suffix says what is written: .onnx for ONNX"),
    "folder": (lambda p, t: (p / "best.ckpt", t / "no/a.onnx"), "there is no folder"),
    "network": (lambda p, t: (p / "net.ts", t / "a.onnx"), "is a network by itself (torchscript)"),
    "onnx": (lambda p, t: (p / "net.onnx", t / "a.ts"), "is a network by itself (onnx)"),
    "bare": (lambda p, t: (bare(t / "a.pt"), t / "a.onnx"), "does not bring its network and settings"),
    "patch": (lambda p, t: (p / "best.ckpt", t / "a.onnx", "--patch-size", "a"), "--patch-size is an integer or three"),
    "no multiple": (lambda p, t: (p / "best.ckpt", t / "a.onnx", "--patch-size", "14"), "patches of [14, 14, 14]"),
    "batch": (lambda p, t: (p / "best.ckpt", t / "a.onnx", "--batch-size", "0"), "--batch-size must be at least 1"),
    "batch of TorchScript": (lambda p, t: (p / "best.ckpt", t / "a.ts", "--batch-size", "2"), "leave --batch-size out"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_exported_is_one_message(
    name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With exit status 2, and no file."""
    make, message = WRONG[name]
    assert message in refused(capsys, *make(place, tmp_path))
    assert [file for file in left(tmp_path) if file != "a.pt"] == []


def test_without_the_exporter_the_message_says_what_to_install(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxscript is needed for writing only."""
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "pip install 'voxquilt[onnx-export]'" in refused(capsys, place / "best.ckpt", tmp_path / "a.onnx")
    assert left(tmp_path) == []
