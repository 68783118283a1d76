"""Tests that `predict.py model=nnunet` predicts as nnU-Net: labels equal those of a plain reference at every voxel."""

import csv
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forks import Server, checked
from nnunet_folders import (
    FLAT_OPTIONS,
    MAIN,
    MISSING,
    NAME,
    OLD_PLANS,
    OPTIONS,
    RESIDUAL_OPTIONS,
    balanced,
    export,
    make_model,
    write_case,
)
from nnunet_reference import Reference
from synthetic import read, run

pytestmark = pytest.mark.timeout(120)

CT = {
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    f"{MAIN}patch_size": [8, 8, 8],
    f"{MAIN}spacing": [1.5, 1.5, 1.5],
    f"{MAIN}normalization_schemes": ["CTNormalization"],
    f"{MAIN}use_mask_for_norm": [False],
}
ONE = {"channel_names": {"0": "CT"}}
TORCH = {
    f"{MAIN}resampling_fn_{what}{ending}": value
    for what in ("data", "probabilities")
    for ending, value in (("", "resample_torch_fornnunet"), ("_kwargs", {"is_seg": False, "force_separate_z": False}))
}
TORCH_SLICES = {**TORCH, f"{MAIN}resampling_fn_data_kwargs": {}, f"{MAIN}resampling_fn_probabilities_kwargs": {}}
REGIONS = {
    "labels": {"background": 0, "whole": [1, 2, 3], "core": [1, 3], "enhancing": 3},
    "regions_class_order": [2, 1, 3],
}
Z_SCORE = {
    f"{MAIN}normalization_schemes": ["ZScoreNormalization", "ZScoreNormalization"],
    f"{MAIN}use_mask_for_norm": [False, True],
}
OBLIQUE = np.array([[1.2, 0.3, -0.2, 7], [-0.31, 1.3, 0.1, -12], [0.25, -0.05, 1.1, 5], [0, 0, 0, 1.0]])
PERMUTED = np.array([[0, 0, -4.0, 30], [0.9, 0, 0, -9], [0, -1.1, 0, 2], [0, 0, 0, 1.0]])
PLAIN = np.diag([1.0, 1.2, 0.8, 1])


