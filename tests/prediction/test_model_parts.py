"""Tests several models that predict each subject in turn: what each makes alone, merged by hand, is what they write."""

import csv
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from forks import Server, checked
from monai.networks.nets import UNet
from nnunet_folders import FLAT_OPTIONS, MAIN, balanced, make_model, write_case
from synthetic import read

from voxquilt.data.formats.image_file import ImageFile
from voxquilt.data.grid_loader import make_grids
from voxquilt.data.normalisation import ZScoreNormalization
from voxquilt.data.preprocess import Preprocess
from voxquilt.prediction.datamodule import GridDataModule
from voxquilt.stitching.combination import Combination
from voxquilt.stitching.stitch import Stitch

pytestmark = pytest.mark.timeout(120)

ONE = {
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    f"{MAIN}normalization_schemes": ["ZScoreNormalization"],
    f"{MAIN}use_mask_for_norm": [False],
}
AFFINE = np.array([[-1.1, 0.2, 0, 4], [0.2, 1.2, 0, 9], [0, 0, 1.4, -7], [0, 0, 0, 1.0]])
SHAPES = {"s0": (12, 10, 14), "s1": (9, 13, 8), "s2": (6, 7, 9)}


def dataset(**labels: int) -> dict[str, object]:
    return {"channel_names": {"0": "CT"}, "labels": {"background": 0, **labels}}


