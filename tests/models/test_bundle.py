"""Tests bundles of MONAI: everything that predicting needs is read as text, and all else is refused by name."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import (
    ARGMAX,
    CONFIG,
    IMAGE,
    INVERT,
    LOAD,
    ORIENT,
    SCALE,
    SOFTMAX,
    SPACE,
    make_bundle,
    make_image,
    transforms,
    zipped,
)
from forks import Server
from monai.data.utils import dense_patch_slices
from monai.inferers.utils import _get_scan_interval, sliding_window_inference
from nnunet_folders import MISSING
from odd_files import Bomb
from torch import Tensor

from voxquilt import GridAggregator, GridSampler
from voxquilt.errors import ConfigError
from voxquilt.geometry.grid import make_grid
from voxquilt.models.bundle.expressions import NOT_READ, read_expression
from voxquilt.models.bundle.settings import Bundle, read_bundle
from voxquilt.stitching.blend import MonaiGaussian

NORMALISE = {"_target_": "NormalizeIntensityd", **IMAGE, "channel_wise": True}
LARGEST = {"_target_": "KeepLargestConnectedComponentd", "keys": "pred"}
ABOVE = {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5}
BYTES = {"_target_": "EnsureTyped", "keys": "pred", "dtype": "$torch.uint8"}


def read(folder: Path, changes: dict[str, Any] | None = None, **options: Any) -> Bundle:
    return read_bundle(make_bundle(folder, changes), **options)


def refusal(folder: Path, changes: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder, changes)
    return str(caught.value)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VOXQUILT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_bundle_becomes_plain_settings(tmp_path: Path) -> None:
    """All of them, by section."""
    bundle = read(tmp_path / "b", {"inferer.mode": "gaussian", "inferer.overlap": 0.25})
    network = {key: value for key, value in CONFIG["network_def"].items() if key != "_target_"}
    scale = {"a_min": 0, "a_max": 100, "b_min": -1.0, "b_max": 1.0, "clip": True}
    assert bundle.weights == tmp_path / "b/models/model.pt"
    assert bundle.settings == {
        "data": {
            "patch_size": [16, 16, 16], "batch_size": 4, "padding_mode": None, "placement": "monai", "step": 0.75,
        },
        "preprocess": {
            "orientation": "RAS", "spacing": [1.5, 1.5, 2.0], "grid": "monai", "interpolation": 1,
            "intensity": [{"_target_": "monai.transforms.ScaleIntensityRange", **scale}], "intensity_first": False,
        },
        "model": {"activation": "softmax", "net": {"_target_": "monai.networks.nets.UNet", **network}},
        "stitch": {
            "overlap_mode": "monai", "order": 1, "restore": "probabilities",
            "class_names": ["background", "organ", "lesion"],
        },
    }  # fmt: skip


def test_references_and_choices_are_followed(tmp_path: Path) -> None:
    """Absolute, relative, through each other, with either separator, and by a flag."""
    changes = {
        "sizes": {"roi": "@#all", "all": ["@edge", "@edge", "@sizes::edge_of_k"], "edge_of_k": 24},
        "edge": 16,
        "highres": False,
        "inferer.roi_size": "@sizes#roi",
        "inferer.sw_batch_size": "@##edge",
        "inferer.device": "$torch.device('cuda')",
        **transforms(
            "preprocessing", *LOAD, ORIENT, {**SPACE, "pixdim": "$[1.5,1.5,1.5] if @highres else (3.0, 3, 2)"}
        ),
    }
    settings = read(tmp_path / "b", changes).settings
    assert settings["data"]["patch_size"] == [16, 16, 24]
    assert settings["data"]["batch_size"] == 16
    assert settings["preprocess"]["spacing"] == [3.0, 3, 2]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$torch.float32", "float32"),
        ("$ np.float64", "float64"),
        ("$1 if @flag else 2", 1),
        ("$@flag if @flag else 2", True),
        ("$'a' if @flag else None", "a"),
        ("$__import__('os').system('x')", NOT_READ),
        ("$1 if __import__('os') else 2", NOT_READ),
        ("$__import__('os') if @flag else 2", NOT_READ),
        ("$[__import__('os')] if @flag else 2", NOT_READ),
        ("$'${oc.env:HOME}' if @flag else 2", NOT_READ),
        ("$'$import os' if @flag else 2", NOT_READ),
        ("$1 if @flag else 2 if @flag else 3", 1),
        ("$" + "[" * 900 + " if @flag else 2", NOT_READ),
        ("$torch.device('cuda')", NOT_READ),
        ("$torch.float32.__class__", NOT_READ),
        ("$1 + 1", NOT_READ),
    ],
)
def test_only_types_and_choices_of_literals_are_read(text: str, value: object) -> None:
    """Nothing is ever evaluated."""
    assert read_expression(text, lambda _: True) == value


def test_yaml_is_read_where_there_is_no_json(tmp_path: Path) -> None:
    """The same settings; JSON is YAML."""
    wanted = read(tmp_path / "a").settings
    folder = make_bundle(tmp_path / "b")
    (folder / "configs/inference.json").rename(folder / "configs/inference.yaml")
    assert read_bundle(folder).settings == wanted


def test_disabled_steps_and_saving_do_not_count(tmp_path: Path) -> None:
    """Nor do options that say where and how something is computed."""
    off = {"_target_": "Nothing", "_disabled_": True}
    settings = read(tmp_path / "b", transforms("preprocessing", *LOAD, off, ORIENT, SPACE, SCALE)).settings
    assert len(settings["preprocess"]["intensity"]) == 1


@pytest.mark.parametrize(
    ("steps", "key"),
    [
        ((*LOAD, ORIENT, SPACE, {"_target_": "RandFlipd", **IMAGE}), "preprocessing#transforms#4#_target_"),
        ((*LOAD, ORIENT, SPACE, {"_target_": "CropForegroundd", **IMAGE}), "preprocessing#transforms#4#_target_"),
        ((*LOAD, SPACE, ORIENT), "preprocessing#transforms#3 "),
        ((*LOAD, SCALE, SPACE, SCALE), "preprocessing#transforms#3 "),
        ((*LOAD, {**SPACE, "mode": "bicubic"}), "transforms#2#mode is 'bicubic'"),
        ((*LOAD, {**SPACE, "mode": 3}), "transforms#2#mode is 3"),
        ((*LOAD, {**SPACE, "padding_mode": "zeros"}), "transforms#2#padding_mode is 'zeros'"),
        ((*LOAD, {**SPACE, "diagonal": True}), "transforms#2#diagonal is True"),
        ((*LOAD, {**SPACE, "scale_extent": True}), "transforms#2#scale_extent is True"),
        ((*LOAD, {**SPACE, "min_pixdim": 1}), "transforms#2#min_pixdim is 1"),
        ((*LOAD, {**SPACE, "recompute_affine": True}), "transforms#2#recompute_affine is True"),
        ((*LOAD, {**SPACE, "pixdim": "1"}), "transforms#2#pixdim is '1'"),
        ((*LOAD, {**SPACE, "keys": ["image", "label"]}), "transforms#2#keys is ['image', 'label']"),
        ((*LOAD, {**SCALE, "keys": "label"}), "transforms#2#keys is 'label'"),
        ((*LOAD, {**SCALE, "new": 1}), "transforms#2#new is 1"),
        ((*LOAD, {**SCALE, "a_min": "$min(1, 2)"}), "transforms#2#a_min is '$min(1, 2)'"),
        ((*LOAD, {**NORMALISE, "subtrahend": [1, 2]}), "one number for subtrahend"),
        (({**LOAD[0], "dtype": "$np.int16"},), "transforms#0#dtype is '$np.int16'"),
        (({**LOAD[0], "reader": "PydicomReader"},), "transforms#0#reader"),
    ],
)
def test_preprocessing_that_is_not_read_is_refused_by_name(tmp_path: Path, steps: Any, key: str) -> None:
    """A transform, an order, or an option that would change numbers."""
    assert key in refusal(tmp_path / "b", transforms("preprocessing", *steps))


@pytest.mark.parametrize(
    ("steps", "key"),
    [
        ((SOFTMAX, ARGMAX), "postprocessing is "),
        ((SOFTMAX, ARGMAX, INVERT), "postprocessing#transforms#2#nearest_interp is False"),
        ((SOFTMAX, ARGMAX, LARGEST, INVERT | {"nearest_interp": True}), "postprocessing#transforms#2 "),
        ((LARGEST, SOFTMAX, INVERT, ARGMAX), "postprocessing#transforms#0 "),
        ((SOFTMAX, INVERT, ABOVE), "does not go with softmax"),
        ((INVERT, ABOVE), "compares scores of several channels with a threshold, without sigmoid"),
        ((SOFTMAX, BYTES, INVERT, ARGMAX), "postprocessing#transforms#1#dtype is '$torch.uint8'"),
        ((SOFTMAX, INVERT, {**ARGMAX, "to_onehot": 3}), "transforms#2#to_onehot is 3"),
        ((SOFTMAX, INVERT, {**ARGMAX, "keys": "other"}), "transforms#2#keys is 'other'"),
        ((SOFTMAX, {**INVERT, "transform": "@other"}, ARGMAX), "has no other"),
        ((SOFTMAX, {**INVERT, "post_func": "$lambda x: x"}, ARGMAX), "transforms#1#post_func"),
        ((SOFTMAX, INVERT, ARGMAX, {"_target_": "Lambdad", "keys": "pred"}), "transforms#3#_target_ is 'Lambdad'"),
    ],
)
def test_postprocessing_that_is_not_read_is_refused_by_name(tmp_path: Path, steps: Any, key: str) -> None:
    """Or done in an order that gives other labels."""
    assert key in refusal(tmp_path / "b", transforms("postprocessing", *steps))


@pytest.mark.parametrize("flag", [True, 1, "true", " TRUE "])
def test_a_step_is_disabled_where_monai_disables_it(tmp_path: Path, flag: object) -> None:
    """By whatever counts as true there."""
    steps = (*LOAD, ORIENT, SPACE, {**SCALE, "_disabled_": flag})
    assert read(tmp_path / "b", transforms("preprocessing", *steps)).settings["preprocess"]["intensity"] is None


def test_other_ways_to_resample_lazily_are_refused(tmp_path: Path) -> None:
    """Those replace what the transforms themselves say."""
    assert read(tmp_path / "a", {"preprocessing.lazy": True, "preprocessing.overrides": {}}).settings
    changes = {"preprocessing.lazy": True, "preprocessing.overrides": {"image": {"mode": "nearest"}}}
    assert "preprocessing#overrides is {'image'" in refusal(tmp_path / "b", changes)


def test_the_section_that_is_inverted_may_be_a_reference(tmp_path: Path) -> None:
    """To the same steps in another place."""
    wanted = read(tmp_path / "a").settings
    assert read(tmp_path / "b", {"steps": CONFIG["preprocessing"], "preprocessing": "@steps"}).settings == wanted


def test_labels_that_get_other_numbers_have_no_names(tmp_path: Path) -> None:
    """The metadata name the network's channels, not what becomes of them."""
    swap = {"_target_": "MapLabelValued", "keys": "pred", "orig_labels": [1, 2], "target_labels": [2, 1]}
    settings = read(tmp_path / "b", transforms("postprocessing", SOFTMAX, INVERT, ARGMAX, swap)).settings
    assert "class_names" not in settings["stitch"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("inferer._target_", "SimpleInferer", "inferer#_target_ is 'SimpleInferer'"),
        ("inferer.roi_size", [16, -1, 16], "inferer#roi_size is [16, -1, 16]"),
        ("inferer.overlap", 1.0, "inferer#overlap is 1.0"),
        ("inferer.overlap", [0.3, 0.5, 0.5], "inferer#overlap is [0.3, 0.5, 0.5]"),
        ("inferer.cval", -1, "inferer#cval is -1"),
        ("inferer.with_coord", True, "inferer#with_coord is True"),
        ("inferer.process_fn", 1, "inferer#process_fn is 1"),
        ("inferer", MISSING, "has no inferer"),
        ("network_def.spatial_dims", 2, "voxquilt reads bundles of 3-D networks"),
        ("network_def.act", {"_target_": "os.system"}, "network_def#act is {'_target_': 'os.system'}"),
        ("network_def.act", "@act", "has no act"),
        ("network_def.act", "%other.json#act", "network_def#act is '%other.json#act': it is a macro"),
        ("network_def.act", "@network_def#norm_of", "has no network_def#norm_of"),
        ("network_def.act", "@network_def#act", "references lead in a circle"),
        ("network_def.act", ["@network_def#act"], "refers to itself"),
        ("network_def.act", "${oc.env:HOME}", "it is not a plain text"),
        ("network_def.act", "???", "network_def#act is '???': its value is missing, and is to be filled in"),
        ("network_def.in_channels", "???", "network_def#in_channels is '???': its value is missing"),
        ("network_def.act", ["relu", "???"], "network_def#act#1 is '???': its value is missing"),
        ("network_def", "???", "network_def is '???': its value is missing"),
        ("inferer.roi_size", "???", "inferer#roi_size is '???': its value is missing"),
        ("inferer.roi_size", [16, "???", 16], "inferer#roi_size#1 is '???': its value is missing"),
        ("preprocessing", "???", "preprocessing is '???': its value is missing"),
        ("network_def", MISSING, "has no network_def"),
    ],
)
def test_networks_and_inferers_that_are_not_read_are_refused_by_name(
    tmp_path: Path, path: str, value: object, message: str
) -> None:
    """With the key and what it says."""
    assert message in refusal(tmp_path / "b", {path: value})


