"""Tests bundles of MONAI among several models: what each makes alone, merged by hand, is what they write together."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bundles import ARGMAX, INVERT, SAVE, SOFTMAX, make_bundle, make_image, state, transforms, zipped
from forks import Server, checked
from nnunet_folders import MAIN, balanced, make_model
from synthetic import read

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:.*Orientationd.*labels:FutureWarning"),
]

SIGMOID = {"_target_": "Activationsd", "keys": "pred", "sigmoid": True}
ABOVE = {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5}
LARGEST = {"_target_": "KeepLargestConnectedComponentd", "keys": "pred", "applied_labels": [1, 2]}
PLANS = {
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    f"{MAIN}normalization_schemes": ["ZScoreNormalization"],
    f"{MAIN}use_mask_for_norm": [False],
}
SUBJECTS = {
    "s0": {"spacing": (1.1, 0.9, 1.3), "angle": 0.3, "shape": (20, 18, 17)},
    "s1": {"spacing": (1.5, 1.2, 2), "codes": "LPS", "shape": (15, 16, 11)},
}
MODELS = {"a": "{folder: a}", "b": "{bundle: b}"}


def command(*options: str) -> tuple[str, ...]:
    return (
        "data.inputs=in", "callbacks.writer.tensorboard=false", "callbacks.writer.report=false", "run.log=plain",
        *options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, forks: Server) -> Path:
    """Models, and what each makes alone: an nnU-Net a, bundles b, c (zip, post-processed) and d (one mask)."""
    folder = tmp_path_factory.mktemp("bundle parts")
    dataset = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1, "lesion": 2}}
    make_model(folder / "a", PLANS, dataset, fill=balanced, inference_allowed_mirroring_axes=None)
    make_bundle(folder / "b")
    steps = transforms("postprocessing", SOFTMAX, INVERT, ARGMAX, LARGEST, SAVE)
    bundle = make_bundle(folder / "c", {**steps, "inferer.mode": "gaussian"}, state(num_res_units=1, in_channels=1))
    zipped(bundle, folder / "c.zip")
    steps = transforms("postprocessing", SIGMOID, INVERT, ABOVE, SAVE)
    make_bundle(folder / "d", {**steps, "network_def.out_channels": 1}, state(out_channels=1))
    for n, (name, options) in enumerate(SUBJECTS.items()):
        make_image(folder / f"in/{name}_0000.nii.gz", seed=n, **options)
    alone = {"a": ("model=nnunet", "model.folder=a"), "b": ("model=bundle", "model.folder=b")}
    alone |= {"c": ("model=bundle", "model.folder=c.zip"), "d": ("model=bundle", "model.folder=d")}
    for name, own in alone.items():
        products = "[labels]" if name in "cd" else "[labels,probabilities]"
        options = (f"output_dir=alone_{name}", f"stitch.products={products}", "data.suffixes={image: _0000}")
        done = forks.run(*command(*own, *options), cwd=folder, env={"VOXQUILT_CACHE": str(folder / "cache")})
        assert done.returncode == 0, done.stderr
    return folder


def together(forks: Server, place: Path, parts: str, *options: str, status: int = 0, ranks: int = 1) -> str:
    """Predict with several models; `parts` has their letters, or is the whole list."""
    listed = parts if parts.startswith("[") else f"[{', '.join(MODELS[model] for model in parts)}]"
    given = command("model=nnunet", f"model.parts={listed}", *options)
    job = forks.start(*given, cwd=place, ranks=ranks, env={"VOXQUILT_CACHE": str(place / "cache")})
    assert checked(job.wait(90)) == status, job.text
    assert "Traceback" not in job.text
    return job.text


def merged(place: Path, tables: Mapping[str, Mapping[int, int]]) -> dict[str, np.ndarray]:
    """Labels of the models alone, each by its numbers, later ones over earlier ones."""
    result = {}
    for name in SUBJECTS:
        whole = np.zeros(nib.load(place / f"in/{name}_0000.nii.gz").shape, np.uint16)
        for model, table in tables.items():
            labels = read(place / f"alone_{model}/{name}_labels.nii.gz")
            for own, number in table.items():
                whole[labels == own] = number
        assert len(np.unique(whole)) == len({n for table in tables.values() for n in table.values()}) + 1
        result[name] = whole
    return result


def assert_written(folder: Path, wanted: Mapping[str, np.ndarray]) -> None:
    for name, labels in wanted.items():
        np.testing.assert_array_equal(read(folder / f"{name}_labels.nii.gz"), labels, err_msg=name)


@pytest.mark.parametrize(
    ("parts", "tables"),
    [
        ("ab", {"a": {1: 1, 2: 2}, "b": {1: 1, 2: 2}}),
        ("ba", {"b": {1: 1, 2: 2}, "a": {1: 1, 2: 2}}),
        (
            "[{bundle: b, labels: {organ: 7}}, {folder: a, labels: {2: 3}}, {bundle: c.zip, labels: {2: 4}}]",
            {"b": {1: 7}, "a": {2: 3}, "c": {2: 4}},
        ),
        ("[{folder: a}, {bundle: d, labels: {1: 9}}]", {"a": {1: 1, 2: 2}, "d": {1: 9}}),
    ],
)
def test_bundles_are_merged_with_other_models_in_order(
    parts: str, tables: Mapping[str, Mapping[int, int]], place: Path, forks: Server, tmp_path: Path
) -> None:
    """Whichever comes first, out of zips, with post-processing of their own, with one mask; one row per subject."""
    together(forks, place, parts, f"output_dir={tmp_path}")
    assert_written(tmp_path, merged(place, tables))
    with open(tmp_path / "manifest.csv", newline="", encoding="utf-8") as file:
        assert [(row["subject"], row["status"]) for row in csv.DictReader(file)] == [("s0", "done"), ("s1", "done")]


def test_probabilities_of_a_bundle_and_another_model_are_averaged(place: Path, forks: Server, tmp_path: Path) -> None:
    """In native space, each brought there as it is alone."""
    together(
        forks, place, "ba", "stitch.combine=mean", "stitch.products=[labels,probabilities]", f"output_dir={tmp_path}"
    )
    for name in SUBJECTS:
        mean = sum(read(place / f"alone_{model}/{name}_probabilities.nii.gz") for model in "ab") / 2
        np.testing.assert_allclose(read(tmp_path / f"{name}_probabilities.nii.gz"), mean, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(read(tmp_path / f"{name}_labels.nii.gz"), mean.argmax(-1))


def test_a_bundle_may_give_the_box(place: Path, forks: Server, tmp_path: Path) -> None:
    """Its labels are predicted before, and the files are those with them as masks."""
    within = "data.within={bundle: d, classes: [1]}"
    files = f"data.within='{place}/alone_d/{{subject}}_labels.nii.gz'"
    for name, own in (("one", within), ("two", files)):
        options = ("model=nnunet", "model.folder=a", own, f"output_dir={tmp_path}/{name}", "data.suffixes={CT: _0000}")
        done = forks.run(*command(*options), cwd=place)
        assert done.returncode == 0, done.stderr
    assert_written(tmp_path / "one", {name: read(tmp_path / f"two/{name}_labels.nii.gz") for name in SUBJECTS})


def test_two_processes_write_slabs_of_both(place: Path, forks: Server, tmp_path: Path) -> None:
    """Law 4."""
    together(forks, place, "ab", "run.distribute=slab", f"output_dir={tmp_path}", ranks=2)
    assert_written(tmp_path, merged(place, {"a": {1: 1, 2: 2}, "b": {1: 1, 2: 2}}))


def test_a_run_with_a_bundle_resumes_and_knows_another_bundle(place: Path, forks: Server, tmp_path: Path) -> None:
    """What is done is skipped; other settings in the bundle's file are another run. The plan counts both models."""
    parts = f"[{{folder: a}}, {{bundle: {make_bundle(tmp_path / 'own')}}}]"
    assert "patches" in together(forks, place, parts, f"output_dir={tmp_path}/out", "run.dry_run=true")
    together(forks, place, parts, f"output_dir={tmp_path}/out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*_labels.nii.gz")}
    together(forks, place, parts, f"output_dir={tmp_path}/out")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(before) == 2
    config = json.loads((tmp_path / "own/configs/inference.json").read_text())
    config["inferer"]["overlap"] = 0.25
    (tmp_path / "own/configs/inference.json").write_text(json.dumps(config))
    assert "run.overwrite=true" in together(forks, place, parts, f"output_dir={tmp_path}/out", status=2)


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ("[{folder: a}, {folder: b}]", (), "model.parts[1]: b is a bundle of MONAI: say {bundle: b}."),
        ("[{folder: a}, {bundle: a}]", (), "model.parts[1]: a is not a MONAI bundle: it has no folder configs."),
        ("[{folder: a}, {bundle: x}]", (), "model.parts[1]: x is not there; wanted is the folder of a MONAI bundle"),
        ("[{bundle: b, folder: a}]", (), "model.parts[0]: a model has a folder (of nnU-Net), a bundle (of MONAI) or"),
        ("[{bundle: b, folds: [0]}]", (), "model.parts[0]: a model has no key folds."),
        ("[{bundle: b, labels: {organ: 1, lesoin: 2}}]", (), "Did you mean lesion?"),
        ("[{bundle: b, checkpoint: x.pt}]", (), "b/models has no x.pt; there are model.pt."),
        ("[{bundle: b, trust_bundle: 1}]", (), "model.parts[0]: model.trust_bundle must be true or false; it is 1."),
        ("[{folder: a}, {bundle: d}]", (), "model.parts[1] has no names of classes: give labels, such as {1: 5}."),
        ("[{bundle: masks}]", (), "model.parts[0]: its 3 outputs are masks that may overlap (sigmoid)"),
        ("[{folder: a}, {bundle: early}]", ("stitch.combine=mean",), "it brings labels to the file's grid"),
        ("[{folder: a}, {bundle: unknown}]", (), "postprocessing#transforms#0"),
        ("[{folder: a}, {bundle: evil}]", (), "network_def"),
    ],
)
def test_what_cannot_be_a_part_is_refused_by_name_before_anything_starts(
    parts: str, options: tuple[str, ...], message: str, place: Path, forks: Server, tmp_path: Path
) -> None:
    """One message with the part's number, exit status 2, and nothing is evaluated."""
    if not (place / "masks").exists():
        make_bundle(place / "masks", transforms("postprocessing", SIGMOID, INVERT, ABOVE, SAVE))
        nearest = {**INVERT, "nearest_interp": True}
        make_bundle(place / "early", transforms("postprocessing", SOFTMAX, ARGMAX, nearest, SAVE))
        make_bundle(place / "unknown", transforms("postprocessing", {"_target_": "Lambdad", "keys": "pred"}, SAVE))
        make_bundle(place / "evil", {"network_def": f"$__import__('pathlib').Path('{place}/run').touch()"})
    text = together(forks, place, parts, *options, f"output_dir={tmp_path / 'out'}", status=2)
    assert message in text
    assert not (tmp_path / "out").exists()
    assert not (place / "run").exists()


def test_what_is_said_of_all_models_is_not_the_name_of_a_bundles_weights(
    place: Path, forks: Server, tmp_path: Path
) -> None:
    """`model.checkpoint` is that of nnU-Net's folds."""
    (place / "a/fold_0/checkpoint_best.pth").write_bytes((place / "a/fold_0/checkpoint_final.pth").read_bytes())
    together(forks, place, "ab", "model.checkpoint=checkpoint_best.pth", f"output_dir={tmp_path}")
    assert_written(tmp_path, merged(place, {"a": {1: 1, 2: 2}, "b": {1: 1, 2: 2}}))


def test_a_class_of_a_bundle_that_is_not_allowed_is_refused_beside_another_model(
    place: Path, forks: Server, tmp_path: Path
) -> None:
    """Unless the bundle is trusted, by a key of its part."""
    bundle = make_bundle(tmp_path / "own", {"network_def._target_": "os.system"})
    text = together(forks, place, f"[{{folder: a}}, {{bundle: {bundle}}}]", f"output_dir={tmp_path}/out", status=2)
    assert "model.parts[1]" in text
    assert "os.system" in text
