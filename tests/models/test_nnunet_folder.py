"""Tests model folders of nnU-Net: every value that predicting needs is read, and what is wrong is refused by name."""

import json
import logging
import os
import pickle
import re
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunet_folders import (
    DATASET,
    FLAT_OPTIONS,
    MAIN,
    MISSING,
    NAME,
    OPTIONS,
    PLANS,
    edited,
    export,
    stored,
    write_checkpoint,
    write_settings,
)
from odd_files import Bomb

from voxquilt.errors import ConfigError
from voxquilt.models import zipped_folder
from voxquilt.models.nnunet.architecture import Layer
from voxquilt.models.nnunet.folder import NnunetFolder, read_folder
from voxquilt.models.nnunet.intensity import make_normalisation
from voxquilt.models.nnunet.plans import SCHEMES, Intensities, Normalisation
from voxquilt.models.nnunet.postprocessing import read_postprocessing
from voxquilt.models.nnunet.resampling import Resampling
from voxquilt.models.nnunet.settings import settings_of

WEIGHTS = {"decoder.seg_layers.1.bias": torch.zeros(3)}


def make(folder: Path, plans: Any = None, dataset: Any = None, **changes: Any) -> Path:
    """A model folder whose checkpoint has one weight, since nothing here loads it."""
    write_settings(folder, plans, dataset)
    write_checkpoint(folder, 0, stored(WEIGHTS, **changes))
    return folder


def read(folder: Path, plans: Any = None, dataset: Any = None, **changes: Any) -> NnunetFolder:
    return read_folder(make(folder, plans, dataset, **changes))


def refusal(path: Path, **options: Any) -> str:
    """The message with which a folder is refused."""
    with pytest.raises(ConfigError) as caught:
        read_folder(path, **options)
    return str(caught.value)


# Values


def test_a_folder_has_every_value_that_predicting_needs(tmp_path: Path) -> None:
    """Those of the files, in plain types."""
    model = read(tmp_path)
    plan = model.plan
    assert (model.path, model.folds, model.trainer) == (tmp_path, (0,), "nnUNetTrainer")
    assert model.checkpoints == (tmp_path / "fold_0" / "checkpoint_final.pth",)
    assert (model.mirror_axes, model.flips, model.is_2d, model.input_channels) == ((0, 1, 2), (0, 1, 2), False, 2)
    assert (model.dataset.channels, model.dataset.file_ending) == (("CT", "T2"), ".nii.gz")
    assert (plan.configuration, plan.reader, plan.previous_stage) == ("3d_fullres", "SimpleITKIO", None)
    assert (plan.transpose_forward, plan.transpose_backward) == ((2, 0, 1), (1, 2, 0))
    assert (plan.patch_size, plan.spacing) == ((4, 8, 8), (3.0, 1.0, 1.5))
    assert plan.normalisations == (
        Normalisation("CTNormalization", False, Intensities(-20.0, 300.0, 100.5, 50.25)),
        Normalisation("ZScoreNormalization", True, None),
    )
    assert plan.resample_data == Resampling("scipy", 3, 0, None, 3.0)
    assert plan.resample_seg == plan.resample_probabilities == Resampling("scipy", 1, 0, None, 3.0)
    assert plan.architecture.norm == Layer("InstanceNorm3d", {"eps": 1e-5, "affine": True})
    assert plan.architecture.reduction == (2, 4, 4)


def test_a_2d_folder_mirrors_in_the_plane_of_its_slices(tmp_path: Path) -> None:
    """Axes 0 and 1 of a patch are 1 and 2 of the model."""
    model = read(tmp_path, FLAT_OPTIONS, inference_allowed_mirroring_axes=(1,))
    assert (model.is_2d, model.mirror_axes, model.flips) == (True, (1,), (2,))
    assert (model.plan.patch_size, model.plan.spacing) == ((4, 6), (1.0, 1.5))


@pytest.mark.parametrize("axes", [None, MISSING, ()])
def test_a_checkpoint_without_mirroring_has_no_flips(tmp_path: Path, axes: Any) -> None:
    """Old ones do not have the key."""
    content = stored(WEIGHTS, inference_allowed_mirroring_axes=axes)
    if axes is MISSING:
        del content["inference_allowed_mirroring_axes"]
    write_checkpoint(write_settings(tmp_path), 0, content)
    assert read_folder(tmp_path).flips == ()