def command(*options: str) -> tuple[str, ...]:
    return (
        "data.inputs=in",
        "model=nnunet",
        "callbacks.writer.tensorboard=false",
        "callbacks.writer.report=false",
        *options,
    )


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "manifest.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def labels_in(folder: Path) -> dict[str, np.ndarray]:
    return {name: read(folder / f"{name}_labels.nii.gz") for name in SHAPES}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, forks: Server) -> Path:
    """Models a (organ, lesion), b (2-D; organ, tumour) and c, which takes 0 to 255 only, and what each makes alone."""
    folder = tmp_path_factory.mktemp("parts")
    make_model(folder / "a", ONE, dataset(organ=1, lesion=2), fill=balanced, inference_allowed_mirroring_axes=(1,))
    make_model(
        folder / "b", {**FLAT_OPTIONS, **ONE}, dataset(organ=1, tumour=2),
        fill=lambda network, _: balanced(network, 3), inference_allowed_mirroring_axes=None,
    )  # fmt: skip
    make_model(folder / "two", fill=balanced)
    rgb = {**ONE, f"{MAIN}normalization_schemes": ["RGBTo01Normalization"]}
    make_model(folder / "c", rgb, dataset(vessel=1), fill=balanced, inference_allowed_mirroring_axes=None)
    for n, (name, shape) in enumerate(SHAPES.items()):
        (path,) = write_case(folder / "in", name, shape, AFFINE, seed=n)
        if name != "s1":
            image = nib.load(path)
            nib.save(nib.Nifti1Image(np.asarray(image.dataobj).clip(0, 255), image.affine), path)
    for model in "ab":
        options = (f"model.folder={model}", f"output_dir=alone_{model}", "stitch.products=[labels,probabilities]")
        done = forks.run(*command(*options), cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def merged(place: Path, tables: Mapping[str, Mapping[int, int]]) -> dict[str, np.ndarray]:
    """The labels of the models alone, each by its numbers, later ones over earlier ones."""
    result = {name: np.zeros(shape, np.uint8) for name, shape in SHAPES.items()}
    for model, table in tables.items():
        for name, labels in labels_in(place / f"alone_{model}").items():
            for own, number in table.items():
                if number:
                    result[name][labels == own] = number
    return result


def assert_written(folder: Path, wanted: Mapping[str, np.ndarray]) -> None:
    for name, labels in labels_in(folder).items():
        assert len(np.unique(wanted[name])) > 1, "a test of nothing"
        np.testing.assert_array_equal(labels, wanted[name], err_msg=name)


@pytest.mark.parametrize(
    ("parts", "options", "tables", "names"),
    [
        (
            "[{folder: a}, {folder: b}]", (), {"a": {1: 1, 2: 2}, "b": {1: 1, 2: 3}},
            {0: "background", 1: "organ", 2: "lesion", 3: "tumour"},
        ),
        (
            "[{folder: b}, {folder: a}]", (), {"b": {1: 1, 2: 2}, "a": {1: 1, 2: 3}},
            {0: "background", 1: "organ", 2: "tumour", 3: "lesion"},
        ),
        (
            "[{folder: a, labels: {1: 7, lesion: 2}}, {folder: b, labels: {tumour: 7}}]", (),
            {"a": {1: 7, 2: 2}, "b": {2: 7}}, {0: "background", 2: "lesion", 7: "organ"},
        ),
        (
            "[{folder: a, labels: {1: 0, 2: 300}}, {folder: b, labels: {1: 4}}]", (), {"a": {2: 300}, "b": {1: 4}},
            {0: "background", 4: "organ", 300: "lesion"},
        ),
        (
            "[{folder: a}, {folder: b}]", ("stitch.classes=[organ,tumour]",), {"a": {1: 1}, "b": {1: 1, 2: 3}},
            {0: "background", 1: "organ", 3: "tumour"},
        ),
    ],
)  # fmt: skip
def test_parts_are_merged_in_order(
    parts: str, options: tuple[str, ...], tables: Mapping[str, Mapping[int, int]], names: Mapping[int, str],
    place: Path, forks: Server, tmp_path: Path,
) -> None:  # fmt: skip
    """By names, by the user's numbers, and by those of them that are wanted; with the names in the run's record."""
    done = forks.run(*command(f"model.parts={parts}", f"output_dir={tmp_path}", *options), cwd=place)
    assert done.returncode == 0, done.stderr + done.stdout
    wanted = {name: np.zeros(shape, np.uint16) for name, shape in SHAPES.items()}
    for model, table in tables.items():
        for name, labels in labels_in(place / f"alone_{model}").items():
            for own, number in table.items():
                wanted[name][labels == own] = number
    assert_written(tmp_path, wanted)
    assert [row["status"] for row in rows(tmp_path)] == ["done"] * 3
    alone = {n: {r["subject"]: int(r["patches"]) for r in rows(place / f"alone_{n}")} for n in "ab"}
    for row in rows(tmp_path):
        assert int(row["patches"]) == sum(alone[model][row["subject"]] for model in tables)
    kept = nib.load(tmp_path / "s0_labels.nii.gz").header.extensions
    text = " ".join(str(extension.get_content()) for extension in kept)
    assert all(name in text for number, name in names.items() if number), text


def test_a_part_is_postprocessed_as_it_is_alone(place: Path, forks: Server, tmp_path: Path) -> None:
    """By the largest components that its own folder names, before its labels are numbered."""
    content = {
        "postprocessing_fns": ["remove_all_but_largest_component_from_segmentation"] * 2,
        "postprocessing_kwargs": [{"labels_or_regions": [1]}, {"labels_or_regions": [2]}],
    }
    shutil.copytree(place / "a", tmp_path / "a")
    (tmp_path / "a/postprocessing.json").write_text(json.dumps(content))
    alone = (f"model.folder={tmp_path / 'a'}", "model.postprocess=true", f"output_dir={tmp_path / 'alone'}")
    parts = f"model.parts=[{{folder: {tmp_path / 'a'}, postprocess: true, labels: {{1: 4, 2: 6}}}}]"
    for options in (alone, (parts, f"output_dir={tmp_path / 'out'}")):
        done = forks.run(*command(*options), cwd=place)
        assert done.returncode == 0, done.stderr
    kept = labels_in(tmp_path / "alone")
    assert any((labels != kept[name]).any() for name, labels in labels_in(place / "alone_a").items()), (
        "a test of nothing"
    )
    for name, labels in labels_in(tmp_path / "out").items():
        np.testing.assert_array_equal(labels, np.array([0, 4, 6])[kept[name]])


def test_a_model_without_wanted_classes_is_not_run(place: Path, forks: Server, tmp_path: Path) -> None:
    """Its patches are not counted, and its weights not even read."""
    options = ("model.parts=[{folder: a}, {folder: b}]", "stitch.classes=[tumour]", f"output_dir={tmp_path}")
    done = forks.run(*command(*options), cwd=place)
    assert done.returncode == 0, done.stderr
    assert_written(tmp_path, merged(place, {"b": {2: 3}}))
    alone = {row["subject"]: row["patches"] for row in rows(place / "alone_b")}
    assert {row["subject"]: row["patches"] for row in rows(tmp_path)} == alone


def test_probabilities_of_a_2d_and_a_3d_model_are_averaged(place: Path, forks: Server, tmp_path: Path) -> None:
    """In native space, before labels are made of them."""
    options = ("stitch.combine=mean", "stitch.products=[labels,probabilities,entropy]", f"output_dir={tmp_path}")
    done = forks.run(*command("model.parts=[{folder: a}, {folder: b}]", *options), cwd=place)
    assert done.returncode == 0, done.stderr
    for name in SHAPES:
        both = [read(place / f"alone_{model}/{name}_probabilities.nii.gz") for model in "ab"]
        mean = (both[0] + both[1]) / 2
        np.testing.assert_allclose(read(tmp_path / f"{name}_probabilities.nii.gz"), mean, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(read(tmp_path / f"{name}_labels.nii.gz"), mean.argmax(-1))
        entropy = -(mean * np.log(mean.clip(1e-30))).sum(-1)
        made = read(tmp_path / f"{name}_entropy.nii.gz")
        ratio = entropy.max() / made.max()  # in the project's unit
        np.testing.assert_allclose(made * ratio, entropy, rtol=0, atol=1e-4)


@pytest.mark.parametrize("distribute", ["slab", "subject"])
@pytest.mark.parametrize("combine", ["ordered", "mean"])
def test_two_processes_write_what_one_does(
    distribute: str, combine: str, place: Path, forks: Server, tmp_path: Path
) -> None:
    """Law 4, for models of patches of their own."""
    options = (f"output_dir={tmp_path}", f"run.distribute={distribute}", f"stitch.combine={combine}")
    job = forks.start(*command("model.parts=[{folder: a}, {folder: b}]", *options), cwd=place, ranks=2)
    assert checked(job.wait(90)) == 0, job.text
    if combine == "ordered":
        assert_written(tmp_path, merged(place, {"a": {1: 1, 2: 2}, "b": {1: 1, 2: 3}}))
        return
    for name, labels in labels_in(tmp_path).items():
        both = [read(place / f"alone_{model}/{name}_probabilities.nii.gz") for model in "ab"]
        np.testing.assert_array_equal(labels, (both[0] + both[1]).argmax(-1))


@pytest.mark.parametrize("distribute", ["", "slab"])
def test_a_subject_on_which_one_model_fails_fails_once_and_alone(
    distribute: str, place: Path, forks: Server, tmp_path: Path
) -> None:
    """Whether it is the first, in the middle or the last: no file of the subject, and one row."""
    for order in ("cab", "acb", "abc") if not distribute else ("acb",):
        out = tmp_path / order
        parts = f"model.parts=[{', '.join(f'{{folder: {model}}}' for model in order)}]"
        options = (f"output_dir={out}", *([f"run.distribute={distribute}"] if distribute else []))
        job = forks.start(*command(parts, *options), cwd=place, ranks=2 if distribute else 1)
        assert checked(job.wait(90)) == 1, job.text
        found = {row["subject"]: row for row in rows(out)}
        assert len(rows(out)) == 3
        assert {name: row["status"] for name, row in found.items()} == {"s0": "done", "s1": "failed", "s2": "done"}
        assert "RGBTo01Normalization wants intensities from 0 to 255" in found["s1"]["error"]
        assert not list(out.glob("s1_*"))


def test_a_run_of_parts_has_one_row_and_fingerprint_and_resumes(place: Path, forks: Server, tmp_path: Path) -> None:
    """What is done is skipped; another number of a label is another run."""
    options = command("model.parts=[{folder: a}, {folder: b}]", f"output_dir={tmp_path}")
    assert forks.run(*options, cwd=place).returncode == 0
    first = rows(tmp_path)
    assert len({row["fingerprint"].partition("-")[0] for row in first}) == 1
    (tmp_path / "s1_labels.nii.gz").unlink()
    before = (tmp_path / "s0_labels.nii.gz").stat().st_mtime_ns
    done = forks.run(*options, cwd=place)
    assert done.returncode == 0, done.stderr
    assert {row["subject"]: row["status"] for row in rows(tmp_path)} == {"s0": "skipped", "s1": "done", "s2": "skipped"}
    assert (tmp_path / "s0_labels.nii.gz").stat().st_mtime_ns == before
    assert_written(tmp_path, merged(place, {"a": {1: 1, 2: 2}, "b": {1: 1, 2: 3}}))
    for parts in ("[{folder: a}, {folder: b, labels: {1: 1, 2: 4}}]", "[{folder: a, flips: []}, {folder: b}]"):
        done = forks.run(*command(f"model.parts={parts}", f"output_dir={tmp_path}"), cwd=place)
        assert done.returncode == 2, done.stdout
        assert "run.overwrite=true" in done.stderr


def test_a_file_is_read_once_for_all_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they share a model space or not."""
    for n, shape in enumerate(((9, 8, 7), (6, 7, 8))):
        write_case(tmp_path, f"s{n}", shape, AFFINE, seed=n)
    read_files: list[Path] = []
    original = ImageFile.read

    def counted(file: ImageFile) -> object:
        read_files.append(file.path)
        return original(file)

    monkeypatch.setattr(ImageFile, "read", counted)
    one = Preprocess(None, 1.5, [ZScoreNormalization()], crop="nonzero")
    other = Preprocess("RAS", 2.0, interpolation=3)
    models = [make_grids(preprocess, 4) for preprocess in (other, one, other)]
    data = GridDataModule(tmp_path, 4, preprocess=one, more_models=models, batch_size=2, num_workers=0)
    data.setup("predict")
    seen = {(rows.work.task.case.subject, batch.model) for batch in data.predict_dataloader() for rows in batch.rows}
    assert seen == {(f"s{n}_0000", model) for n in range(2) for model in range(4)}
    assert sorted(path.name for path in read_files) == ["s0_0000.nii.gz", "s1_0000.nii.gz"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            "[{folder: a, ckpt_path: w.pt}]",
            "model.parts[0]: a model has a folder (of nnU-Net), a bundle (of MONAI) or a ckpt_path; this one",
        ),
        (
            "[{folder: a}, {flips: []}]",
            "model.parts[1]: a model has a folder (of nnU-Net), a bundle (of MONAI) or a ckpt_path; this one has",
        ),
        ("[{folder: a, fold: 1}]", "model.parts[0]: a model has no key fold. Did you mean folds?"),
        ("[{folder: a, labels: {lesoin: 1}}]", "model.parts[0].labels names 'lesoin'; its labels are"),
        ("[{folder: a, labels: {5: 1}}]", "model.parts[0].labels names 5; its labels are"),
        ("[{folder: a, labels: [1, 2]}]", "model.parts[0]: labels is a mapping from labels or their names to numbers"),
        ("[{folder: a, labels: {1: -1}}]", "model.parts[0]: labels is a mapping from labels or their names to numbers"),
        ("[{folder: a}, {folder: x}]", "model.parts[1]: x is not there; wanted is a model folder of nnU-Net."),
        ("[{folder: a, labels: {1: 0}}]", "no model has a label that is to be written"),
        (
            "[{folder: a}, {folder: two}]",
            "images per subject: model.parts[1] takes 2 (CT, T2), and model.parts[0] takes 1 (CT). Models of one run",
        ),
        ("[]", "model.parts is a list of models, each with its folder, bundle or ckpt_path"),
        ("[a, b]", "model.parts is a list of models, each with its folder, bundle or ckpt_path"),
    ],
)
def test_wrong_parts_are_refused_before_anything_starts(
    parts: str, message: str, place: Path, forks: Server, tmp_path: Path
) -> None:
    """One message with the part's number, and exit status 2."""
    done = forks.run(*command(f"model.parts={parts}", f"output_dir={tmp_path / 'out'}"), cwd=place)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("stitch.classes=[tumor]", "stitch.classes names 'tumor'; the labels are background, organ, lesion, tumour."),
        ("stitch.classes=[background]", "no model has a label that is to be written: see stitch.classes"),
        ("stitch.classes=tumour", "stitch.classes is a list, such as '[liver,spleen]'; it is 'tumour'."),
        ("model.folder=a", "model.folder=a: the folders of several models are those in model.parts."),
        ("stitch.products=[entropy]", "stitch.combine=ordered makes labels; stitch.products is ['entropy']."),
        ("stitch.combine=max", "stitch.combine must be one of ordered, mean; it is 'max'."),
        ("data.within={folder: b, klasses: [1]}", "data.within is a mask's path, or a model"),
        ("data.within={folder: b, ckpt_path: w.pt}", "data.within is a mask's path, or a model"),
        ("data.within=masks/s0.nii.gz", "data.within is a mask's path with {subject}, or a model whose labels are one"),
    ],
)
def test_wrong_settings_of_several_models_are_refused(
    option: str, message: str, place: Path, forks: Server, tmp_path: Path
) -> None:
    """One message, and exit status 2."""
    options = ("model.parts=[{folder: a}, {folder: b}]", f"output_dir={tmp_path / 'out'}", option)
    done = forks.run(*command(*options), cwd=place)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert message in done.stderr


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            "[{folder: a}, {folder: c}]",
            "stitch.combine=mean: model.parts[1] has the classes background, vessel, and model.parts[0] background, "
            "organ, lesion. Averaged are probabilities of the same classes.",
        ),
        ("[{folder: a, labels: {1: 5}}, {folder: b}]", "model.parts[0].labels goes with stitch.combine=ordered"),
    ],
)
def test_only_models_with_the_same_classes_are_averaged(
    parts: str, message: str, place: Path, forks: Server, tmp_path: Path
) -> None:
    """Others would fail subject after subject, once predicted; labels of a part would be ignored."""
    options = (f"model.parts={parts}", "stitch.combine=mean", f"output_dir={tmp_path / 'out'}")
    done = forks.run(*command(*options), cwd=place)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert message in done.stderr


