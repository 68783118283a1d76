"""Tests that bundles of MONAI are predicted as MONAI itself does, voxel by voxel, by the real command."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from bundles import (
    ARGMAX,
    IMAGE,
    INVERT,
    LOAD,
    ORIENT,
    SAVE,
    SCALE,
    SOFTMAX,
    SPACE,
    TYPED,
    labels_by_monai,
    make_bundle,
    make_image,
    state,
    transforms,
    zipped,
)
from forks import Server
from monai.networks.nets import UNet
from synthetic import read

pytestmark = pytest.mark.filterwarnings("ignore:.*Orientationd.*labels:FutureWarning")

NEAREST = {**INVERT, "nearest_interp": True}
SIGMOID = {"_target_": "Activationsd", "keys": "pred", "sigmoid": True}
ABOVE = {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5}
NORMALISE = {"_target_": "NormalizeIntensityd", **IMAGE, "nonzero": True, "channel_wise": True}
LARGEST = {"_target_": "KeepLargestConnectedComponentd", "keys": "pred", "applied_labels": [1, 2]}
HOLES = {"_target_": "FillHolesd", "keys": "pred"}
# Oblique ones are rounded to float32 in files, after which MONAI begins some of its grids elsewhere.
IMAGES: dict[str, dict[str, Any]] = {
    "straight": {"spacing": (1, 1.2, 3.1)},
    "turned": {"spacing": (0.8, 1.5, 2), "codes": "LPS"},
    "oblique": {"spacing": (1.1, 0.9, 1.3), "angle": 0.3, "shape": (14, 50, 17)},
    "steep": {"spacing": (1.1, 0.9, 1.3), "codes": "AIL", "angle": 0.4},
    "small": {"spacing": (1.5, 1.5, 2.0005), "shape": (9, 31, 7)},
}


def images(folder: Path) -> dict[str, Path]:
    return {
        name: make_image(folder / f"{name}.nii.gz", seed=n, **options)
        for n, (name, options) in enumerate(IMAGES.items())
    }


def predict(forks: Server, folder: Path, *options: str) -> str:
    """Predict `in` with the bundle of a folder; what was printed."""
    given = (f"model.folder={folder / 'bundle'}", "data.inputs=in", "output_dir=out", "run.log=plain")
    done = forks.run("model=bundle", *given, *options, cwd=folder, env={"VOXQUILT_CACHE": str(folder / "cache")})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def differing(folder: Path, name: str, wanted: np.ndarray) -> int:
    """The number of voxels whose label is another one."""
    made = read(folder / f"out/{name}_labels.nii.gz")
    made = np.moveaxis(made, -1, 0) if made.ndim == 4 else made[None]
    assert made.shape == wanted.shape
    assert len(np.unique(wanted)) > 1
    return int((made != wanted).sum())


# Where voxels lie in the middle between two, the errors of rounding decide which of them MONAI takes for the nearest.
TIES = dict.fromkeys(("nearest images", "nearest scores", "labels first"), ("steep",))
# At this spacing no voxel of the other images lies in the middle between two.
UNEVEN = {**SPACE, "pixdim": [1.37, 1.13, 2.09]}
CASES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "overlap 0.25, gaussian": {"inferer.overlap": 0.25, "inferer.mode": "gaussian"},
    "overlap 0.7, gaussian": {"inferer.overlap": 0.7, "inferer.mode": "gaussian", "inferer.sigma_scale": 0.25},
    "overlap 0.7, constant, padded by replication": {"inferer.overlap": 0.7, "inferer.padding_mode": "replicate"},
    "overlaps of axes": {"inferer.overlap": [0.5, 0.25, 0]},
    "a patch of odd size": {"inferer.roi_size": [14, 18, 10], "inferer.overlap": 0.3},
    "scores without soft-max": transforms("postprocessing", INVERT, ARGMAX, SAVE),
    "soft-max in the file's grid": transforms("postprocessing", INVERT, SOFTMAX, ARGMAX),
    "nearest scores": transforms("preprocessing", *LOAD, ORIENT, UNEVEN, SCALE)
    | transforms("postprocessing", SOFTMAX, NEAREST, ARGMAX),
    "labels first": transforms("postprocessing", SOFTMAX, ARGMAX, NEAREST, SAVE),
    "components": transforms("postprocessing", SOFTMAX, INVERT, ARGMAX, LARGEST, HOLES),
    "masks": transforms("postprocessing", SIGMOID, INVERT, ABOVE),
    "no orientation": transforms("preprocessing", *LOAD, SPACE, SCALE),
    "no spacing": transforms("preprocessing", *LOAD, ORIENT, NORMALISE, TYPED),
    "nearest images": transforms("preprocessing", *LOAD, ORIENT, {**UNEVEN, "mode": "nearest"}, SCALE)
    | transforms("postprocessing", SOFTMAX, INVERT | {"nearest_interp": True}, ARGMAX),
    "intensities first": transforms("preprocessing", *LOAD, ORIENT, SCALE, NORMALISE, SPACE),
    "corners aligned": transforms("preprocessing", *LOAD, ORIENT, {**SPACE, "align_corners": True}, NORMALISE),
}


@pytest.mark.parametrize("case", CASES)
def test_labels_are_those_of_monai(forks: Server, tmp_path: Path, case: str) -> None:
    """All of them, but for a voxel in ten thousand where rounding decides between two scores."""
    bundle = make_bundle(tmp_path / "bundle", CASES[case])
    files = {name: file for name, file in images(tmp_path / "in").items() if name not in TIES.get(case, ())}
    predict(forks, tmp_path)
    wanted = {name: labels_by_monai(bundle, file) for name, file in files.items()}
    wrong = {name: differing(tmp_path, name, labels) for name, labels in wanted.items()}
    assert sum(wrong.values()) <= 1e-4 * sum(labels.size for labels in wanted.values()), wrong


def test_several_images_are_the_channels_in_the_order_of_data_images(forks: Server, tmp_path: Path) -> None:
    """Exchanging them changes the labels; too few are refused."""
    changes = {"network_def.in_channels": 2, **transforms("preprocessing", *LOAD, ORIENT, SPACE, NORMALISE)}
    bundle = make_bundle(tmp_path / "bundle", changes, state(in_channels=2))
    files = [make_image(tmp_path / f"in/a_{name}.nii.gz", (1, 1, 3), seed=n) for n, name in enumerate(["t1", "t2"])]
    predict(forks, tmp_path, "data.suffixes={t1: _t1, t2: _t2}")
    assert differing(tmp_path, "a", labels_by_monai(bundle, files)) == 0
    done = forks.run("model=bundle", f"model.folder={bundle}", "data.inputs=in", "output_dir=one", cwd=tmp_path)
    assert done.returncode == 2
    assert "2 channels" in done.stderr


def test_a_zip_weights_in_a_mapping_and_what_the_user_says(forks: Server, tmp_path: Path) -> None:
    """The log prints what is taken and from where; settings of the command line win, single arguments too."""
    bundle = make_bundle(tmp_path / "made", weights={"model": state(), "epoch": 7})
    zipped(bundle, tmp_path / "bundle", top="tiny/")
    file = make_image(tmp_path / "in/a.nii.gz", (1, 1, 3))
    text = predict(forks, tmp_path, "stitch.products=[labels,probabilities]", "model.net.dropout=0.2")
    assert "from inference.json: data.patch_size=[16, 16, 16]" in text
    assert "preprocess.grid=monai" in text
    assert differing(tmp_path, "a", labels_by_monai(bundle, file)) == 0
    header = nib.load(tmp_path / "out/a_labels.nii.gz").header
    assert b"lesion" in b"".join(e.get_content().encode() if isinstance(e.get_content(), str) else e.get_content()
                                 for e in header.extensions)  # fmt: skip
    probabilities = read(tmp_path / "out/a_probabilities.nii.gz")
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-5)
    assert (probabilities.argmax(-1) == read(tmp_path / "out/a_labels.nii.gz")).all()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_the_network_where_none_can_be_read(forks: Server, tmp_path: Path) -> None:
    """A network of the bundle's own scripts, exported as MONAI does."""
    bundle = make_bundle(tmp_path / "bundle")
    file = make_image(tmp_path / "in/a.nii.gz", (1, 1, 3))
    wanted = labels_by_monai(bundle, file)
    network = UNet(3, 1, 3, channels=(4, 8), strides=(2,), num_res_units=1, norm="batch").eval()
    network.load_state_dict(state())
    torch.jit.save(torch.jit.trace(network, torch.zeros(1, 1, 16, 16, 16)), bundle / "models/model.ts")
    (bundle / "models/model.pt").unlink()
    config = bundle / "configs/inference.json"
    config.write_text(config.read_text().replace('"UNet"', '"scripts.nets.MyNet"'))
    predict(forks, tmp_path)
    assert differing(tmp_path, "a", wanted) == 0