def test_configurations_inherit(tmp_path: Path) -> None:
    """Through several steps, and a child's value counts as a whole."""
    plans = {
        "configurations.middle": {"inherits_from": "3d_fullres", "spacing": [9.0, 9.0, 9.0]},
        "configurations.cascade": {"inherits_from": "middle", "previous_stage": "3d_lowres", "patch_size": [8, 4, 4]},
    }
    model = read(tmp_path, plans, init_args={"configuration": "cascade"})
    assert (model.plan.patch_size, model.plan.spacing) == ((8, 4, 4), (9.0, 9.0, 9.0))
    assert model.plan.normalisations[0].scheme == "CTNormalization"
    assert (model.plan.configuration, model.plan.previous_stage, model.input_channels) == ("cascade", "3d_lowres", 4)


def test_inheriting_in_a_circle_is_an_error(tmp_path: Path) -> None:
    """Also of a configuration from itself."""
    text = refusal(make(tmp_path / "a", {f"{MAIN}inherits_from": "b", "configurations.b.inherits_from": "3d_fullres"}))
    assert "inherit in a circle: 3d_fullres -> b -> 3d_fullres" in text
    text = refusal(make(tmp_path / "b", {f"{MAIN}inherits_from": "3d_fullres"}))
    assert "inherit in a circle: 3d_fullres -> 3d_fullres" in text
    text = refusal(make(tmp_path / "c", {f"{MAIN}inherits_from": "3d_fulres"}))
    assert "has no configuration '3d_fulres', which is inherits_from of '3d_fullres'" in text
    text = refusal(make(tmp_path / "d", init_args={"configuration": "3d_fulres"}))
    assert "which is the checkpoint's configuration; it has 3d_fullres. Did you mean 3d_fullres?" in text


def test_old_names_of_keys_are_read(tmp_path: Path) -> None:
    """`modality`, `..._by_modality`; and neither label_manager nor _kw_requires_import."""
    key = "foreground_intensity_properties_per_channel"
    plans = {
        "foreground_intensity_properties_by_modality": {"0": {**PLANS[key]["0"], "mean": 7}},
        key: MISSING,
        "label_manager": MISSING,
        f"{MAIN}architecture._kw_requires_import": MISSING,
    }
    model = read(tmp_path, plans, {"modality": {"1": "b", "0": "a"}, "channel_names": MISSING})
    assert model.dataset.channels == ("a", "b")
    assert model.plan.normalisations[0].intensities == Intensities(-20.0, 300.0, 7.0, 50.25)


@pytest.mark.parametrize(
    ("function", "arguments", "wanted"),
    [
        ("resample_data_or_seg_to_shape", {}, Resampling("scipy", 3, 0, False, 3.0)),
        (
            "resample_data_or_seg_to_shape",
            {"order": 0, "force_separate_z": True, "separate_z_anisotropy_threshold": 2},
            Resampling("scipy", 0, 0, True, 2.0),
        ),
        ("resample_torch_fornnunet", {}, Resampling("torch", 1, 0, None, 3.0)),
        (
            "resample_torch_fornnunet",
            {"force_separate_z": False, "memefficient_seg_resampling": True, "num_threads": 8},
            Resampling("torch", 1, 0, False, 3.0),
        ),
        ("no_resampling_hack", {}, Resampling("none", 1, 0, None, 3.0)),
    ],
)
def test_resampling_has_the_defaults_of_its_function(
    tmp_path: Path, function: str, arguments: dict[str, Any], wanted: Resampling
) -> None:
    """Arguments that change nothing are left out."""
    plans = {f"{MAIN}resampling_fn_probabilities": function, f"{MAIN}resampling_fn_probabilities_kwargs": arguments}
    assert read(tmp_path, plans).plan.resample_probabilities == wanted


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_makes_a_normalisation(scheme: str) -> None:
    """Of the same name; only the Z-score with a mask asks for the voxels inside."""
    intensities = Intensities(-1.0, 1.0, 0.0, 2.0) if scheme == "CTNormalization" else None
    normalise: Any = make_normalisation(Normalisation(scheme, True, intensities))
    assert type(normalise).__name__ == scheme
    assert normalise.uses_inside == (scheme == "ZScoreNormalization")
    data = torch.tensor([0.0, 4.0]).view(1, 1, 1, 2)
    inside = torch.ones(1, 1, 2, dtype=torch.bool)
    results = {
        "CTNormalization": [0.0, 0.5],
        "ZScoreNormalization": [-1.0, 1.0],
        "NoNormalization": [0.0, 4.0],
        "RescaleTo01Normalization": [0.0, 1.0],
        "RGBTo01Normalization": [0.0, 4 / 255],
    }
    assert normalise(data, inside).flatten().tolist() == pytest.approx(results[scheme])


# Labels


