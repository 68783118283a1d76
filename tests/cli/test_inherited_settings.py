"""Tests settings that a checkpoint carries: used where the user sets nothing, and trusted with little."""

import json
import pickle
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from forks import Server, checked
from hypothesis import given
from hypothesis import strategies as st
from monai.networks.nets import UNet
from omegaconf import OmegaConf
from safetensors.torch import save_file
from synthetic import Over50, read

from voxquilt.cli.instantiate import check_classes
from voxquilt.errors import ConfigError
from voxquilt.models.patch_network import PatchNetwork
from voxquilt.models.weights.detect import kind_of
from voxquilt.models.weights.stored_settings import FORMAT, KEY, carried, to_carry
from voxquilt.planning.network_check import check_network

NET = {
    "_target_": "monai.networks.nets.UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": [4, 8],
    "strides": [2],
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "format": FORMAT,
    "images": ["image"],
    "data": {"patch_size": 16, "patch_overlap": 8, "padding_mode": None, "divisible_by": 1},
    "preprocess": {
        "_target_": "voxquilt.Preprocess",
        "orientation": "RAS",
        "spacing": None,
        "intensity": None,
    },
    "model": {"net": NET, "squeeze_axis": None, "activation": None},
    "stitch": {"overlap_mode": "hann", "products": None, "threshold": None, "class_names": ["none", "some"]},
}

ALLOWED = ["voxquilt.*", "monai.networks.*", "monai.transforms.*", "torch.nn.*"]


def unet(seed: int | None = None, **options: Any) -> UNet:
    """The network of the settings."""
    if seed is not None:
        torch.manual_seed(seed)
    return UNet(**{key: value for key, value in NET.items() if key != "_target_"} | options)


def checkpoint(path: Path, settings: Mapping[str, Any] | None = None, net: torch.nn.Module | None = None) -> Path:
    """A checkpoint as train.py saves it."""
    weights = {f"net.{key}": value for key, value in (net or unet()).state_dict().items()}
    content = {"state_dict": weights, "pytorch-lightning_version": "2.6.6", "epoch": 3}
    torch.save(content | ({KEY: dict(settings)} if settings is not None else {}), path)
    return path


def script(path: Path, net: torch.nn.Module | None = None, extra: Mapping[str, str] | None = None) -> None:
    """A network as a TorchScript archive."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace((net or unet()).eval(), torch.zeros(1, 1, 16, 16, 16))
        torch.jit.save(traced, path, _extra_files=dict(extra or {}))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An image, and a checkpoint with settings."""
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(size=(20, 18, 22)), np.eye(4)), tmp_path / "a.nii.gz")
    checkpoint(tmp_path / "best.ckpt", SETTINGS)
    return tmp_path


def predict(forks: Server, place: Path, *arguments: str, wanted: int = 0) -> str:
    """Run predict.py with the image and the checkpoint; returns its output."""
    run = forks.start("data.inputs=a.nii.gz", *arguments, cwd=place)
    assert checked(run.wait()) == wanted, run.text
    assert "Traceback" not in run.text
    return run.text


# Reading stored settings


def test_stored_settings_are_read_back_unchanged(tmp_path: Path) -> None:
    """From a checkpoint and from a safetensors file's metadata; None if a file has none."""
    assert carried(checkpoint(tmp_path / "a.ckpt", SETTINGS)) == SETTINGS
    assert carried(checkpoint(tmp_path / "b.ckpt")) is None
    save_file(unet().state_dict(), tmp_path / "c.safetensors", {KEY: json.dumps(SETTINGS)})
    save_file(unet().state_dict(), tmp_path / "d.safetensors")
    assert carried(tmp_path / "c.safetensors") == SETTINGS
    assert carried(tmp_path / "d.safetensors") is None
    (tmp_path / "e.ckpt").write_bytes(b"no zip")
    assert carried(tmp_path / "e.ckpt") is None