def test_products_that_means_do_not_have_are_refused_before_anything_starts(
    place: Path, forks: Server, tmp_path: Path
) -> None:
    """Not subject after subject, once all models have predicted it."""
    options = ("model.parts=[{folder: a}, {folder: b}]", "stitch.combine=mean", f"output_dir={tmp_path / 'out'}")
    done = forks.run(*command(*options, "stitch.products=[labels,disagreement]"), cwd=place)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert "stitch.combine=mean averages probabilities, of which disagreement cannot be made." in done.stderr


def test_labels_without_a_number_are_left_out_of_models_that_name_no_classes() -> None:
    """Which labels a subject has does not decide whether it fails."""
    combined = Combination(Stitch(), (Stitch(),), numbers=((0, 5),)).begin()
    combined.add(0, {"labels": np.array([0, 1, 2, 3], np.uint8).reshape(1, 1, 2, 2)})
    volumes = combined.finish()
    assert volumes["labels"].array.ravel().tolist() == [0, 5, 0, 0]


def test_a_rough_model_gives_the_box_in_one_command(place: Path, forks: Server, tmp_path: Path) -> None:
    """The files are those of two commands; what was said of the model is not said of the rough one."""
    rough, own = tmp_path / "rough", ("model.folder=a", "data.margin=1", "model.flips=[]")
    done = forks.run(*command("model.folder=b", "stitch.classes=[tumour]", f"output_dir={rough}"), cwd=place)
    assert done.returncode == 0, done.stderr
    within = f"data.within='{rough}/{{subject}}_labels.nii.gz'"
    done = forks.run(*command(*own, within, f"output_dir={tmp_path / 'two'}"), cwd=place)
    assert done.returncode == 0, done.stderr
    within = "data.within={folder: b, classes: [tumour]}"
    done = forks.run(*command(*own, within, f"output_dir={tmp_path / 'one'}"), cwd=place)
    assert done.returncode == 0, done.stderr
    for name, labels in labels_in(tmp_path / "two").items():
        np.testing.assert_array_equal(read(tmp_path / f"one/{name}_labels.nii.gz"), labels)
        np.testing.assert_array_equal(
            read(tmp_path / f"one/within/{name}_labels.nii.gz"), read(rough / f"{name}_labels.nii.gz")
        )
    record = json.loads((tmp_path / "one/run.json").read_text())
    assert record