@pytest.mark.parametrize(
    ("labels", "names", "foreground", "ignore"),
    [
        ({"background": 0, "b": 2, "a": 1}, ("background", "a", "b"), (1, 2), None),
        ({"a": 1, "background": 0, "ignore": 2}, ("background", "a"), (1,), 2),
        ({"background": 0, "a": [1], "b": [2]}, ("background", "a", "b"), (1, 2), None),
        ({"background": 0, "a": 1, "again": 1, "ignore": None}, ("background", "a"), (1,), None),
        ({"nothing": 0, "background": 0, "a": 1}, ("background", "a"), (1,), None),
    ],
)
def test_classes_are_named_in_the_order_of_their_numbers(
    tmp_path: Path, labels: dict[str, Any], names: tuple[str, ...], foreground: tuple[int, ...], ignore: int | None
) -> None:
    """A list of one number is that number; 'ignore' is never predicted."""
    dataset = {"labels": labels}
    result = read(tmp_path, dataset=dataset).dataset.labels
    assert (result.names, result.values, result.foreground) == (names, tuple(range(len(names))), foreground)
    assert (result.is_regions, result.ignore, result.heads) == (False, ignore, len(names))


def test_numbers_with_gaps_are_written_by_position_as_nnunet_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The user is told, and how to get the numbers."""
    result = read(tmp_path, dataset={"labels": {"background": 0, "a": 1, "b": 3}}).dataset.labels
    assert (result.names, result.values, result.foreground) == (("background", "a", "b"), (0, 1, 2), (1, 3))
    assert "stitch.label_values=[0,1,3] writes the numbers" in caplog.text


def test_regions_are_in_the_order_of_the_file_and_write_their_own_numbers(tmp_path: Path) -> None:
    """The background has no channel, nor has a region of 0 alone; numbers may be any."""
    labels = {"background": 0, "whole": [1, 2, 3], "none": [0], "core": [1, 3], "enhancing": 3, "ignore": 4}
    result = read(tmp_path, dataset={"labels": labels, "regions_class_order": [2, 1, 3]}).dataset.labels
    assert (result.names, result.values) == (("whole", "core", "enhancing"), (2, 1, 3))
    assert (result.is_regions, result.foreground, result.ignore, result.heads) == (True, (1, 2, 3), 4, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"a": 1}}, "labels.background is missing; wanted is 0"),
        ({"labels": {"background": [0], "a": 1}}, "labels.background is [0]; wanted is 0"),
        ({"labels": {"background": 1, "a": 2}}, "labels.background is 1; wanted is 0"),
        ({"labels": {"background": False, "a": 1}}, "labels.background is False; wanted is an integer"),
        ({"labels": {"background": 0, "a": "1"}}, "labels.a is '1'; wanted is an integer"),
        ({"labels": {"background": 0, "a": 1.5}}, "labels.a is 1.5; wanted is an integer"),
        ({"labels": {"background": 0, "a": [1, "2"]}}, "labels.a is [1, '2']; wanted is an integer"),
        ({"labels": {"background": 0, "a": []}}, "labels.a is []; wanted is an integer"),
        ({"labels": {"background": 0, "a": -1}}, "labels.a is -1; wanted is an integer"),
        ({"labels": {"background": 0}}, "wanted is at least one label beside the background"),
        ({"labels": {"background": 0, "a": 1, "ignore": 1}}, "labels.ignore is 1; wanted is 2"),
        ({"labels": {"background": 0, "a": 1, "ignore": [2]}}, "labels.ignore is [2]; wanted is 2"),
        ({"labels": [0, 1]}, "labels is [0, 1]; wanted is an object"),
        ({"labels": {"background": 0, "a": [1, 2]}}, "regions_class_order is missing; wanted is a number for each of"),
        (
            {"labels": {"background": 0, "a": [1, 2], "b": 1}, "regions_class_order": [1]},
            "regions_class_order is [1]; wanted is a number for each of the 2 regions: a, b",
        ),
        ({"channel_names": {"0": "a", "2": "b"}}, "wanted is names by number, from '0' to '1'"),
        ({"channel_names": {}}, "channel_names is {}; wanted is a name for each image"),
        ({"channel_names": {"0": 1, "1": 2}}, "wanted is a name for each image"),
        ({"file_ending": "nii.gz"}, "file_ending is 'nii.gz'; wanted is the end of a file's name"),
        ({"file_ending": MISSING}, "file_ending is missing; wanted is a text"),
    ],
)
def test_a_wrong_dataset_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """With the file, what came and what was wanted."""
    folder = make(tmp_path, dataset={key: MISSING for key in changes})
    (folder / "dataset.json").write_text(json.dumps(edited(DATASET, changes)))
    text = refusal(folder)
    assert text.startswith(f"{folder / 'dataset.json'}: ")
    assert message in text


# Plans


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("image_reader_writer", "NaturalImage2DIO"),
        ("image_reader_writer", MISSING),
        ("image_reader_writer", ["SimpleITKIO"]),
        ("transpose_forward", [0, 1, 1]),
        ("transpose_forward", [0, 1]),
        ("transpose_backward", [2, 0, 1]),
        ("label_manager", "MyLabelManager"),
        ("configurations", []),
        (f"{MAIN}preprocessor_name", "MyPreprocessor"),
        (f"{MAIN}patch_size", [4, 8]),
        (f"{MAIN}patch_size", [4, 8, 0]),
        (f"{MAIN}patch_size", [4, 8, 6]),
        (f"{MAIN}patch_size", [4, 8, 8, 8]),
        (f"{MAIN}patch_size", [4, 8.0, 8]),
        (f"{MAIN}spacing", [1.0, 1.0]),
        (f"{MAIN}spacing", [1.0, 1.0, 0.0]),
        (f"{MAIN}spacing", [1.0, 1.0, float("inf")]),
        (f"{MAIN}spacing", "1.0"),
        (f"{MAIN}spacing", [1.0, 1.0, 10**400]),
        (f"{MAIN}normalization_schemes", ["CTNormalization"]),
        (f"{MAIN}normalization_schemes", ["CTNormalization", "os.system"]),
        (f"{MAIN}use_mask_for_norm", [True]),
        (f"{MAIN}use_mask_for_norm", [True, "no"]),
        ("foreground_intensity_properties_per_channel.0", MISSING),
        ("foreground_intensity_properties_per_channel.0.std", MISSING),
        ("foreground_intensity_properties_per_channel.0.mean", float("nan")),
        (f"{MAIN}resampling_fn_data", "my_function"),
        (f"{MAIN}resampling_fn_data_kwargs", MISSING),
        (f"{MAIN}resampling_fn_data_kwargs.order", 7),
        (f"{MAIN}resampling_fn_data_kwargs.order_z", 1),
        (f"{MAIN}resampling_fn_data_kwargs.order_z", False),
        (f"{MAIN}resampling_fn_data_kwargs.is_seg", True),
        (f"{MAIN}resampling_fn_data_kwargs.mode", "area"),
        (f"{MAIN}resampling_fn_data_kwargs.separate_z_anisotropy_threshold", "3"),
        (f"{MAIN}resampling_fn_seg_kwargs.is_seg", False),
        (f"{MAIN}previous_stage", 3),
        (f"{MAIN}architecture", MISSING),
    ],
)
def test_a_wrong_plan_is_refused_by_name(tmp_path: Path, path: str, value: Any) -> None:
    """With the file, what came and what was wanted."""
    folder = make(tmp_path, {path: value})
    text = refusal(folder)
    assert text.startswith(f"{folder / 'plans.json'}: ")
    named = {
        f"{MAIN}architecture": f"{MAIN}UNet_class_name",  # which plans without `architecture` have
        f"{MAIN}patch_size": f"{MAIN}spacing" if value == [4, 8] else f"{MAIN}patch_size",
    }.get(path, path)
    assert f"{named} is " in text
    assert "; wanted is " in text


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, 1),
        ({f"{MAIN}resampling_fn_seg_kwargs.order": 0}, 0),
        (
            {
                f"{MAIN}resampling_fn_seg": "resample_torch_fornnunet",
                f"{MAIN}resampling_fn_seg_kwargs": {"is_seg": True},
            },
            "half",
        ),
    ],
)
def test_labels_of_a_stage_before_are_resampled_as_the_plans_say(
    tmp_path: Path, changes: dict[str, Any], wanted: int | str
) -> None:
    """And other networks have no labels."""
    model = read(tmp_path / "a", {f"{MAIN}previous_stage": "3d_lowres", **changes})
    assert settings_of(model)["preprocess"]["one_hot_interpolation"] == wanted
    assert "one_hot_interpolation" not in settings_of(read(tmp_path / "b", changes))["preprocess"]


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("order", 3, "_kwargs.order is 3; wanted is 0 or 1 where a network takes labels"),
        ("force_separate_z", False, "_kwargs is {"),
        ("separate_z_anisotropy_threshold", 5, "_kwargs is {"),
    ],
)
def test_labels_of_a_stage_before_that_are_resampled_otherwise_are_refused(
    tmp_path: Path, key: str, value: Any, place: str
) -> None:
    """Only where the network takes them."""
    changes = {f"{MAIN}resampling_fn_seg_kwargs.{key}": value}
    read(tmp_path / "without", changes)
    text = refusal(make(tmp_path / "with", {f"{MAIN}previous_stage": "3d_lowres", **changes}))
    assert f"{MAIN}resampling_fn_seg{place}" in text
    assert "predict this model with nnU-Net itself" in text


def test_a_wrong_old_plan_is_refused_by_its_own_keys(tmp_path: Path) -> None:
    """Not by those of newer plans."""
    old = {
        f"{MAIN}architecture": MISSING,
        f"{MAIN}UNet_class_name": "PlainConvUNet",
        f"{MAIN}UNet_base_num_features": 2,
        f"{MAIN}unet_max_num_features": 5,
        f"{MAIN}n_conv_per_stage_encoder": [1, 2],
        f"{MAIN}n_conv_per_stage_decoder": [2],
        f"{MAIN}pool_op_kernel_sizes": [[1, 1, 1], [1, 2, 2]],
        f"{MAIN}conv_kernel_sizes": [[1, 3, 3], [3, 3, 3]],
    }
    assert read(tmp_path / "right", old).plan.architecture.features == (2, 4)
    for n, key in enumerate(old):
        if key != f"{MAIN}architecture":
            assert f": {key} is [0]; wanted is " in refusal(make(tmp_path / str(n), {**old, key: [0]}))


def test_a_mode_of_torch_resampling_is_refused_by_name(tmp_path: Path) -> None:
    """Another one gives other values."""
    plans = {
        f"{MAIN}resampling_fn_data": "resample_torch_fornnunet",
        f"{MAIN}resampling_fn_data_kwargs": {"mode": "area"},
    }
    assert "resampling_fn_data_kwargs.mode is 'area'; wanted is \"linear\"." in refusal(make(tmp_path, plans))


def test_names_in_plans_are_never_imported(tmp_path: Path) -> None:
    """A module that would leave a mark is not loaded, whatever names it."""
    (tmp_path / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})\nclass Conv3d: pass\n")
    script = "from voxquilt.models.nnunet.folder import read_folder; import sys; read_folder(sys.argv[1])"
    for n, path in enumerate((f"{MAIN}architecture.network_class_name", f"{OPTIONS}conv_op", f"{OPTIONS}nonlin")):
        folder = make(tmp_path / str(n), {path: "evil.Conv3d"})
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
        done = subprocess.run(
            [sys.executable, "-c", script, str(folder)], env=environment, capture_output=True, text=True
        )
        assert f"{path} is 'evil.Conv3d'" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_folder_is_read_before_torch_has_loaded(tmp_path: Path) -> None:
    """So that a wrong one is answered at once."""
    folder = make(tmp_path)
    script = (
        "import sys; from voxquilt.models.nnunet.folder import read_folder\n"
        "from voxquilt.models.nnunet.postprocessing import read_postprocessing\n"
        "read_postprocessing(read_folder(sys.argv[1])); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("name", "content"), [("plans.json", "{"), ("dataset.json", "[]"), ("plans.json", "[" * 99999)]
)
def test_a_broken_json_file_is_refused_by_name(tmp_path: Path, name: str, content: str) -> None:
    """Cut off, of another kind, or nested too deeply."""
    folder = make(tmp_path)
    (folder / name).write_text(content)
    assert refusal(folder).startswith(f"{folder / name} ")


# Checkpoints


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"trainer_name": "nnUNet_Primus_M_Trainer"},
            "was trained by nnUNet_Primus_M_Trainer, whose network is Primus",
        ),
        ({"trainer_name": 3}, "trainer_name is 3; wanted is a text"),
        ({"init_args": None}, "init_args.configuration is missing or not a plain value; wanted is a text"),
        ({"inference_allowed_mirroring_axes": (0, 3)}, "inference_allowed_mirroring_axes is (0, 3); wanted is"),
        ({"inference_allowed_mirroring_axes": (1, 1)}, "inference_allowed_mirroring_axes is (1, 1); wanted is"),
        ({"network_weights": 5}, "it holds no network_weights"),
    ],
)
def test_a_wrong_checkpoint_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """With the file, what came and what was wanted."""
    folder = make(tmp_path, **changes)
    text = refusal(folder)
    assert text.startswith(str(folder / "fold_0" / "checkpoint_final.pth"))
    assert message in text


def test_mirroring_along_an_axis_that_patches_do_not_have_is_refused(tmp_path: Path) -> None:
    """A 2-D network has two."""
    text = refusal(make(tmp_path, FLAT_OPTIONS, inference_allowed_mirroring_axes=(0, 2)))
    assert "inference_allowed_mirroring_axes is (0, 2), but patches have 2 axes" in text


def test_other_trainers_are_accepted(tmp_path: Path) -> None:
    """Whether the network is the one of the plans is seen when weights are loaded."""
    assert read(tmp_path, trainer_name="MyTrainer").trainer == "MyTrainer"


def test_reading_runs_nothing_that_is_pickled(tmp_path: Path) -> None:
    """Neither for its own sake nor in the place of a value."""
    marker = tmp_path / "ran"
    folder = make(tmp_path / "model", extra=Bomb(marker))
    assert read_folder(folder).trainer == "nnUNetTrainer"
    assert "trainer_name is missing or not a plain value" in refusal(make(tmp_path / "b", trainer_name=Bomb(marker)))
    assert not marker.exists()


# Folds


def test_all_folds_with_the_checkpoint_predict(tmp_path: Path) -> None:
    """In the order of their numbers, without fold_all, and without copies of folders."""
    folder = make(tmp_path)
    for fold in (10, 2, "all"):
        write_checkpoint(folder, fold, stored(WEIGHTS))
    write_checkpoint(folder, 3, stored(WEIGHTS), "checkpoint_best.pth")
    for copy in ("0_old", "02", "x"):
        write_checkpoint(folder, copy, stored(WEIGHTS))
    model = read_folder(folder)
    assert model.folds == (0, 2, 10)
    assert [file.parent.name for file in model.checkpoints] == ["fold_0", "fold_2", "fold_10"]
    assert read_folder(folder, checkpoint="checkpoint_best.pth").folds == (3,)


def test_a_fold_without_the_checkpoint_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its training may have been broken off. Not if folds are chosen."""
    folder = make(tmp_path)
    write_checkpoint(folder, 3, stored(WEIGHTS), "checkpoint_latest.pth")
    (folder / "fold_3_old").mkdir()
    assert read_folder(folder, folds=[0]).folds == (0,)
    assert not caplog.messages
    assert read_folder(folder).folds == (0,)
    assert caplog.messages == [f"{folder}: of fold 3 there is no checkpoint_final.pth; what predicts is fold 0."]