@pytest.mark.parametrize("protocol", [2, 4])
def test_torchs_old_format_carries_settings_and_runs_nothing(protocol: int, tmp_path: Path) -> None:
    """It is several pickles, of which the content is not the first; a file that is cut in it has no settings."""
    content = torch.load(checkpoint(tmp_path / "a.ckpt", SETTINGS), weights_only=True)
    content["bomb"] = Bomb(tmp_path / "marker")
    old = tmp_path / "old.ckpt"
    torch.save(content, old, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    assert carried(old) == SETTINGS
    assert kind_of(old) == "lightning"
    old.write_bytes(old.read_bytes()[:200])
    assert carried(old) is None
    assert not (tmp_path / "marker").exists()


def test_a_checkpoint_in_torchs_old_format_predicts_as_in_the_new(forks: Server, place: Path) -> None:
    """By its own settings and weights."""
    content = torch.load(place / "best.ckpt", weights_only=True)
    torch.save(content, place / "old.ckpt", _use_new_zipfile_serialization=False)
    for name in ("best", "old"):
        predict(forks, place, f"ckpt_path={name}.ckpt", f"output_dir={name}", "stitch.products=[probabilities]")
    new, old = (nib.load(place / name / "a_probabilities.nii.gz").get_fdata() for name in ("best", "old"))
    assert new.std() > 0
    assert np.array_equal(new, old)


words = st.text("ab {}.ü\n")
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words,
    lambda children: st.lists(children) | st.dictionaries(words, children),
    max_leaves=10,
)