def test_a_value_that_is_to_be_filled_in_may_be_written_into_a_copy(tmp_path: Path) -> None:
    """As the message says, with the file and the key."""
    text = refusal(tmp_path / "b", {"network_def.act": "???"})
    assert text.startswith(f"{tmp_path}/b/configs/inference.json: network_def#act is '???': its value is missing")
    assert text.endswith("Write it there, or into a copy of this file beside it, and name the copy by model.config.")
    file = tmp_path / "b/configs/inference.json"
    file.with_name("mine.json").write_text(file.read_text().replace("???", "relu"))
    net = read_bundle(tmp_path / "b", config="mine.json").settings["model"]["net"]
    assert net["act"] == "relu"


def test_joint_statistics_of_several_channels_are_refused(tmp_path: Path) -> None:
    """Images are changed one by one."""
    joint = transforms("preprocessing", *LOAD, {**NORMALISE, "channel_wise": False})
    assert read(tmp_path / "a", joint).settings["preprocess"]["intensity"]
    assert "it takes all channels together" in refusal(tmp_path / "b", {"network_def.in_channels": 2, **joint})
    contrast = transforms("preprocessing", *LOAD, {"_target_": "AdjustContrastd", **IMAGE, "gamma": 2.0})
    assert read(tmp_path / "c", contrast).settings["preprocess"]["intensity"]
    assert "it takes all channels together" in refusal(tmp_path / "d", {"network_def.in_channels": 2, **contrast})