def test_scores_that_are_resampled_by_splines_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """nnU-Net cuts off what lies beyond a channel's range, which is not known while scores are streamed."""
    read(tmp_path / "a", {f"{MAIN}resampling_fn_probabilities_kwargs.order": 1})
    assert not caplog.messages
    read(tmp_path / "b", {f"{MAIN}resampling_fn_probabilities_kwargs.order": 3})
    assert "resampling_fn_probabilities has order 3" in caplog.text


def test_fold_all_predicts_where_it_is_alone_or_named(tmp_path: Path) -> None:
    """nnU-Net itself wants it named."""
    folder = write_settings(tmp_path)
    write_checkpoint(folder, "all", stored(WEIGHTS))
    assert read_folder(folder).folds == ("all",)
    write_checkpoint(folder, 0, stored(WEIGHTS))
    assert read_folder(folder).folds == (0,)
    assert read_folder(folder, folds=["all"]).folds == read_folder(folder, folds="all").folds == ("all",)
    assert read_folder(folder, folds=0).folds == (0,)
    assert read_folder(folder, folds=["0", "all"]).folds == (0, "all")


def test_folds_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    """It says which are."""
    folder = make(tmp_path)
    write_checkpoint(folder, 2, stored(WEIGHTS))
    text = refusal(folder, folds=[0, 1])
    assert "fold 1 with checkpoint_final.pth was wanted; folds 0, 2 with that file came." in text
    text = refusal(folder, checkpoint="checkpoint_finale.pth")
    assert "a fold with checkpoint_finale.pth was wanted; no fold with that file came." in text
    assert "called checkpoint_final.pth. Did you mean checkpoint_final.pth?" in text
    assert "fold" in refusal(folder, folds=[])
    assert "checkpoint='../x.pth' is a path; wanted is the name" in refusal(folder, checkpoint="../x.pth")