def test_checkpoints_among_several_models_bring_their_settings_but_no_foreign_classes(
    place: Path, forks: Server, tmp_path: Path
) -> None:
    """As a checkpoint alone: its settings are used, and a class that is not allowed is refused, unimported."""
    grid = {"patch_size": 8, "patch_overlap": 4}
    for name, target in (("good", "monai.networks.nets.UNet"), ("bad", "nnunet_folders.Evil")):
        net = {"_target_": target, "spatial_dims": 3, "in_channels": 1, "out_channels": 2}
        net |= {"channels": [2, 2], "strides": [2]}
        settings = {
            "format": 1, "images": ["image"], "data": grid, "preprocess": {}, "model": {"net": net},
            "stitch": {"class_names": ["background", "bone"]},
        }  # fmt: skip
        weights = {f"net.{key}": tensor for key, tensor in UNet(3, 1, 2, (2, 2), (2,)).state_dict().items()}
        torch.save({"state_dict": weights, "voxquilt": settings}, tmp_path / f"{name}.ckpt")
    texts = []
    for name, status in (("bad", 2), ("good", 0)):
        parts = f"model.parts=[{{folder: a}}, {{ckpt_path: {tmp_path / name}.ckpt}}]"
        done = forks.run(*command(parts, f"output_dir={tmp_path / 'out'}"), cwd=place)
        assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
        texts.append(done.stderr)
    assert "the checkpoint names nnunet_folders.Evil" in texts[0]
    names = json.loads((tmp_path / "out/run.json").read_text())["configuration"]["stitch"]["class_names"]
    assert names == ["background", "organ", "lesion", "bone"]