def test_metadata_that_do_not_fit_the_network_name_no_classes(tmp_path: Path) -> None:
    """As some in MONAI's zoo do not."""
    assert "class_names" not in read(tmp_path / "b", {"network_def.out_channels": 5}).settings["stitch"]


@pytest.mark.parametrize("size", [16, 17, 31, 40, 97])
@pytest.mark.parametrize("patch", [16, 11, 7])
@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.25, 0.3, 0.5, 0.625, 0.7, 0.75, 0.9, 0.99])
def test_patches_begin_where_monais_do(size: int, patch: int, overlap: float) -> None:
    """Also where neighbours share an odd number of voxels."""
    steps = _get_scan_interval((size,), (patch,), 1, (overlap,))
    wanted = [where[0].start for where in dense_patch_slices((size,), (patch,), steps)]
    grid = make_grid((size, size, size), patch, placement="monai", step=1 - overlap)
    assert list(grid.starts[0]) == wanted


@pytest.mark.parametrize(("size", "overlap"), [(40, 0.5), (41, 0.25), (29, 0.7), (16, 0.25)])
@pytest.mark.parametrize("sigma", [0.125, 0.3])
def test_the_blend_monai_is_monais_gaussian(size: int, overlap: float, sigma: float) -> None:
    """To the rounding of float32, for scores that no two patches share, however planes are handed over."""
    volume = torch.zeros(1, size, size + 3, size)
    sampler = GridSampler(volume, 16, placement="monai", step=1 - overlap)
    patches = torch.rand(len(sampler), 2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    left = iter(patches)

    def network(x: Tensor) -> Tensor:
        return torch.stack([next(left) for _ in range(len(x))])

    wanted = sliding_window_inference(
        volume[None], (16, 16, 16), 1, network, overlap=overlap, mode="gaussian", sigma_scale=sigma
    )
    aggregator = GridAggregator(sampler, MonaiGaussian(sigma))
    aggregator.add_batch(patches, sampler.locations)
    assert isinstance(wanted, Tensor)
    torch.testing.assert_close(aggregator.get_output_tensor(), wanted[0], atol=2e-6, rtol=0)


# Files from others


def test_a_zip_is_unpacked_into_the_cache_without_what_is_not_needed(tmp_path: Path, cache: Path) -> None:
    """The folder in it is found, also by name."""
    folder = make_bundle(tmp_path / "b")
    file = zipped(folder, tmp_path / "b.zip", top="tiny/", extra={"tiny/docs/README.md": b"x", "tiny/LICENSE": b"x"})
    bundle = read_bundle(file)
    assert bundle.file.is_relative_to(cache)
    assert bundle == read_bundle(file / "tiny")
    assert bundle.settings == read_bundle(folder).settings
    assert not (bundle.file.parents[1] / "docs").exists()


@pytest.mark.parametrize("name", ["../evil.py", "/evil.py", "tiny/../../evil.py", "a\\evil.py", "C:/evil.py"])
def test_a_zip_that_leads_out_of_its_folder_is_refused(tmp_path: Path, cache: Path, name: str) -> None:
    """Nothing is unpacked."""
    file = zipped(make_bundle(tmp_path / "b"), tmp_path / "b.zip", extra={name: b"x"})
    with pytest.raises(ConfigError, match=r"leads out of the zip's folder; wanted are plain files .* as MONAI exports"):
        read_bundle(file)
    assert not cache.exists()
    assert not list(tmp_path.rglob("evil.py"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "none", "is not there; wanted is the folder of a MONAI bundle. Did you mean"),
        (lambda d: d / "nono/configs", "is not a MONAI bundle: it has no folder configs. Did you mean"),
        (lambda d: d / "nono/configs/metadata.json", "is a file; wanted is the folder of a MONAI bundle, or its zip"),
    ],
)
def test_another_path_is_refused(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    """With the one that was meant."""
    make_bundle(tmp_path / "nono")
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_bundle(make(tmp_path))


@pytest.mark.parametrize(
    ("share", "message"), [(0.5, "was it copied or downloaded completely"), (1, "It is a zip without")]
)
def test_a_zip_that_is_cut_or_of_something_else_says_so(tmp_path: Path, share: float, message: str) -> None:
    """Not only that it is a file."""
    folder = make_bundle(tmp_path / "b")
    (folder / "configs/inference.json").rename(folder / "other.json")
    path = zipped(folder, tmp_path / "b.zip")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ConfigError, match=message):
        read_bundle(path)