# Places


def test_a_results_folder_lists_the_models_in_it(tmp_path: Path) -> None:
    """One or two levels down."""
    for name in ("Dataset001_A/one", "Dataset002_B/two"):
        make(tmp_path / name)
    text = refusal(tmp_path)
    assert f"\n  model.folder={tmp_path / 'Dataset001_A' / 'one'}" in text
    assert f"\n  model.folder={tmp_path / 'Dataset002_B' / 'two'}" in text
    assert f"holds some; choose one:\n  model.folder={tmp_path / 'Dataset001_A' / 'one'}" in refusal(
        tmp_path / "Dataset001_A"
    )


def test_a_place_inside_a_model_folder_suggests_the_folder(tmp_path: Path) -> None:
    """A fold, a checkpoint, and the files beside it."""
    folder = make(tmp_path / "model")
    assert f"Did you mean {folder}?" in refusal(folder / "fold_0")
    text = refusal(folder / "fold_0" / "checkpoint_final.pth")
    assert f"is a file; wanted is a model folder of nnU-Net, or a zip that it exported. Did you mean {folder}, " in text
    assert "with checkpoint=checkpoint_final.pth?" in text
    assert f"Did you mean {folder}?" in refusal(folder / "plans.json")


def test_a_place_that_is_no_model_folder_is_an_error(tmp_path: Path) -> None:
    """Missing, nearly there, empty, or incomplete."""
    folder = make(tmp_path / "model")
    assert f"model2 is not there; wanted is a model folder of nnU-Net. Did you mean {folder}?" in refusal(
        tmp_path / "model2"
    )
    (tmp_path / "other" / "deep").mkdir(parents=True)
    assert "it has neither plans.json nor dataset.json" in refusal(tmp_path / "other")
    (folder / "dataset.json").unlink()
    assert "has no dataset.json, which a model folder of nnU-Net has" in refusal(folder)


