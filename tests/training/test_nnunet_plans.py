"""Tests `train.py model=nnunet`: plans become settings, voxels are nnU-Net's, and checkpoints predict with them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from forks import Server, checked
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from nnunet_folders import (
    FLAT_OPTIONS,
    MAIN,
    MISSING,
    OLD_PLANS,
    OPTIONS,
    RESIDUAL_OPTIONS,
    balanced,
    export,
    make_model,
    patch,
    stored,
    with_duplicates,
    write_case,
    write_checkpoint,
    write_settings,
)
from nnunet_reference import Reference
from omegaconf import OmegaConf
from scipy import ndimage
from synthetic import read, save

from voxquilt.cli.instantiate import build, check_classes
from voxquilt.cli.main import conf_dir
from voxquilt.cli.overrides import to_overrides
from voxquilt.cli.resolvers import register_resolvers
from voxquilt.cli.train_config import check_train
from voxquilt.cli.training_plans import take_plans
from voxquilt.data.grid_loader import make_grids
from voxquilt.data.subject_task import SubjectTask
from voxquilt.errors import ConfigError, InputError
from voxquilt.models.nnunet.checkpoint import load_weights
from voxquilt.models.nnunet.folder import read_folder
from voxquilt.models.nnunet.networks import PlannedUNet, build_network
from voxquilt.models.nnunet.training_plan import read_training_plan
from voxquilt.models.weights.stored_settings import to_carry
from voxquilt.training.datamodule import TrainingDataModule

pytestmark = pytest.mark.timeout(120)

BATCH = {f"{MAIN}batch_size": 2, f"{MAIN}batch_dice": True}
OBLIQUE = np.array([[-1.1, 0.2, 0, 4], [0.2, 1.2, 0, 9], [0, 0, 2.4, -7], [0, 0, 0, 1.0]])
PERMUTED = np.array([[0, 0, -4.0, 30], [0.9, 0, 0, -9], [0, -1.1, 0, 2], [0, 0, 0, 1.0]])
APART = {f"{MAIN}resampling_fn_{what}_kwargs.force_separate_z": True for what in ("data", "seg", "probabilities")}
UNCHANGED = {
    f"{MAIN}resampling_fn_{what}{ending}": value
    for what in ("data", "seg", "probabilities")
    for ending, value in (("", "no_resampling_hack"), ("_kwargs", {}))
}
UNMASKED = {
    f"{MAIN}normalization_schemes": ["CTNormalization", "RescaleTo01Normalization"],
    f"{MAIN}use_mask_for_norm": [False, False],
}
REGIONS = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}


def write_images(folder: Path, count: int, shape: tuple[int, int, int], affine: np.ndarray, top: int = 2) -> None:
    """Subjects c0, c1, ... of two channels in imagesTr, and their labels 0, 1 and `top` in labelsTr.

    A corner of the images is outside of the body, and a label lies outside of all that is not 0.
    """
    for n in range(count):
        size = (shape[0] + n, shape[1], shape[2])
        paths = write_case(folder / "imagesTr", f"c{n}", size, affine, 2, seed=n)
        corner = tuple(slice(m // 2) for m in size)
        for path in paths:
            voxels = read(path).copy()
            voxels[corner] = 0
            save(path, voxels, affine)
        smooth = ndimage.gaussian_filter(read(paths[0]), 0.7)
        labels = np.where(smooth > 90, top, smooth > 30).astype(np.uint8)
        labels[-1, -1, -1] = top
        save(folder / f"labelsTr/c{n}.nii.gz", labels, affine)


def images(folder: Path, subject: str) -> list[Path]:
    return sorted((folder / "imagesTr").glob(f"{subject}_????.nii.gz"))


def given(folder: Path, *overrides: str, division: str = "data.folds=null") -> dict[str, Any]:
    """The checked configuration of `train.py model=nnunet`."""
    register_resolvers()
    GlobalHydra.instance().clear()
    typed = to_overrides([
        "model=nnunet_train", f"model.folder={folder}/model", f"data.inputs={folder}/imagesTr",
        f"data.labels={folder}/labelsTr/{{subject}}.nii.gz", f"output_dir={folder}/out", division,
        "trainer.accelerator=cpu", *overrides,
    ])  # fmt: skip
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", typed)
    take_plans(cfg, typed, conf_dir())
    return check_train(cfg)


def data_of(plain: Mapping[str, Any]) -> TrainingDataModule:
    preprocess = build(plain["preprocess"], "preprocess")
    return build(plain["data"], "data", preprocess=preprocess, label_values=plain["stitch"]["label_values"])


# Voxels

SPACES: dict[str, tuple[Mapping[str, Any], tuple[int, int, int], np.ndarray]] = {
    "transposed, slices apart": ({}, (13, 14, 6), np.diag([1.1, 1.2, 4, 1])),
    "permuted": ({}, (11, 9, 12), PERMUTED),
    "oblique, no mask": (
        {**UNMASKED, f"{MAIN}spacing": [1.5, 1.5, 1.5], f"{MAIN}patch_size": [8, 8, 8]},
        (14, 11, 12),
        OBLIQUE,
    ),
    "smaller than a patch": ({}, (7, 6, 6), OBLIQUE),
    "2d, reoriented": ({**FLAT_OPTIONS, "image_reader_writer": "NibabelIOWithReorient"}, (9, 6, 11), PERMUTED),
    "always apart": (APART, (9, 11, 8), OBLIQUE),
    "at the file's spacing": (UNCHANGED, (9, 11, 8), OBLIQUE),
}


@pytest.mark.parametrize("name", SPACES)
def test_volumes_to_train_on_are_those_of_nnunets_preprocessing_and_of_prediction(name: str, tmp_path: Path) -> None:
    """Images and labels beside a plain reference; images to the bit beside what predicting with a checkpoint reads."""
    plans, shape, affine = SPACES[name]
    make_model(tmp_path / "model", {**BATCH, **plans}, inference_allowed_mirroring_axes=None)
    write_images(tmp_path, 1, shape, affine)
    plain = given(tmp_path)
    data = data_of(plain)
    (case,) = data.training_cases
    volume = data._loader.load(case, 3)
    seen = Reference(tmp_path / "model").preprocessed(images(tmp_path, "c0"), tmp_path / "labelsTr/c0.nii.gz")
    assert seen.labels is not None
    flat = [1] if len(seen.wanted) > len(read_folder(tmp_path / "model").plan.patch_size) else []
    size = [*flat, *read_folder(tmp_path / "model").plan.patch_size]
    missing = [max(0, p - n) for p, n in zip(size, seen.labels.shape, strict=True)]
    around = [(n // 2, n - n // 2) for n in missing]
    np.testing.assert_allclose(volume.image.numpy(), np.pad(seen.data, [(0, 0), *around]), rtol=0, atol=2e-5)
    np.testing.assert_array_equal(volume.label[0].numpy(), np.pad(seen.labels.clip(0), around))
    assert len(np.unique(volume.label)) == 3, "a test of nothing"
    stored_settings = to_carry(plain, plain["images"])
    grids = make_grids(
        build(stored_settings["preprocess"], "preprocess"),
        **{key: value for key, value in stored_settings["data"].items() if key != "suffixes"},
    )
    predicted = grids.load(SubjectTask(case, number=0)).source
    assert torch.equal(torch.cat([v.float() for v in predicted.volumes]), volume.image)


def test_other_labels_take_the_nearest_voxel_unless_they_are_interpolated(tmp_path: Path) -> None:
    """Label interpolation is a setting of its own, without plans; invalid labels are refused in both ways."""
    write_images(tmp_path, 1, (9, 10, 8), np.eye(4))
    path = tmp_path / "labelsTr/c0.nii.gz"
    mixed = np.random.default_rng(0).integers(0, 2, (9, 10, 8)).astype(np.float32)
    preprocess = build({"_target_": "voxquilt.Preprocess", "spacing": 1.6}, "")
    made = []
    for value in (1, 1.5):
        nib.save(nib.Nifti1Image(mixed * value, np.eye(4)), path)
        for order in (0, 1):
            data = TrainingDataModule(
                tmp_path / "imagesTr", f"{tmp_path}/labelsTr/{{subject}}.nii.gz", 2, preprocess=preprocess, folds=None,
                suffixes={"CT": "_0000", "T2": "_0001"}, label_interpolation=order,
            )  # fmt: skip
            if value == 1:
                made.append(data._loader.load(data.training_cases[0], 2).label)
            else:
                with pytest.raises(InputError, match=r"^c0: its label holds 1\.5; classes are whole numbers from 0"):
                    data._loader.load(data.training_cases[0], 2)
    nearest, interpolated = made
    assert nearest.unique().tolist() == interpolated.unique().tolist() == [0, 1]
    assert not torch.equal(nearest, interpolated)


# What is read


def plan_of(folder: Path, **options: Any) -> dict[str, Any]:
    return read_training_plan(folder, **options).settings


def test_plans_become_settings_which_the_user_can_replace(tmp_path: Path) -> None:
    """Batch size, patches, network, names and numbers of labels, the kind of Dice; by the command line all of them."""
    write_settings(tmp_path / "model", BATCH, {"labels": {"background": 0, "organ": 1, "lesion": 7}})
    write_images(tmp_path, 2, (9, 10, 8), OBLIQUE, top=7)
    plain = given(tmp_path)
    data, net = plain["data"], plain["model"]["net"]
    assert (data["batch_size"], data["patch_size"], data["placement"], data["step"]) == (2, [4, 8, 8], "even", 0.5)
    assert (net["_target_"], net["in_channels"], net["out_channels"]) == ("voxquilt.PlannedUNet", 2, 3)
    assert plain["model"]["loss"]["batch"] is True
    assert plain["stitch"]["class_names"] == ["background", "organ", "lesion"]
    assert plain["stitch"]["label_values"] == [0, 1, 7]
    assert plain["images"] == ["CT", "T2"]
    assert not {"folder", "plans", "configuration", "folds", "checkpoint"} & plain["model"].keys()
    volume = data_of(plain)._loader.load(data_of(plain).training_cases[0], 3)
    assert volume.label.unique().tolist() == [0, 1, 2]
    other = given(
        tmp_path, "data.batch_size=5", "data.patch_overlap=2", "preprocess.spacing=2", "model/loss=l1",
        "stitch.overlap_mode=hann", "data/augment=none", "++model.net.architecture.arch_kwargs.conv_bias=false",
    )  # fmt: skip
    assert (other["data"]["batch_size"], other["data"]["patch_overlap"], other["data"]["step"]) == (5, 2, None)
    assert other["preprocess"]["spacing"] == 2
    assert other["model"]["loss"] == {"_target_": "torch.nn.L1Loss"} or "batch" not in other["model"]["loss"]
    assert other["stitch"]["overlap_mode"] == "hann"
    assert other["data"]["augment"]["transforms"] == []
    assert other["model"]["net"]["architecture"]["arch_kwargs"]["conv_bias"] is False
    assert other["model"]["net"]["architecture"]["arch_kwargs"]["n_stages"] == 3


def test_splits_beside_the_plans_divide_the_subjects(tmp_path: Path) -> None:
    """With the weights of a fold it is that fold's; the user's own division comes first."""
    make_model(tmp_path / "model", BATCH, folds=(0, 1), inference_allowed_mirroring_axes=None)
    write_images(tmp_path, 3, (9, 10, 8), OBLIQUE)
    folds = [{"train": ["c0", "c1"], "val": ["c2"]}, {"train": ["c2"], "val": ["c0", "c1"]}]
    (tmp_path / "model/splits_final.json").write_text(json.dumps(folds))
    for options, validating in (
        (("data.fold=0",), ["c2"]),
        (("data.fold=1",), ["c0", "c1"]),
        (("model.folds=1",), ["c0", "c1"]),
        (("model.folds=1", "data.fold=0"), ["c2"]),
    ):
        data = data_of(given(tmp_path, *options, division="data.seed=3"))
        assert [case.subject for case in data.validation_cases] == validating
    assert data_of(given(tmp_path, "data.fold=0")).validation_cases == []
    halves = data_of(given(tmp_path, division="data.folds=3"))
    assert [len(halves.training_cases), len(halves.validation_cases)] == [2, 1]
    (tmp_path / "model/splits_final.json").write_text(json.dumps([{"train": ["c0"], "val": ["old"]}]))
    with pytest.raises(ConfigError, match=r"has 1 subject that .* such as old\. With data\.split=null"):
        given(tmp_path, division="data.seed=3")
    assert len(data_of(given(tmp_path, "data.split=null", division="data.folds=3")).training_cases) == 2


@pytest.mark.parametrize("value", ["5", "true", "[a]", "''"])
def test_a_split_that_is_no_name_is_one_message(value: str, tmp_path: Path) -> None:
    """Not an error of whatever takes it for a path."""
    write_settings(tmp_path / "model", BATCH)
    write_images(tmp_path, 1, (9, 10, 8), OBLIQUE)
    with pytest.raises(ConfigError, match=r"data\.split must be the name of a column"):
        given(tmp_path, f"data.split={value}")


def test_a_folder_of_nnunet_preprocessed_a_file_and_a_zip_are_read(tmp_path: Path) -> None:
    """Plans may have any name there; of several, one is chosen."""
    write_settings(tmp_path / "raw", BATCH)
    plain = plan_of(tmp_path / "raw")
    (tmp_path / "raw/plans.json").rename(tmp_path / "raw/nnUNetPlans.json")
    (tmp_path / "raw/dataset_fingerprint.json").write_text("{}")
    assert plan_of(tmp_path / "raw") == plan_of(tmp_path / "raw/nnUNetPlans.json") == plain
    other = json.loads((tmp_path / "raw/nnUNetPlans.json").read_text())
    other["configurations"]["3d_fullres"]["batch_size"] = 7
    (tmp_path / "raw/nnUNetResEncUNetLPlans.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match=r"choose by model.plans: nnUNetPlans.json, nnUNetResEncUNetLPlans.json"):
        plan_of(tmp_path / "raw")
    assert plan_of(tmp_path / "raw", plans="nnUNetResEncUNetLPlans")["data"]["batch_size"] == 7
    make_model(tmp_path / "model", BATCH)
    archive = export(tmp_path / "model.zip", tmp_path / "model", "Dataset001/nnUNetTrainer__nnUNetPlans__3d_fullres")
    plan = read_training_plan(archive, fold=0)
    assert plan.settings == plain
    assert plan.weights is not None
    assert plan.weights.name == "checkpoint_final.pth"


def test_the_configuration_is_the_trained_one_or_3d_fullres_or_the_only_one(tmp_path: Path) -> None:
    """Or the one that is named."""
    write_settings(tmp_path, {**BATCH, "configurations.low": {"inherits_from": "3d_fullres", "batch_size": 9}})
    assert plan_of(tmp_path)["data"]["batch_size"] == 2
    assert plan_of(tmp_path, configuration="low")["data"]["batch_size"] == 9
    write_checkpoint(tmp_path, 1, stored({}, init_args={"configuration": "low"}))
    assert plan_of(tmp_path)["data"]["batch_size"] == 9
    with pytest.raises(ConfigError, match=r"model\.configuration=3d_fullres: the weights of .* are of low"):
        plan_of(tmp_path, configuration="3d_fullres", fold=1)
    plans = json.loads((tmp_path / "plans.json").read_text())
    plans["configurations"]["only"] = plans["configurations"].pop("3d_fullres")
    del plans["configurations"]["low"]
    (tmp_path / "plans.json").write_text(json.dumps(plans))
    (tmp_path / "fold_1/checkpoint_final.pth").unlink()
    assert plan_of(tmp_path)["data"]["batch_size"] == 2
    plans["configurations"]["2d"] = {}
    (tmp_path / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(ConfigError, match=r"model\.configuration is needed: .* has only, 2d"):
        plan_of(tmp_path)
    with pytest.raises(ConfigError, match=r"'onyl' is not there: .* has only, 2d\. Did you mean only\?"):
        plan_of(tmp_path, configuration="onyl")


@pytest.mark.parametrize(
    ("plans", "dataset", "message"),
    [
        ({f"{MAIN}previous_stage": "3d_lowres"}, {}, "3d_fullres takes the labels of 3d_lowres as input"),
        ({}, REGIONS, "labels are regions (whole, core), which train.py does not train"),
        ({}, {"labels.ignore": 3}, "labels.ignore is 3, and train.py leaves no voxel out of the loss"),
        ({f"{MAIN}resampling_fn_seg_kwargs.order": 3}, {}, "resamples labels by cubic splines"),
        ({f"{MAIN}resampling_fn_seg_kwargs.force_separate_z": True}, {}, "slices of labels otherwise than those of im"),
        ({f"{MAIN}batch_size": MISSING}, {}, "configurations.3d_fullres.batch_size is missing; wanted is an integer"),
        ({f"{MAIN}batch_size": 0}, {}, "configurations.3d_fullres.batch_size is 0; wanted is an integer of at least 1"),
        ({f"{MAIN}patch_size": [4, 9, 8]}, {}, "patch_size is [4, 9, 8]; wanted is multiples of [2, 4, 4]"),
        ({f"{MAIN}architecture.network_class_name": "os.system"}, {}, "network_class_name is 'os.system'; wanted is"),
        ({f"{OPTIONS}nonlin": "os.system"}, {}, "arch_kwargs.nonlin is 'os.system'; wanted is torch.nn.LeakyReLU or"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(
    plans: Mapping[str, Any], dataset: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    """In one message, which says where it stands."""
    write_settings(tmp_path, {**BATCH, **plans}, dataset)
    with pytest.raises(ConfigError) as caught:
        plan_of(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.folder=nope"], "nope is not there; wanted is a model folder of nnU-Net."),
        (["model.folder=imagesTr"], "imagesTr has no plans of nnU-Net"),
        (["model.folder=model/dataset.json"], "is a file; wanted is a model folder of nnU-Net, or a zip"),
        (["model.folder=5"], "model.folder is needed: a folder of nnU-Net with plans and dataset.json."),
        ([], "model.folder is needed"),
        (["model.folder=model", "model.folds=[0,1]"], "model.folds is the one fold whose weights"),
        (["model.folder=model", "model.folds=0"], "fold 0 with checkpoint_final.pth was wanted; no fold"),
        (["model.folder=model", "model.fold=0"], "Did you mean"),
        (["model.folder=model", "task=multilabel"], "model=nnunet goes with task=segmentation; it is multilabel."),
        (["model.folder=model", "data.label_interpolation=3"], "data.label_interpolation must be 0 or 1; it is 3."),
    ],
)
def test_a_wrong_folder_is_one_message_and_status_2(
    options: list[str], message: str, tmp_path: Path, forks: Server
) -> None:
    """By the real command."""
    write_settings(tmp_path / "model", BATCH)
    write_images(tmp_path, 2, (9, 10, 8), OBLIQUE)
    text = train(forks, tmp_path, *options, status=2)
    assert message in text
    assert "Traceback" not in text
    assert not (tmp_path / "outputs").exists()


# The network


@pytest.mark.parametrize("plans", [{}, RESIDUAL_OPTIONS, FLAT_OPTIONS, OLD_PLANS])
def test_the_network_of_settings_is_that_of_the_folder(plans: Mapping[str, Any], tmp_path: Path) -> None:
    """It loads a checkpoint of nnU-Net and gives the same scores; it is a class that checkpoints may name."""
    make_model(tmp_path, {**BATCH, **plans}, fill=balanced, inference_allowed_mirroring_axes=None)
    plan = read_training_plan(tmp_path, fold=0)
    node = plan.settings["model"]["net"]
    check_classes(node, ["voxquilt.*"])
    network = build(OmegaConf.to_container(OmegaConf.create(node)), "model.net")  # type: ignore[arg-type]
    assert isinstance(network, PlannedUNet)
    assert plan.weights is not None
    load_weights(plan.weights, network, other_heads=True)
    folder = read_folder(tmp_path)
    wanted = load_weights(plan.weights, build_network(folder))
    x = patch(1, 2, *folder.plan.patch_size)
    assert torch.equal(network(x), wanted(x))
    idle = [name for name, value in network.named_parameters() if not value.requires_grad]
    assert all("seg_layers" in name for name in idle)
    network(x).sum().backward()
    assert all(value.grad is not None for value in network.parameters() if value.requires_grad)


def test_random_weights_begin_as_those_of_nnunet_do(tmp_path: Path) -> None:
    """He's normal distribution for convolutions, 0 for biases, and residual blocks that add nothing."""
    changes = {**RESIDUAL_OPTIONS, f"{OPTIONS}features_per_stage": [16, 32, 32]}
    node = plan_of(write_settings(tmp_path, {**BATCH, **changes}))["model"]["net"]
    torch.manual_seed(0)
    state = PlannedUNet(2, 3, node["architecture"]).state_dict()
    for name, value in state.items():
        if name.endswith("bias") or name.endswith("conv2.norm.weight"):
            assert not value.any()
        elif value.ndim > 1 and value.numel() > 5000:
            fan = value[0].numel()
            assert float(value.std()) == pytest.approx((2 / (1 + 1e-4) / fan) ** 0.5, rel=0.1), name
    assert any(name.endswith("conv2.norm.weight") for name in state)