@pytest.mark.parametrize("name", ["../models/model.pt", "other.pt", "/etc/passwd", ".."])
def test_weights_are_a_file_of_the_bundle(tmp_path: Path, name: str) -> None:
    """What there is, is listed."""
    with pytest.raises(ConfigError, match=r"there are model.pt. Choose by model.checkpoint"):
        read(tmp_path / "b", checkpoint=name)


def attack(place: str, marker: Path) -> dict[str, Any]:
    """A change of a bundle that would make a folder if it were run."""
    code = f"__import__('os').mkdir('{marker}')"
    call = {"_target_": "os.mkdir", "path": str(marker)}
    places: dict[str, dict[str, Any]] = {
        "network_def": {"network_def": f"${code}"},
        "_target_ of the network": {"network_def": call},
        "expression among its arguments": {"network_def.channels": f"${code}"},
        "object among its arguments": {"network_def.act": call},
        "_args_": {"network_def._args_": [call]},
        "_disabled_": transforms("preprocessing", *LOAD, {**ORIENT, "_disabled_": f"${code}"}, SPACE),
        "_target_ of a transform": transforms("preprocessing", *LOAD, call, SPACE),
        "expression in a choice": {"inferer.roi_size": f"$[1, 1, 1] if {code} else [2, 2, 2]", "flag": True},
        "inferer": {"inferer": call},
        "imports": {"imports": [f"${code}"]},
        "imports of a module": {"imports": "$import evil"},
        "imports of two": {"imports": [f"$import os;{code}"]},
        "postprocessing": {"postprocessing": f"${code}"},
        "interpolation": {"network_def.act": "${oc.env:HOME}"},
        "macro": {"network_def": "%/etc/passwd"},
    }
    return places[place]