# Exported zips


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VOXQUILT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_exported_zip_is_unpacked_once_into_the_cache(tmp_path: Path, cache: Path) -> None:
    """Only what predicting needs, under the zip's digest; it reads as the folder does."""
    folder = make(tmp_path / "model")
    (folder / "fold_0" / "progress.png").write_bytes(b"picture")
    file = export(tmp_path / "export.zip", folder, f"Dataset001_Test/{NAME}")
    model = read_folder(file)
    assert model.path.is_relative_to(cache)
    assert (model.plan, model.dataset) == (read_folder(folder).plan, read_folder(folder).dataset)
    names = {path.relative_to(model.path).as_posix() for path in model.path.rglob("*") if path.is_file()}
    assert names == {"plans.json", "dataset.json", "fold_0/checkpoint_final.pth"}
    before = model.checkpoints[0].stat().st_mtime_ns
    assert read_folder(f"{file}/Dataset001_Test/{NAME}") == model
    assert model.checkpoints[0].stat().st_mtime_ns == before
    (folder / "plans.json").write_text(json.dumps(edited(PLANS, {f"{MAIN}spacing": [2.0, 2.0, 2.0]})))
    file.unlink()
    export(file, folder, f"Dataset001_Test/{NAME}")
    assert read_folder(file).plan.spacing == (2.0, 2.0, 2.0)