@given(st.dictionaries(words, plain))
def test_any_plain_settings_are_read_back_unchanged(settings: dict[str, Any]) -> None:
    """Next to tensors, optimizer states and objects, which are left out."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.ckpt"
        content = {
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
            KEY: SETTINGS | {"model": {"net": settings}},
            "callbacks": {"path": Path("somewhere")},
        }
        torch.save(content, path)
        assert carried(path) == SETTINGS | {"model": {"net": settings}}


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("where", ["settings", "beside"])
def test_reading_settings_runs_no_code_in_or_beside_them(tmp_path: Path, where: str) -> None:
    """Settings that are not plain values are refused."""
    bomb = Bomb(tmp_path / "marker")
    content = {KEY: SETTINGS | ({"bomb": bomb} if where == "settings" else {}), "bomb": bomb}
    torch.save(content, tmp_path / "a.ckpt")
    if where == "settings":
        with pytest.raises(ConfigError, match=r"a\.ckpt: its settings are not plain values"):
            carried(tmp_path / "a.ckpt")
    else:
        assert carried(tmp_path / "a.ckpt") == SETTINGS
    assert not (tmp_path / "marker").exists()


def test_settings_with_interpolations_are_refused(tmp_path: Path) -> None:
    """An interpolation could read the environment of the user who predicts."""
    settings = SETTINGS | {"stitch": {"class_names": ["${oc.env:HOME}"]}}
    with pytest.raises(ConfigError, match="not plain values"):
        carried(checkpoint(tmp_path / "a.ckpt", settings))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("model", "trust_checkpoint", True), ("model", "_target_", "os.system"), ("data", "inputs", "/"),
     ("stitch", "postprocess", []), ("preprocess", "nonfinite", "zero"), ("data", "skip", 3)],
)  # fmt: skip
def test_a_checkpoint_may_set_no_other_keys(forks: Server, place: Path, section: str, key: str, value: object) -> None:
    """Such as the one that would make it trusted."""
    settings = SETTINGS | {section: {**SETTINGS[section], key: value}}
    marker = place / "marker"
    content = torch.load(checkpoint(place / "a.ckpt", settings), weights_only=True)
    torch.save(content | {"bomb": Bomb(marker)}, place / "a.ckpt")
    text = predict(forks, place, "ckpt_path=a.ckpt", wanted=2)
    assert f"its settings have {section}.{key}, which no checkpoint may bring" in text
    assert not marker.exists()


def test_settings_of_a_newer_version_are_refused(tmp_path: Path) -> None:
    """By the number of their format."""
    with pytest.raises(ConfigError, match=r"format 99; this voxquilt reads 1"):
        carried(checkpoint(tmp_path / "a.ckpt", SETTINGS | {"format": 99}))


def test_the_kind_of_a_weights_file_is_detected_without_loading_it(tmp_path: Path) -> None:
    """TorchScript, state dicts and Lightning checkpoints."""
    script(tmp_path / "a.pt")
    torch.save(unet().state_dict(), tmp_path / "b.pt")
    (tmp_path / "d.pt").write_bytes(pickle.dumps({}))
    with zipfile.ZipFile(tmp_path / "e.pt", "w") as archive:
        archive.writestr("x.txt", "")
    found = {name: kind_of(tmp_path / name) for name in ("a.pt", "b.pt", "d.pt", "e.pt")}
    assert found == {"a.pt": "torchscript", "b.pt": "state_dict", "d.pt": "state_dict", "e.pt": "state_dict"}
    assert kind_of(checkpoint(tmp_path / "c.ckpt")) == "lightning"


def test_formats_and_settings_are_read_before_torch_has_loaded(tmp_path: Path) -> None:
    """For every kind of file; importing torch would delay the message on a wrong configuration by seconds."""
    script(tmp_path / "a.pt")
    checkpoint(tmp_path / "b.ckpt", SETTINGS)
    save_file(unet().state_dict(), tmp_path / "c.safetensors", {KEY: json.dumps(SETTINGS)})
    code = (
        "import sys, pathlib\n"
        "from voxquilt.models.weights.detect import kind_of\n"
        "from voxquilt.models.weights.stored_settings import carried\n"
        "files = [pathlib.Path(name) for name in sys.argv[1:]]\n"
        "print(*map(kind_of, files), *[carried(file) is not None for file in files], 'torch' in sys.modules)"
    )
    files = [str(tmp_path / name) for name in ("a.pt", "b.ckpt", "c.safetensors")]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["torchscript", "lightning", "state_dict", "False", "True", "True", "False"]


def test_a_training_stores_only_what_predicting_needs() -> None:
    """Neither paths nor how it was trained."""
    configuration = OmegaConf.to_container(
        OmegaConf.create(
            SETTINGS
            | {"data": {**SETTINGS["data"], "inputs": "/secret", "batch_size": 2}, "run": {"seed": 1}}
            | {"model": {"net": NET, "squeeze_axis": None, "optimizer": {"lr": 1}}, "output_dir": "/secret"}
            | {"stitch": {**SETTINGS["stitch"], "activation": None}}
        )
    )
    assert to_carry(configuration, ["image"]) == SETTINGS  # type: ignore[arg-type]


# Targets that a checkpoint may name


@pytest.mark.parametrize(
    "target",
    [
        "os.system", "builtins.eval", "torch.load", "torch.nn.modules.module.torch.load", "torch.nn.functional.relu",
        "monai.networks.utils.os.system", "voxquilt.cli.predict_config.check_predict", "monai.networks.nets.NoSuchNet",
        "synthetic.Over50", "torch.nn.modules.module.OrderedDict",
    ],
)  # fmt: skip
def test_a_checkpoint_may_name_no_functions_and_no_other_classes(target: str) -> None:
    """Not by a path that begins in an allowed package and leads out of it, nor in nested nodes."""
    for node in ({"_target_": target}, {"a": [{"b": {"_target_": "torch.nn.ReLU", "x": {"_target_": target}}}]}):
        with pytest.raises(ConfigError, match=r"which is not a class of run\.checkpoint_targets"):
            check_classes(node, ALLOWED)


def test_a_checkpoint_may_name_networks_and_transforms() -> None:
    """Of MONAI, torch and voxquilt, also by the packages' short paths."""
    short = "monai.networks.nets.UNet", "monai.transforms.ScaleIntensity", "torch.nn.Conv3d"
    check_classes([{"_target_": name} for name in (*short, "voxquilt.Preprocess")], ALLOWED)