PLACES = (
    "network_def", "_target_ of the network", "expression among its arguments", "object among its arguments", "_args_",
    "_disabled_", "_target_ of a transform", "expression in a choice", "inferer", "imports", "imports of a module",
    "imports of two", "postprocessing", "interpolation", "macro",
)  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_code_anywhere_in_a_bundle_is_refused_and_does_not_run(tmp_path: Path, place: str) -> None:
    """By the key where it stands."""
    marker = tmp_path / "ran"
    text = refusal(tmp_path / "b", attack(place, marker))
    assert re.search(r"inference\.json: (network_def|preprocessing|inferer|postprocessing|imports)", text), text
    assert not marker.exists()


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.mkdir ['{marker}']",
        "a: !!python/name:os.mkdir",
        "a: &a [*a]\nnetwork_def: *a",
        "network_def: {{_target_: UNet, x: &a [&b [1], *b, *b]}}\npreprocessing: *a",
        "- 1",
        "a: [",
    ],
)
def test_yaml_with_tags_or_in_circles_is_refused(tmp_path: Path, text: str) -> None:
    """Only plain YAML is read."""
    folder, marker = make_bundle(tmp_path / "b"), tmp_path / "ran"
    (folder / "configs/inference.json").unlink()
    (folder / "configs/inference.yaml").write_text(text.format(marker=marker))
    with pytest.raises(ConfigError, match=r"inference\.yaml"):
        read_bundle(folder)
    assert not marker.exists()