def test_batch_norm_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    """Plans say instance norm of a network that nnUNetTrainerBN has trained."""
    write_settings(tmp_path, BATCH)
    kinds = []
    for name in ("encoder.stages.0.0.convs.0.norm.weight", "encoder.stages.0.0.convs.0.norm.running_mean"):
        write_checkpoint(tmp_path, 0, stored({name: torch.ones(2)}))
        kinds.append(plan_of(tmp_path, fold=0)["model"]["net"]["architecture"]["arch_kwargs"]["norm_op"])
    assert kinds == ["torch.nn.InstanceNorm3d", "torch.nn.BatchNorm3d"]


def test_other_classes_keep_all_weights_but_those_of_the_last_layers(tmp_path: Path) -> None:
    """As nnU-Net's -pretrained_weights does; other channels of the input are refused."""
    make_model(tmp_path, BATCH, fill=balanced)
    plan = read_training_plan(tmp_path, fold=0)
    architecture = plan.settings["model"]["net"]["architecture"]
    network, more = PlannedUNet(2, 5, architecture), PlannedUNet(3, 3, architecture)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert plan.weights is not None
    load_weights(plan.weights, network, other_heads=True)
    taken = load_weights(plan.weights, PlannedUNet(2, 3, architecture)).state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name] if "seg_layers" in name else taken[name]), name
    for network, others in ((more, True), (PlannedUNet(2, 5, architecture), False)):
        with pytest.raises(ConfigError, match=r"checkpoint_final\.pth"):
            load_weights(plan.weights, network, other_heads=others)