def test_a_zip_of_several_models_lists_them(tmp_path: Path, cache: Path) -> None:
    """And the one that is named behind it is taken."""
    file = tmp_path / "export.zip"
    for n, name in enumerate(("A", "B")):
        export(file, make(tmp_path / name, {f"{MAIN}spacing": [1.0 + n] * 3}), f"Dataset001_Test/{name}")
    text = refusal(file)
    assert f"holds 2 models; choose one:\n  model.folder={file}/Dataset001_Test/A\n" in text
    assert not cache.exists()
    assert read_folder(f"{file}/Dataset001_Test/B").plan.spacing == (2.0, 2.0, 2.0)
    assert "holds no model Dataset001_Test/C. Did you mean Dataset001_Test/" in refusal(
        Path(f"{file}/Dataset001_Test/C")
    )


def _link(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.create_system = 3
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("Dataset001_Test/m/fold_0/../../../../escaped.pth", "a name that leads out"),
        ("../escaped.pth", "a name that leads out"),
        ("/escaped.pth", "a name that leads out"),
        ("C:escaped.pth", "a name that leads out"),
        ("a\\..\\escaped.pth", "a name that leads out"),
        (_link("Dataset001_Test/m/fold_0/escaped.pth"), "a link or a device"),
    ],
)
def test_a_zip_with_an_unsafe_member_is_refused_by_name(
    tmp_path: Path, cache: Path, member: str | zipfile.ZipInfo, message: str
) -> None:
    """Names that lead elsewhere, and links; nothing at all is unpacked."""
    file = export(tmp_path / "export.zip", make(tmp_path / "model"), "Dataset001_Test/m")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(member, str(tmp_path / "target"))
    name = member if isinstance(member, str) else member.filename
    assert f"its member {name!r} is {message}" in refusal(file)
    assert not cache.exists()
    assert not list(tmp_path.rglob("escaped*"))