def test_a_user_defined_class_in_a_checkpoint_must_be_named_by_the_user(forks: Server, place: Path) -> None:
    """It is refused with two remedies, and both work."""
    net = {"_target_": "synthetic.Over50"}
    checkpoint(
        place / "own.ckpt", SETTINGS | {"model": {"net": net}, "stitch": {}} | {"data": {"patch_size": 8}}, Over50()
    )
    text = predict(forks, place, "ckpt_path=own.ckpt", wanted=2)
    assert "the checkpoint names synthetic.Over50" in text
    assert "model.net._target_=synthetic.Over50" in text
    predict(forks, place, "ckpt_path=own.ckpt", "run.checkpoint_targets=[synthetic.*,voxquilt.*]", "output_dir=b")
    predict(forks, place, "ckpt_path=own.ckpt", "model.net._target_=synthetic.Over50", "output_dir=c")


def test_a_class_named_by_the_user_gets_the_arguments_of_the_checkpoint(forks: Server, place: Path) -> None:
    """Naming the class only expresses trust; classes in its arguments are still checked."""
    settings = SETTINGS | {"stitch": {}, "data": {"patch_size": 8}}
    net = {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 2, "kernel_size": 1}
    arguments = "ckpt_path=own.ckpt", "run.checkpoint_targets=[voxquilt.*]", "model.net._target_=torch.nn.Conv3d"
    checkpoint(place / "own.ckpt", settings | {"model": {"net": net}}, Over50())
    predict(forks, place, *arguments)
    assert np.array_equal(read(place / "outputs/a_labels.nii.gz"), read(place / "a.nii.gz") > 50)
    checkpoint(place / "own.ckpt", settings | {"model": {"net": net | {"bias": {"_target_": "os.getcwd"}}}}, Over50())
    assert "the checkpoint names os.getcwd" in predict(forks, place, *arguments, wanted=2)


# Precedence


def test_settings_of_the_user_win_even_if_they_are_the_default(forks: Server, place: Path) -> None:
    """Key by key on the command line; a change to the network is applied on top of the checkpoint's."""
    text = predict(
        forks,
        place,
        "ckpt_path=best.ckpt",
        "data.patch_overlap=0",
        "stitch.overlap_mode=gaussian",
        "model.net.dropout=0.1",
    )
    assert "yours: data.patch_overlap=0, stitch.overlap_mode=gaussian" in text
    assert "data.patch_size=16" in text
    text = predict(
        forks, place, "ckpt_path=best.ckpt", "run.overwrite=true", "preprocess=default", "preprocess.orientation=null"
    )
    assert "preprocess.orientation=None" in text


def test_a_stored_null_overrides_the_default(forks: Server, place: Path) -> None:
    """A checkpoint trained on the files' own axes predicts on them."""
    settings = SETTINGS | {"preprocess": {**SETTINGS["preprocess"], "orientation": None}}
    checkpoint(place / "own.ckpt", settings)
    predict(forks, place, "ckpt_path=own.ckpt")
    configuration = json.loads((place / "outputs/run.json").read_text())["configuration"]
    assert configuration["preprocess"]["orientation"] is None


def test_a_class_that_only_the_checkpoint_names_is_checked(forks: Server, place: Path) -> None:
    """The network, the preprocessing itself, and a transform."""
    bad = {"_target_": "synthetic.Over50"}
    for section, node in (
        ("model", {"net": bad}), ("preprocess", bad),
        ("preprocess", {**SETTINGS["preprocess"], "intensity": [bad]}),
    ):  # fmt: skip
        checkpoint(place / "bad.ckpt", SETTINGS | {section: node})
        text = predict(forks, place, "ckpt_path=bad.ckpt", wanted=2)
        assert "the checkpoint names synthetic.Over50" in text


