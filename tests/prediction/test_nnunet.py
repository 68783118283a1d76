"""Tests that `predict.py model=nnunet` predicts as nnU-Net: labels equal those of a plain reference at every voxel."""

import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from forks import Server, checked
from nnunet_folders import (
    FLAT_OPTIONS,
    MAIN,
    MISSING,
    NAME,
    OLD_PLANS,
    RESIDUAL_OPTIONS,
    balanced,
    export,
    make_model,
    write_case,
)
from nnunet_reference import Reference
from scipy import ndimage
from synthetic import read, run, save

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
    "not mirrored": Case(CT, ONE, ((14, 11, 12),), PERMUTED, channels=1, mirror=False, options=("model.flips=[]",)),
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
        "callbacks.writer.tensorboard=false", "callbacks.writer.report=false", *options,
    )  # fmt: skip


def images(folder: Path, subject: str) -> list[Path]:
    return sorted((folder / "in").glob(f"{subject}_????.nii*"))


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with open(folder / "manifest.csv", newline="", encoding="utf-8") as file:
        return {row["subject"]: row for row in csv.DictReader(file)}


def assert_equal(
    folder: Path,
    subjects: Sequence[str],
    reference: Reference,
    out: str = "outputs",
    *,
    previous: str = "",
    **given: Any,
) -> None:
    """Labels at every voxel, and probabilities up to rounding; several labels occur."""
    found: list[int] = []
    for subject in subjects:
        stage = folder / previous / f"{subject}_labels.nii.gz" if previous else None
        labels, probabilities = reference.predict(images(folder, subject), previous=stage, **given)
        found += labels.ravel().tolist()
        np.testing.assert_array_equal(read(folder / out / f"{subject}_labels.nii.gz"), labels)
        if (path := folder / out / f"{subject}_probabilities.nii.gz").exists():
            np.testing.assert_allclose(np.moveaxis(read(path), -1, 0), probabilities, rtol=0, atol=1e-4)
    shares = np.bincount(found) / len(found)
    assert (shares > 0.02).sum() > 1, f"a test of nothing: {shares}"