def test_a_zip_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member that is packed far too well, and too many bytes in all."""
    folder = make(tmp_path / "model")
    good = export(tmp_path / "good.zip", folder, "m")
    (folder / "fold_0" / "checkpoint_bomb.pth").write_bytes(bytes(2**22))
    text = refusal(export(tmp_path / "export.zip", folder, "m"))
    assert "its member 'm/fold_0/checkpoint_bomb.pth' has 4194304 bytes, packed into" in text
    monkeypatch.setattr(zipped_folder, "MOST_BYTES", 1000)
    assert "would unpack to" in refusal(good)
    assert not cache.exists()


def test_a_damaged_zip_is_refused_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    """Its checksum is wrong, as after a broken download."""
    file = tmp_path / "export.zip"
    folder = make(tmp_path / "model")
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*.*")):
            archive.write(path, f"m/{path.relative_to(folder).as_posix()}")
    content = file.read_bytes()
    file.write_bytes(content.replace(b"seg_layers", b"seg_layerz", 1))
    assert re.search(r"export\.zip cannot be unpacked: .*CRC.* Is it complete, ", refusal(file))
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_another_zip_is_not_taken_for_an_export(tmp_path: Path) -> None:
    """It has no plans.json."""
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a.txt", "a")
    wanted = "is a file; wanted is a model folder of nnU-Net, or a zip that it exported"
    assert f"{wanted}. It is a zip without such a folder in it." in refusal(tmp_path / "other.zip")
    (tmp_path / "cut.zip").write_bytes((tmp_path / "other.zip").read_bytes()[:-9])
    assert f"{wanted}. It cannot be read as a zip: was it copied" in refusal(tmp_path / "cut.zip")


# Post-processing

LARGEST = "remove_all_but_largest_component_from_segmentation"


def steps(*labels: Any) -> str:
    return json.dumps(
        {
            "postprocessing_fns": [LARGEST] * len(labels),
            "postprocessing_kwargs": [{"labels_or_regions": item} for item in labels],
        }
    )


@pytest.mark.parametrize(
    "place",
    [
        lambda folder: folder,
        lambda folder: folder / "crossval_results_folds_0",
        lambda folder: folder / "crossval_results_folds_0_1_2_3_4",
        lambda folder: folder.parent,
    ],
)
def test_post_processing_is_found_and_read(tmp_path: Path, place: Callable[[Path], Path]) -> None:
    """A list of numbers is one union, and so is a list of lists."""
    model = read(tmp_path / "model")
    place(model.path).mkdir(exist_ok=True)
    (place(model.path) / "postprocessing.json").write_text(steps([1, 2], [[1, 3]], 2, [3, [1, 2]]))
    assert read_postprocessing(model) == ((1, 2), (1, 3), (2,), (1, 2, 3))


def test_a_folder_may_have_no_post_processing(tmp_path: Path) -> None:
    """No file, or one without steps."""
    model = read(tmp_path / "model")
    assert read_postprocessing(model) == ()
    (model.path / "postprocessing.json").write_text(steps())
    assert read_postprocessing(model) == ()


def test_the_post_processing_of_the_folds_that_predict_counts(tmp_path: Path) -> None:
    """Where there are several cross-validations; if none is of these folds, it is an error."""
    folder = make(tmp_path / "model")
    write_checkpoint(folder, 1, stored(WEIGHTS))
    for n, name in enumerate(("0_1", "0_1_2")):
        (folder / f"crossval_results_folds_{name}").mkdir()
        (folder / f"crossval_results_folds_{name}" / "postprocessing.json").write_text(steps(n + 1))
    assert read_postprocessing(read_folder(folder)) == ((1,),)
    with pytest.raises(ConfigError, match="has several, none of folds 1; copy one to"):
        read_postprocessing(read_folder(folder, folds=[1]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"postprocessing_fns": ["os.system"], "postprocessing_kwargs": [{}]},
            r"postprocessing_fns is \['os.system'\]",
        ),
        ({"postprocessing_fns": [LARGEST], "postprocessing_kwargs": []}, "postprocessing_kwargs is"),
        ({"postprocessing_fns": [LARGEST], "postprocessing_kwargs": [{}]}, "labels_or_regions is missing"),
        (
            {"postprocessing_fns": [LARGEST], "postprocessing_kwargs": [{"labels_or_regions": [0, 1]}]},
            "labels_or_regions",
        ),
        (
            {
                "postprocessing_fns": [LARGEST],
                "postprocessing_kwargs": [{"labels_or_regions": 1, "background_label": 2}],
            },
            "0.background_label is 2; wanted is 0",
        ),
        (
            {"postprocessing_fns": [LARGEST], "postprocessing_kwargs": [{"labels_or_regions": 1, "other": 2}]},
            "0.other is 2; wanted is no such argument",
        ),
    ],
)
def test_other_post_processing_is_refused_by_name(tmp_path: Path, content: Any, message: str) -> None:
    """With the file and the key."""
    model = read(tmp_path / "model")
    (model.path / "postprocessing.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=rf"postprocessing\.json: .*{message}"):
        read_postprocessing(model)


def test_a_pickle_of_post_processing_is_never_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A line says that it is left out; beside the text it is not even mentioned."""
    marker = tmp_path / "ran"
    model = read(tmp_path / "model")
    (model.path / "postprocessing.pkl").write_bytes(pickle.dumps(Bomb(marker)))
    with caplog.at_level(logging.INFO, "voxquilt"):
        assert read_postprocessing(model) == ()
    (record,) = caplog.records
    assert "postprocessing.pkl is not used, since opening it can run code" in record.getMessage()
    assert not marker.exists()
    caplog.clear()
    (model.path / "postprocessing.json").write_text(steps(1))
    assert read_postprocessing(model) == ((1,),)
    assert not caplog.records