def test_settings_of_an_ensemble_that_contradict_each_other_are_named(forks: Server, place: Path) -> None:
    """By their keys, with both values, unless the user chose them; other networks have a way of their own."""
    checkpoint(place / "b.ckpt", SETTINGS)
    checkpoint(place / "c.ckpt", SETTINGS | {"preprocess": {**SETTINGS["preprocess"], "spacing": 2}})
    predict(forks, place, "ckpt_path=[best.ckpt,b.ckpt]")
    text = predict(forks, place, "ckpt_path=[best.ckpt,c.ckpt]", wanted=2)
    assert "best.ckpt and c.ckpt are not an ensemble, since their settings contradict each other:" in text
    assert "\n  preprocess.spacing is null and 2\n  Set preprocess.spacing yourself if" in text
    predict(forks, place, "ckpt_path=[best.ckpt,c.ckpt]", "preprocess.spacing=1", "output_dir=chosen")
    deep = {"channels": [4, 8, 8], "strides": [2, 2]}
    settings = SETTINGS | {"model": {**SETTINGS["model"], "net": NET | deep}}
    checkpoint(place / "d.ckpt", settings, unet(**deep))
    text = predict(forks, place, "ckpt_path=[b.ckpt,d.ckpt]", wanted=2)
    assert "\n  model.net.channels is [4, 8] and [4, 8, 8]\n  model.net.strides is [2] and [2, 2]\n  Models" in text
    options = ["model=nnunet", "model.parts=[{ckpt_path: b.ckpt}, {ckpt_path: d.ckpt}]", "stitch.combine=mean"]
    assert f"averaged by {options[0]} model.parts='{options[1].partition('=')[2]}' {options[2]}," in text
    predict(forks, place, *options, "output_dir=parts")


def test_an_ensemble_may_have_files_of_several_formats(forks: Server, place: Path) -> None:
    """Also such as are networks by themselves, write [16, 16, 16] for 16, or carry no settings.

    The output is the mean of what each file gives by itself, which differ.
    """
    script(place / "bare.ts", unet(seed=1))
    settings = {**SETTINGS, "model": {"squeeze_axis": None, "activation": None}}
    settings["data"] = {**SETTINGS["data"], "patch_size": [16, 16, 16]}
    script(place / "own.ts", unet(seed=2), {KEY: json.dumps(settings)})
    common = ("stitch.products=[logits]", "model.activation=none", "callbacks.writer.compress=false")
    files = {"best.ckpt": (), "own.ts": (), "bare.ts": ("data.patch_size=16", "data.patch_overlap=8")}
    singly = {}
    for name, more in files.items():
        more = (*more, "stitch.overlap_mode=hann", "preprocess.orientation=RAS", "stitch.class_names=[none,some]")
        predict(forks, place, f"ckpt_path={name}", f"output_dir=out_{name}", *common, *more)
        singly[name] = nib.load(place / f"out_{name}" / "a_logits.nii").get_fdata()
    for names in (["best.ckpt", "own.ts"], ["own.ts", "best.ckpt"], ["bare.ts", "own.ts"], list(reversed(files))):
        folder = "-".join(names)
        text = predict(forks, place, f"ckpt_path=[{','.join(names)}]", f"output_dir={folder}", *common)
        assert ("bare.ts carries no settings: it predicts with those of own.ts" in text) == ("bare.ts" in names)
        made = nib.load(place / folder / "a_logits.nii").get_fdata()
        wanted = np.mean([singly[name] for name in names], axis=0)
        np.testing.assert_allclose(made, wanted, rtol=0, atol=1e-5)
        assert np.abs(made - singly[names[0]]).max() > 0.01


def test_a_network_of_the_users_is_for_the_files_that_bring_none(forks: Server, place: Path) -> None:
    """Where all files bring theirs, it is refused."""
    torch.save(unet(seed=1).state_dict(), place / "bare.pt")
    script(place / "a.ts")
    net = [f"model.net.{key}={value}".replace(" ", "") for key, value in NET.items()]
    predict(forks, place, "ckpt_path=[a.ts,bare.pt]", "data.patch_size=16", *net)
    text = predict(forks, place, "ckpt_path=[a.ts,a.ts]", "data.patch_size=16", "output_dir=b", *net, wanted=2)
    assert "a.ts (torchscript) is a network by itself, beside which model.net has no use: leave it out." in text