@pytest.mark.parametrize("name", CASES)
def test_labels_and_probabilities_are_those_of_nnunet(name: str, tmp_path: Path, forks: Server) -> None:
    """The whole command beside a plain reference that shares nothing with it but the networks."""
    case = CASES[name]
    model = make(tmp_path, case)
    done = forks.run(*command(*case.options), cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    subjects = [f"s{n}" for n in range(len(case.shapes))]
    assert_equal(tmp_path, subjects, Reference(model), mirror=case.mirror)


# One folder and three subjects of different size, for everything else.

SEVERAL = Case({**CT, **Z_SCORE}, {}, ((13, 9, 21), (5, 6, 4), (10, 19, 9)), OBLIQUE)
SUBJECTS = ("s0", "s1", "s2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, forks: Server) -> Path:
    """A folder with the model, images, and the outputs of a run in `outputs`."""
    folder = tmp_path_factory.mktemp("several")
    make(folder, SEVERAL)
    done = forks.run(*command(), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def voxels(folder: Path, product: str = "labels", ending: str = ".nii.gz") -> dict[str, np.ndarray]:
    """Every subject's volume."""
    return {name: read(folder / f"{name}_{product}{ending}") for name in SUBJECTS}


def assert_same(made: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    assert made.keys() == wanted.keys()
    for name, volume in wanted.items():
        np.testing.assert_array_equal(made[name], volume, err_msg=name)


@pytest.mark.parametrize("distribute", ["slab", "subject"])
def test_two_processes_predict_what_one_does(distribute: str, place: Path, forks: Server) -> None:
    """Law 4, also where planes come of several processes and outside of the crop."""
    options = (f"output_dir={distribute}", f"run.distribute={distribute}")
    job = forks.start(*command(*options), cwd=place, ranks=2)
    assert checked(job.wait(90)) == 0, job.text
    assert_same(voxels(place / distribute), voxels(place / "outputs"))
    for name, made in voxels(place / distribute, "probabilities").items():
        wanted = read(place / f"outputs/{name}_probabilities.nii.gz")
        np.testing.assert_allclose(made, wanted, rtol=0, atol=1e-5)


def test_a_cubic_spline_of_scores_is_refused_by_slabs_before_anything_starts(place: Path, forks: Server) -> None:
    """It needs planes of the neighbour's; `auto` deals subjects instead."""
    options = ("output_dir=spline", "stitch.order=3", "run.distribute=slab", "stitch.products=[labels]")
    job = forks.start(*command(*options), cwd=place, ranks=2)
    assert checked(job.wait(90)) == 2
    assert "stitch.order=3 goes with run.distribute=subject" in job.text
    assert not (place / "spline").exists()
    job = forks.start(*command(*options[:2], "run.distribute=auto", "shard.count=3", options[3]), cwd=place, ranks=2)
    assert checked(job.wait(90)) == 0, job.text


def test_a_run_that_was_killed_is_completed(place: Path, forks: Server) -> None:
    """What is done is not done again, and files are those of a run that was not killed."""
    last = sum(int(row["patches"]) for row in rows(place / "outputs").values()) - 1
    fault = (
        "+callbacks.fault._target_=synthetic.Fault",
        "+callbacks.fault.action=kill",
        f"+callbacks.fault.batch={last}",
    )
    options = ("output_dir=killed", "data.batch_size=1")
    job = forks.start(*command(*options, *fault), cwd=place)
    assert job.wait(90) == [-9]
    listed = rows(place / "killed") if (place / "killed/manifest.csv").exists() else {}
    before = {path: path.stat().st_mtime_ns for name in listed for path in (place / "killed").glob(f"{name}_*.gz")}
    assert len(listed) < len(SUBJECTS)
    done = forks.run(*command(*options), cwd=place)
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert_same(voxels(place / "killed"), voxels(place / "outputs"))


def test_the_batch_size_and_the_ending_of_files_change_nothing(place: Path, forks: Server, tmp_path: Path) -> None:
    """Batches of several subjects; .nii in and out."""
    for path in (place / "in").iterdir():
        image = nib.load(path)
        nib.save(image, tmp_path / path.name.removesuffix(".gz"))
    options = (f"data.inputs={tmp_path}", "output_dir=plain", "data.batch_size=3", "callbacks.writer.compress=false")
    done = forks.run(*command(*options), cwd=place)
    assert done.returncode == 0, done.stderr
    assert_same(voxels(place / "plain", ending=".nii"), voxels(place / "outputs"))


def test_an_exported_zip_predicts_as_its_folder(place: Path, forks: Server, tmp_path: Path) -> None:
    """It is unpacked into the cache, and its outputs count as those of the folder."""
    export(tmp_path / "model.zip", place / NAME, f"Dataset001_Test/{NAME}")
    before = (place / "outputs/s0_labels.nii.gz").stat().st_mtime_ns
    done = forks.run(
        *command(f"model.folder={tmp_path / 'model.zip'}"), cwd=place, env={"VOXQUILT_CACHE": str(tmp_path / "cache")}
    )
    assert done.returncode == 0, done.stderr
    assert {row["status"] for row in rows(place / "outputs").values()} == {"skipped"}
    assert (place / "outputs/s0_labels.nii.gz").stat().st_mtime_ns == before
    assert list((tmp_path / "cache").rglob("plans.json"))


def test_postprocessing_keeps_the_largest_components_of_the_folder(place: Path, forks: Server) -> None:
    """Of each step's labels, as scipy finds components."""
    steps = [{"labels_or_regions": [1, 2]}, {"labels_or_regions": [[1]]}]
    text = {"postprocessing_fns": ["remove_all_but_largest_component_from_segmentation"] * 2}
    (place / NAME / "postprocessing.json").write_text(json.dumps({**text, "postprocessing_kwargs": steps}))
    options = ("output_dir=kept", "model.postprocess=true", "stitch.products=[labels]")
    done = forks.run(*command(*options), cwd=place)
    assert done.returncode == 0, done.stderr
    changed = 0
    for name, labels in voxels(place / "outputs").items():
        wanted = labels.copy()
        for union in ((1, 2), (1,)):
            mask = np.isin(wanted, union)
            numbered, count = ndimage.label(mask, np.ones((3, 3, 3)))
            sizes = np.bincount(numbered.ravel(), minlength=count + 1)[1:]
            keeps = 1 + np.flatnonzero(sizes == sizes.max(initial=0))
            wanted[mask & ~np.isin(numbered, keeps)] = 0
        np.testing.assert_array_equal(read(place / f"kept/{name}_labels.nii.gz"), wanted)
        changed += (wanted != labels).sum()
    assert changed, "a test of nothing"


def test_a_missing_channel_fails_its_subject_alone(place: Path, forks: Server, tmp_path: Path) -> None:
    """By the file that is missing; the others are predicted."""
    for path in (place / "in").iterdir():
        if path.name != "s1_0001.nii.gz":
            shutil.copy(path, tmp_path)
    done = forks.run(*command(f"data.inputs={tmp_path}", "output_dir=missing"), cwd=place)
    assert done.returncode == 1
    assert {name: row["status"] for name, row in rows(place / "missing").items()} == {
        "s0": "done", "s1": "failed", "s2": "done",
    }  # fmt: skip
    assert rows(place / "missing")["s1"]["error"] == f"{tmp_path / 's1_0001.nii.gz'}: there is no such file."
    wanted = voxels(place / "outputs")
    for name in ("s0", "s2"):
        np.testing.assert_array_equal(read(place / f"missing/{name}_labels.nii.gz"), wanted[name])
    assert not list((place / "missing").glob("s1_*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("ckpt_path=w.pt",), "ckpt_path=w.pt: model=nnunet has its weights in model.folder"),
        (
            (f"model.folder={NAME}x",),
            f"{NAME}x is not there; wanted is a model folder of nnU-Net. Did you mean ./{NAME}?",
        ),
        (("model.folder=???",), "model.folder is the folder of a trained model"),
        ((f"model.folder={NAME}/fold_0",), f"Did you mean {NAME}?"),
        (("model.folds=[4]",), "fold 4 with checkpoint_final.pth was wanted; folds 0 with that file came."),
        (("model.previous='x/{subject}.nii.gz'",), "takes no labels of a stage before"),
        (("model.postprocess=1",), "model.postprocess must be true or false; it is 1."),
        (("data.inputs=nothing",), "there is no file or folder nothing"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(
    options: tuple[str, ...], message: str, place: Path, forks: Server
) -> None:
    """One message, exit status 2, and no folder of outputs."""
    done = forks.run(*command("output_dir=wrong", *options), cwd=place)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert message in done.stderr
    assert not (place / "wrong").exists()


def test_a_dry_run_plans_the_folder(place: Path, forks: Server) -> None:
    """Patches of the whole volumes, of which a crop leaves fewer; nothing is predicted."""
    done = forks.run(*command("output_dir=dry", "run.dry_run=true"), cwd=place)
    assert done.returncode == 0, done.stderr
    plan = json.loads((place / "dry/plan.json").read_text())
    made = rows(place / "outputs")
    assert plan["fits"]
    assert {entry["subject"] for entry in plan["per_subject"]} == set(SUBJECTS)
    assert all(entry["patches"] >= int(made[entry["subject"]]["patches"]) for entry in plan["per_subject"])
    assert not list((place / "dry").glob("*.nii.gz"))


# Cascades.

LOWRES = {
    **CT,
    "configurations.3d_fullres.previous_stage": MISSING,
    f"{MAIN}spacing": [2.5, 2.5, 2.5],
    f"{MAIN}normalization_schemes": ["ZScoreNormalization"],
}
CASCADE = {**CT, f"{MAIN}previous_stage": "3d_lowres", f"{MAIN}normalization_schemes": ["ZScoreNormalization"]}


def renamed(folder: Path, name: str) -> None:
    """Give a folder's configuration another name."""
    plans = json.loads((folder / "plans.json").read_text())
    plans["configurations"][name] = plans["configurations"].pop("3d_fullres")
    (folder / "plans.json").write_text(json.dumps(plans))
    for file in folder.glob("fold_*/*.pth"):
        content = torch.load(file, weights_only=False)
        content["init_args"]["configuration"] = name
        torch.save(content, file)


@pytest.mark.timeout(180)
def test_a_subject_that_a_stage_before_failed_on_says_which_and_why(tmp_path: Path, forks: Server) -> None:
    """In its row of the last stage, whether or not labels of an earlier run are there, which are not taken."""
    low = make_model(tmp_path / "low", LOWRES, ONE, fill=balanced)
    renamed(low, "3d_lowres")
    renamed(make_model(tmp_path / "full", CASCADE, ONE, fill=balanced), "3d_cascade_fullres")
    for n in range(2):
        write_case(tmp_path / "in", f"s{n}", (8, 9, 7), OBLIQUE, seed=n)
    good = (tmp_path / "in/s1_0000.nii.gz").read_bytes()
    image = read(tmp_path / "in/s1_0000.nii.gz").astype(np.float32)
    image[3, 3, 3] = np.nan
    save(tmp_path / "in/s1_0000.nii.gz", image, OBLIQUE)
    cascade = command("model.folder=[low,full]")
    done = run("predict.py", *cascade, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    first, last = rows(tmp_path / "outputs/3d_lowres"), rows(tmp_path / "outputs")
    wanted = "the run in outputs/3d_lowres, which was to write s1_labels.nii.gz, failed on it: "
    assert first["s1"]["error"].startswith("image 'CT' (in/s1_0000.nii.gz) has 1 voxels that are NaN")
    assert last["s1"]["error"] == wanted + first["s1"]["error"]
    assert last["s0"]["status"] == "done"

    (tmp_path / "in/s1_0000.nii.gz").write_bytes(good)
    assert run("predict.py", *cascade, cwd=tmp_path).returncode == 0
    for file in (tmp_path / "low").glob("fold_*/*.pth"):
        content = torch.load(file, weights_only=False)
        for weight in content["network_weights"].values():
            weight.fill_(torch.nan)
        torch.save(content, file)
    done = run("predict.py", *cascade, "run.overwrite=true", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    last = rows(tmp_path / "outputs")
    assert {row["status"] for row in last.values()} == {"failed"}
    assert last["s1"]["error"].startswith(wanted)
    assert last["s1"]["error"].endswith("The file that is there is older.")

    within = ("data.within={folder: low}", "model.folder=low", "output_dir=boxes")
    done = forks.run(*command(*within), cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    wanted = "the run in boxes/within, which was to write s0_labels.nii.gz, failed on it: "
    assert rows(tmp_path / "boxes")["s0"]["error"].startswith(wanted)


@pytest.mark.timeout(180)
def test_a_cascade_is_predicted_by_one_command_or_by_two(tmp_path: Path, forks: Server) -> None:
    """Both stages are those of the reference; the first writes a folder of its own."""
    low = make_model(tmp_path / "low", LOWRES, ONE, fill=balanced, inference_allowed_mirroring_axes=(0, 2))
    renamed(low, "3d_lowres")
    full = make_model(tmp_path / "full", CASCADE, ONE, fill=lambda network, _: balanced(network, 7))
    renamed(full, "3d_cascade_fullres")
    for n, shape in enumerate(((14, 12, 13), (6, 9, 7))):
        write_case(tmp_path / "in", f"s{n}", shape, OBLIQUE, seed=n)
    done = run("predict.py", *command("model.folder=[low,full]"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_equal(tmp_path, ["s0", "s1"], Reference(low), "outputs/3d_lowres")
    reference, without = Reference(full), 0
    assert_equal(tmp_path, ["s0", "s1"], reference, previous="outputs/3d_lowres")
    for name in ("s0", "s1"):
        previous = tmp_path / f"outputs/3d_lowres/{name}_labels.nii.gz"
        save(tmp_path / "none.nii.gz", np.zeros_like(read(previous)), OBLIQUE)
        other, _ = reference.predict(images(tmp_path, name), previous=tmp_path / "none.nii.gz")
        without += (other != read(tmp_path / f"outputs/{name}_labels.nii.gz")).sum()
    assert without, "the labels of the stage before do not count"
    again = command("model.folder=full", "model.previous='outputs/3d_lowres/{subject}_labels.nii.gz'", "output_dir=two")
    done = forks.run(*again, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("s0", "s1"):
        np.testing.assert_array_equal(
            read(tmp_path / f"two/{name}_labels.nii.gz"), read(tmp_path / f"outputs/{name}_labels.nii.gz")
        )
    wanted = ("stitch.classes=[lesion]", "stitch.label_values=[0,5,9]", "output_dir=some")
    done = forks.run(*command("model.folder=[low,full]", *wanted), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("s0", "s1"):  # the second stage has got all labels of the first, by their own numbers
        np.testing.assert_array_equal(
            read(tmp_path / f"some/{name}_labels.nii.gz"),
            np.where(read(tmp_path / f"outputs/{name}_labels.nii.gz") == 2, 9, 0),
        )
    done = forks.run(*command("model.folder=[low,low]", "output_dir=none"), cwd=tmp_path)
    assert done.returncode == 2
    assert "3d_lowres of low takes no labels of a stage before" in done.stderr
    assert not (tmp_path / "none").exists()
    done = forks.run(*command("model.folder=full", "output_dir=none"), cwd=tmp_path)
    assert done.returncode == 2
    assert "3d_cascade_fullres takes the labels of 3d_lowres as input. Set model.previous=" in done.stderr
    (full / "dataset.json").unlink()
    done = forks.run(*command("model.folder=[low,full]", "output_dir=broken"), cwd=tmp_path)
    assert done.returncode == 2
    assert "full has no dataset.json" in done.stderr
    assert not (tmp_path / "broken").exists(), "the first stage ran before the second was looked at"