def test_aliases_of_yaml_that_would_fill_the_memory_are_refused(tmp_path: Path) -> None:
    """Ten lines that stand for 10^10 values."""
    folder = make_bundle(tmp_path / "b")
    lines = ["x0: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]" for n in range(1, 10)]
    (folder / "configs/inference.json").unlink()
    (folder / "configs/inference.yaml").write_text("\n".join([*lines, "network_def: {_target_: UNet, channels: *x9}"]))
    with pytest.raises(ConfigError, match="holds too many values"):
        read_bundle(folder)


def test_deep_json_is_refused(tmp_path: Path) -> None:
    """Instead of a full stack."""
    folder = make_bundle(tmp_path / "b")
    (folder / "configs/inference.json").write_text('{"a":' * 100_000)
    with pytest.raises(ConfigError, match=r"inference\.json is not JSON"):
        read_bundle(folder)
    config = json.loads(json.dumps(CONFIG))
    node: Any = 1
    for _ in range(200):
        node = [node]
    config["network_def"]["act"] = node
    (folder / "configs/inference.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="is nested too deeply"):
        read_bundle(folder)


@pytest.mark.parametrize("place", ["network_def", "a pickle in model.pt", "a class that is no network"])
def test_the_command_refuses_code_with_status_2(forks: Server, tmp_path: Path, place: str) -> None:
    """In one message; nothing has run, and nothing is written."""
    marker = tmp_path / "ran"
    if place == "network_def":
        folder, said = make_bundle(tmp_path / "b", attack(place, marker)), "network_def is "
    elif place == "a pickle in model.pt":
        folder, said = make_bundle(tmp_path / "b", weights={"state_dict": Bomb(marker)}), "model.pt"
    else:
        folder, said = make_bundle(tmp_path / "b", {"network_def": {"_target_": "torch"}}), "monai.networks.nets.torch"
    make_image(tmp_path / "in/a.nii.gz")
    done = forks.run("model=bundle", f"model.folder={folder}", "data.inputs=in", "output_dir=out", cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert not marker.exists()
    assert not list(tmp_path.glob("out/*.nii.gz"))