@dataclass(frozen=True)
class Case:
    """A model folder, images, and options of the command."""

    plans: Mapping[str, Any] = field(default_factory=dict)
    dataset: Mapping[str, Any] = field(default_factory=dict)
    shapes: Sequence[tuple[int, int, int]] = ((13, 10, 9),)
    affine: np.ndarray = field(default_factory=lambda: PLAIN)
    folds: tuple[int, ...] = (0,)
    mirror: bool = True
    channels: int = 2
    options: tuple[str, ...] = ()
    checkpoint: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "isotropic CT, two folds": Case(CT, ONE, ((14, 11, 12),), OBLIQUE, (0, 1), channels=1),
    "mirroring left out": Case(CT, ONE, ((14, 11, 12),), PERMUTED, channels=1, mirror=False, options=("model.flips=[]",)),
    "anisotropic regions, transposed": Case(dataset=REGIONS, shapes=((13, 14, 6),), affine=np.diag([1.1, 1.2, 4, 1])),
    "anisotropic, permuted": Case({**Z_SCORE, **RESIDUAL_OPTIONS}, {}, ((9, 5, 14),), PERMUTED),
    "anisotropic, oblique, mirrored along one axis": Case(
        Z_SCORE, {}, ((10, 12, 7),), OBLIQUE, checkpoint={"inference_allowed_mirroring_axes": (1,)}
    ),
    "2d, reoriented": Case(
        {**FLAT_OPTIONS, "image_reader_writer": "NibabelIOWithReorient"}, {}, ((9, 6, 11),), PERMUTED,
        checkpoint={"inference_allowed_mirroring_axes": (0, 1)},
    ),
    "2d, in the file's axes": Case(
        FLAT_OPTIONS, {}, ((7, 13, 6),), OBLIQUE, checkpoint={"inference_allowed_mirroring_axes": None}
    ),
    "old plans": Case({**CT, **OLD_PLANS}, ONE, ((12, 9, 13),), OBLIQUE, channels=1),
    "torch resampling": Case({**CT, **TORCH}, ONE, ((12, 9, 13),), OBLIQUE, channels=1),
    "torch resampling of slices": Case(TORCH_SLICES, {}, ((11, 12, 5),), np.diag([-1.1, -1.2, 4, 1])),
    "at the file's spacing": Case(
        {
            f"{MAIN}resampling_fn_{what}{ending}": value
            for what in ("data", "seg", "probabilities")
            for ending, value in (("", "no_resampling_hack"), ("_kwargs", {}))
        },
        {}, ((9, 11, 8),),
    ),
    "smaller than a patch": Case(shapes=((5, 4, 6),), affine=OBLIQUE),
    "one slice": Case(CT, ONE, ((9, 12, 1),), np.diag([1.0, 1, 2, 1]), channels=1),
    "rescaled intensities, slices always apart": Case(
        {
            f"{MAIN}normalization_schemes": ["RescaleTo01Normalization", "NoNormalization"],
            f"{MAIN}resampling_fn_data_kwargs.force_separate_z": True,
            f"{MAIN}resampling_fn_probabilities_kwargs.force_separate_z": True,
        },
        {}, ((9, 11, 8),), np.diag([1.0, 0.9, 1.3, 1]),
    ),
    "three subjects in batches of three": Case(
        {**CT, **Z_SCORE}, {}, ((13, 9, 11), (5, 6, 4), (10, 14, 9)), OBLIQUE,
        options=("data.batch_size=3", "data.num_workers=2"), mirror=True,
    ),
}  # fmt: skip


def make(folder: Path, case: Case) -> Path:
    """Write the case's model and images; the model's folder."""
    model = make_model(folder / NAME, case.plans, case.dataset, folds=case.folds, fill=balanced, **case.checkpoint)
    for n, shape in enumerate(case.shapes):
        write_case(folder / "in", f"s{n}", shape, case.affine, case.channels, seed=n)
    return model


def command(*options: str) -> tuple[str, ...]:
    return (
        "data.inputs=in", "model=nnunet", f"model.folder={NAME}", "stitch.products=[labels,probabilities]",
        "callbacks.writer.tensorboard=false", *options,
    )  # fmt: skip


def images(folder: Path, subject: str) -> list[Path]:
    return sorted((folder / "in").glob(f"{subject}_????.nii*"))


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with open(folder / "manifest.csv", newline="", encoding="utf-8") as file:
        return {row["subject"]: row for row in csv.DictReader(file)}


def assert_equal(folder: Path, subjects: Sequence[str], reference: Reference, out: str = "outputs", **given: Any) -> None:
    """Labels at every voxel, and probabilities up to rounding; several labels occur."""
    for subject in subjects:
        labels, probabilities = reference.predict(images(folder, subject), **given)
        made = read(folder / out / f"{subject}_labels.nii.gz")
        shares = np.bincount(labels.ravel()) / labels.size
        assert (shares > 0.02).sum() > 1, f"a test of nothing: {shares}"
        np.testing.assert_array_equal(made, labels)
        if (path := folder / out / f"{subject}_probabilities.nii.gz").exists():
            np.testing.assert_allclose(np.moveaxis(read(path), -1, 0), probabilities, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_labels_and_probabilities_are_those_of_nnunet(name: str, tmp_path: Path, forks: Server) -> None:
    """The whole command beside a plain reference that shares nothing with it but the networks."""
    case = CASES[name]
    model = make(tmp_path, case)
    done = forks.run(*command(*case.options), cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    subjects = [f"s{n}" for n in range(len(case.shapes))]
    assert_equal(tmp_path, subjects, Reference(model), mirror=case.mirror)