SCRIPT = """
from monai.networks.nets import UNet
from monai.transforms import MapTransform

class MyNet(UNet):
    pass

class Halved(MapTransform):
    def __call__(self, data):
        return {**data, **{key: data[key] / 2 for key in self.keys}}
"""
CODE: dict[str, Any] = {
    "imports": ["$from scripts.own import MyNet"],
    "network_def._target_": "scripts.own.MyNet",
    "network_def.strides": "$[1 + 1]",
    **transforms("preprocessing", *LOAD, ORIENT, SPACE, {"_target_": "scripts.own.Halved", **IMAGE}, SCALE),
    **transforms(
        "postprocessing", SOFTMAX, INVERT, ARGMAX, {"_target_": "Lambdad", "keys": "pred", "func": "$lambda x: 2 - x"}
    ),
}


def test_a_bundle_that_is_trusted_runs_its_own_code_where_it_stands(
    forks: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its network, a transform of its scripts among those that are read, and a lambda on labels."""
    bundle = make_bundle(tmp_path / "bundle", CODE)
    (bundle / "scripts").mkdir()
    (bundle / "scripts/__init__.py").touch()
    (bundle / "scripts/own.py").write_text(SCRIPT)
    file = make_image(tmp_path / "in/a.nii.gz", (1, 1, 3))
    predict(forks, tmp_path, "model.trust_bundle=true")
    monkeypatch.syspath_prepend(str(bundle))
    assert differing(tmp_path, "a", labels_by_monai(bundle, file)) == 0