# The command


def train(forks: Server, folder: Path, *options: str, ranks: int = 1, status: int = 0) -> str:
    """Run `train.py model=nnunet`; its output."""
    run = forks.start(
        "model=nnunet", "data.inputs=imagesTr", "data.labels=labelsTr/{subject}.nii.gz", "trainer.accelerator=cpu",
        "trainer.check_val_every_n_epoch=1", "data.patches_per_volume=4", "trainer.max_epochs=1", "logger=null",
        *options, cwd=folder, ranks=ranks, script="train",
    )  # fmt: skip
    assert checked(run.wait(90)) == status, run.text
    return run.text


def predict(forks: Server, folder: Path, *options: str) -> dict[str, np.ndarray]:
    """Predict imagesTr; labels by subject."""
    quiet = ("callbacks.writer.tensorboard=false", "callbacks.writer.report=false")
    done = forks.run("data.inputs=imagesTr", *quiet, *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    out = folder / next(text.partition("=")[2] for text in options if text.startswith("output_dir="))
    return {path.name.removesuffix("_labels.nii.gz"): read(path) for path in sorted(out.glob("*_labels.nii.gz"))}


@pytest.mark.parametrize("name", ["3d", "2d"])
def test_what_is_trained_from_plans_predicts_as_nnunet_would_with_its_weights(
    name: str, tmp_path: Path, forks: Server
) -> None:
    """A checkpoint predicts with nothing but inputs what a plain nnU-Net predicts with the same weights."""
    start = []
    if name == "2d":
        plans = {**BATCH, **FLAT_OPTIONS}
        make_model(tmp_path / "model", plans, fill=balanced, inference_allowed_mirroring_axes=None)
        start = ["model.folds=[0]"]
    else:
        write_settings(tmp_path / "model", BATCH)
    write_images(tmp_path, 3, (12, 11, 7), OBLIQUE)
    text = train(forks, tmp_path, "model.folder=model", "model.optimizer.lr=0.002", "data.folds=3", *start)
    assert "from plans.json: data.patch_size=" in text
    made = predict(forks, tmp_path, "ckpt_path=outputs/checkpoints/last.ckpt", "output_dir=ours")
    assert made.keys() == {"c0", "c1", "c2"}
    state = torch.load(tmp_path / "outputs/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    weights = {key.removeprefix("net."): value for key, value in state.items() if key.startswith("net.")}
    write_checkpoint(tmp_path / "model", 0, stored(with_duplicates(weights), inference_allowed_mirroring_axes=None))
    theirs = predict(forks, tmp_path, "model=nnunet", "model.folder=model", "output_dir=theirs")
    reference = Reference(tmp_path / "model")
    found: set[int] = set()
    for subject, labels in made.items():
        np.testing.assert_array_equal(labels, theirs[subject])
        np.testing.assert_array_equal(labels, reference.predict(images(tmp_path, subject))[0])
        found |= set(labels.ravel().tolist())
    assert len(found) > 1, "a test of nothing"


def test_a_training_begins_with_a_folds_weights_and_resumes_on_several_processes(tmp_path: Path, forks: Server) -> None:
    """With a learning rate of 0 they stay as they are; the same command goes on from a checkpoint."""
    make_model(tmp_path / "model", BATCH, folds=(0, 1), fill=balanced, inference_allowed_mirroring_axes=None)
    write_images(tmp_path, 4, (12, 11, 7), OBLIQUE)
    still = ("model.folder=model", "model.folds=1", "model.optimizer.lr=0", "data.folds=2")
    train(forks, tmp_path, *still, ranks=2)
    made = predict(forks, tmp_path, "ckpt_path=outputs/checkpoints/best.ckpt", "output_dir=ours")
    theirs = predict(forks, tmp_path, "model=nnunet", "model.folder=model", "model.folds=[1]", "output_dir=theirs")
    assert any(len(np.unique(labels)) > 1 for labels in made.values()), "a test of nothing"
    for subject, labels in theirs.items():
        np.testing.assert_array_equal(made[subject], labels)
    more = ("ckpt_path=outputs/checkpoints/last.ckpt", "trainer.max_epochs=2")
    train(forks, tmp_path, *still, *more, ranks=2)
    assert torch.load(tmp_path / "outputs/checkpoints/last.ckpt", weights_only=True)["epoch"] == 1
    plans = json.loads((tmp_path / "model/plans.json").read_text())
    plans["configurations"]["3d_fullres"]["batch_size"] = 3
    (tmp_path / "model/plans.json").write_text(json.dumps(plans))
    text = train(forks, tmp_path, *still, *more, status=2)
    assert "data.batch_size was 2 and is 3" in text


def test_each_script_has_its_own_model_of_the_name(tmp_path: Path, forks: Server) -> None:
    """predict.py is not given the one of train.py, and is told whose it is."""
    done = forks.run("model=nnunet_train", "model.folder=x", "data.inputs=x", cwd=tmp_path)
    assert done.returncode == 2
    assert "model=nnunet_train is for train.py; predict.py has auto, bundle" in done.stderr
    run = forks.start("model=nnunett", cwd=tmp_path, script="train")
    assert checked(run.wait(60)) == 2
    assert "there is no model=nnunett; there are nnunet, train. Did you mean model=nnunet?" in run.text