def test_the_error_on_weights_without_a_network_says_which_kind_they_are(forks: Server, place: Path) -> None:
    """Another program's Lightning checkpoint and bare weights, each with what to set."""
    checkpoint(place / "other.ckpt")
    torch.save(unet().state_dict(), place / "bare.pt")
    text = predict(forks, place, "ckpt_path=other.ckpt", "data.patch_size=16", wanted=2)
    assert "other.ckpt is a Lightning checkpoint without settings of voxquilt: say which network" in text
    text = predict(forks, place, "ckpt_path=bare.pt", "data.patch_size=16", wanted=2)
    assert "bare.pt is weights without a network" in text
    net = [f"model.net.{key}={value}".replace(" ", "") for key, value in NET.items()]
    predict(forks, place, "ckpt_path=bare.pt", "data.patch_size=16", *net)


def test_torchscript_needs_no_model_option(forks: Server, place: Path) -> None:
    """model=auto is the default."""
    script(place / "a.pt")
    predict(forks, place, "ckpt_path=a.pt", "data.patch_size=16")


# Data that do not fit


def test_other_images_than_those_trained_on_are_refused(forks: Server, place: Path) -> None:
    """By names and order, which are the network's channels."""
    checkpoint(place / "two.ckpt", SETTINGS | {"images": ["t1", "flair"]})
    text = predict(forks, place, "ckpt_path=two.ckpt", wanted=2)
    assert "a has the image image; the checkpoint was trained on t1, flair, in this order" in text


@pytest.mark.parametrize(
    ("options", "images", "channels", "patch", "names", "message"),
    [
        ({}, ["t1", "t2"], 2, (16, 16, 16), None, r"takes 1 channel; subjects have 2 \(t1, t2\)"),
        ({"in_channels": 3}, ["t1"], 1, (16, 16, 16), None, r"takes 3 channels; subjects have 1 \(t1\)"),
        ({"channels": (4, 8, 8, 8), "strides": (2, 2, 2)}, ["t1"], 1, (16, 20, 16), None,
         r"wanted is a multiple of 8 \(j has 20\)\. data\.patch_size=\[16, 24, 16\] would work"),
        ({}, ["t1"], 1, (16, 16, 16), ["a", "b", "c"], r"3 names \(a, b, c\); the network gives 2 channels"),
    ],
)  # fmt: skip
def test_data_that_do_not_fit_the_network_are_refused_before_the_run(
    options: Mapping[str, Any], images: Sequence[str], channels: int, patch: Any, names: Any, message: str
) -> None:
    """Channels, patch size and classes, each with what would fit."""
    with pytest.raises(ConfigError, match=message):
        check_network(PatchNetwork([unet(**options)]), images, channels, patch, names)
    assert check_network(PatchNetwork([unet()]), ["t1"], 1, (16, 16, 16), ["a", "b"]) is not None


def test_a_network_that_depends_on_values_is_not_checked() -> None:
    """It cannot run without voxels, so the run finds out."""

    class Looks(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if float(x.sum()) > 0 else x

    assert check_network(PatchNetwork([Looks()]), ["t1"], 1, (4, 4, 4), None) is None


def test_a_patch_that_the_strides_do_not_divide_is_refused_before_the_run(forks: Server, place: Path) -> None:
    """Status 2, and no output."""
    deep = NET | {"channels": [4, 8, 8, 8], "strides": [2, 2, 2]}
    net = unet(channels=[4, 8, 8, 8], strides=[2, 2, 2])
    checkpoint(place / "deep.ckpt", SETTINGS | {"model": {"net": deep}}, net)
    text = predict(forks, place, "ckpt_path=deep.ckpt", "data.patch_size=20", wanted=2)
    assert "data.patch_size=[24, 24, 24] would work" in text
    assert not list((place / "outputs").glob("*.nii.gz"))
