"""Tests files of maps: smaller types within their error, one file per class, temperature, and names for viewers."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from class_networks import Masks, Soft, Uneven
from forks import Server, checked
from hypothesis import given
from hypothesis import strategies as st
from synthetic import Over50, noise, read, save

from voxquilt.data.preprocess import Preprocess
from voxquilt.data.subject import ScalarImage, Subject
from voxquilt.errors import ConfigError, OutputError
from voxquilt.predict import predict_volume
from voxquilt.prediction.class_files import file_names
from voxquilt.reporting.colours import PALETTE, colours_of
from voxquilt.reporting.label_tables import write_label_tables
from voxquilt.stitching.combination import Combination
from voxquilt.stitching.products.disagreement import Disagreement, Moments
from voxquilt.stitching.stitch import Stitch

pytestmark = pytest.mark.timeout(120)
AFFINE = np.array([[0, 0, -1.3, 4], [-0.8, 0, 0, 9], [0, 2, 0, -7], [0, 0, 0, 1.0]])
SHAPES = {"a": (12, 9, 8), "b c": (10, 16, 9), "d": (9, 8, 17)}
MAPS = ["labels", "probabilities", "entropy", "disagreement", "logits"]
MOST = {"probabilities": 1.0, "entropy": np.log(4), "disagreement": 0.75}
JOB = (
    "data.inputs=in", "data.patch_size=8", "data.patch_overlap=4", "ckpt_path=null", "model=state_dict",
    "output_dir=out", "trainer=cpu", "callbacks.writer.tensorboard=false", "model.net._target_=class_networks.Soft",
    "stitch.products=[labels,probabilities]", "stitch.class_names=[ground,'grey/white?',Other,other]",
)  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for n, (name, shape) in enumerate(SHAPES.items()):
        fractions = np.random.default_rng(n).random(shape)
        save(tmp_path / f"in/{name}.nii.gz", (noise(shape, n) + fractions).astype(np.float32), AFFINE)
    return tmp_path


def run(forks: Server, place: Path, *options: str, ranks: int = 1, status: int = 0) -> str:
    job = forks.start(*JOB, *options, cwd=place, ranks=ranks)
    assert checked(job.wait(60)) == status, job.text
    assert "Traceback" not in job.text
    return job.text


def rows(folder: Path) -> dict[str, list[str]]:
    with open(folder / "manifest.csv", newline="", encoding="utf-8") as file:
        return {row["subject"]: row["outputs"].split(";") for row in csv.DictReader(file)}


def predicted(network: torch.nn.Module, stitch: Stitch, seed: int = 0, **options: Any) -> dict[str, np.ndarray]:
    image = ScalarImage(tensor=torch.from_numpy(noise((14, 11, 9), seed)).float(), affine=AFFINE)
    return predict_volume(network.eval(), Subject(t1=image), 8, 4, stitch=stitch, **options)


# Types


@pytest.mark.parametrize("restore", ["scores", "probabilities", "labels"])
@pytest.mark.parametrize("spacing", [None, 0.9])
@pytest.mark.parametrize("dtype", ["uint8", "float16"])
def test_smaller_types_are_within_their_error(restore: str, spacing: float | None, dtype: str) -> None:
    """Half of a step of 255; labels and logits are the same to the bit."""
    options = {"preprocess": Preprocess(spacing=spacing)}
    wanted = predicted(Uneven(), Stitch("hann", MAPS, restore=restore), **options)
    found = predicted(Uneven(), Stitch("hann", MAPS, restore=restore, dtype=dtype), **options)
    assert found.keys() == wanted.keys()
    for name, volume in found.items():
        if name not in MOST:
            np.testing.assert_array_equal(volume, wanted[name])
            continue
        assert volume.dtype == dtype
        slope = MOST[name] / 255 if dtype == "uint8" else 1
        error = np.abs(volume.astype(np.float64) * slope - wanted[name]).max()
        assert error <= (MOST[name] / 510 + 1e-6 if dtype == "uint8" else 2**-11)
        assert error > 0, "a test of nothing"
        assert wanted[name].max() > 0.03 * MOST[name]


@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 2**32 - 1), st.booleans())
def test_disagreement_stays_below_the_largest_number_that_its_type_is_made_for(
    classes: int, patches: int, seed: int, each: bool
) -> None:
    """Also of patches that contradict each other with certainty."""
    generator = torch.Generator().manual_seed(seed)
    scores = 100 * torch.randn(patches, classes, 2, 2, 2, generator=generator)
    moments = Moments(torch.sigmoid if each else lambda p: p.softmax(0), each)
    values = Disagreement(each)(moments(scores).mean(0))
    assert values.max() <= (0.25 if each else 1 - 1 / classes) + 1e-5


def test_masks_and_thresholds_have_small_types_too() -> None:
    """With one channel, and several labels per voxel, whose entropy is at most ln 2."""
    for stitch in (Stitch(activation="sigmoid"), Stitch(activation="sigmoid", dtype="uint8")):
        assert predicted(Masks(), stitch)["labels"].max() == 1
    maps = ["probabilities", "entropy"]
    wanted = predicted(Masks(), Stitch(products=maps, activation="sigmoid"))
    found = predicted(Masks(), Stitch(products=maps, activation="sigmoid", dtype="uint8"))
    assert np.abs(found["entropy"] * (np.log(2) / 255) - wanted["entropy"]).max() <= np.log(2) / 510 + 1e-6
    assert np.abs(found["probabilities"] / 255 - wanted["probabilities"]).max() <= 1 / 510 + 1e-6


def test_outputs_that_are_no_probabilities_are_refused_rather_than_cut_off() -> None:
    """With activation none, nobody has made sure of them; those within rounding are taken."""
    with pytest.raises(OutputError, match=r"numbers from 0 to 1; these are -.*a network must give probabilities"):
        predicted(Over50(), Stitch(products=["probabilities"], activation="none", dtype="uint8"))
    soft = torch.nn.Sequential(Soft(), torch.nn.Softmax(1))
    found = predicted(soft, Stitch(products=["probabilities"], activation="none", dtype="uint8"))
    np.testing.assert_array_equal(
        found["probabilities"].astype(int).sum(0).clip(253, 257), found["probabilities"].sum(0)
    )


def test_a_mean_of_models_has_small_types() -> None:
    """Averaged as float32, and only then rounded."""
    first, second = (np.random.default_rng(n).random((2, 3, 4, 5)).astype(np.float32) for n in (0, 1))
    stitch = Stitch(products=["probabilities"], combine="mean", dtype="uint8", activation="softmax")
    combined = Combination(stitch, (Stitch(), Stitch())).begin()
    for n, part in enumerate((first.copy(), second)):
        combined.add(n, {"probabilities": part})
    found = combined.finish()["probabilities"]
    assert found.slope == 1 / 255
    assert np.abs(found.array / 255 - (first + second) / 2).max() <= 1 / 510 + 1e-6


@pytest.mark.parametrize(
    "options", [("trainer.strategy=ddp", "run.distribute=slab"), ("callbacks.writer.in_memory=0",)]
)
def test_files_of_small_types_show_numbers_in_any_reader(place: Path, forks: Server, options: tuple[str, ...]) -> None:
    """By the slope in the header; also from slabs, and from files for what memory does not hold. Much less disk."""
    run(forks, place)
    run(forks, place, *options, "stitch.dtype=uint8", "output_dir=small", ranks=2 if len(options) > 1 else 1)
    run(forks, place, "stitch.dtype=float16", "output_dir=half", "callbacks.writer.compress=false")
    for name in SHAPES:
        wanted = nib.load(place / f"out/{name}_probabilities.nii.gz").get_fdata()
        image = nib.load(place / f"small/{name}_probabilities.nii.gz")
        assert image.header.get_data_dtype() == np.uint8
        assert (image.dataobj.slope, image.dataobj.inter) == (pytest.approx(1 / 255), 0)
        np.testing.assert_array_equal(image.affine, nib.load(place / f"in/{name}.nii.gz").affine)
        assert 0 < np.abs(image.get_fdata() - wanted).max() <= 1 / 510 + 1e-6
        half = nib.load(place / f"half/{name}_probabilities.nii")
        assert half.header.get_data_dtype() == np.float32
        assert 0 < np.abs(half.get_fdata() - wanted).max() <= 2**-12
        sizes = [(place / f"{folder}/{name}_probabilities.nii.gz").stat().st_size for folder in ("out", "small")]
        assert sizes[0] > 4 * sizes[1]
        np.testing.assert_array_equal(
            read(place / f"small/{name}_labels.nii.gz"), read(place / f"out/{name}_labels.nii.gz")
        )


def test_a_plan_counts_types(place: Path, forks: Server) -> None:
    """A quarter of the memory; half precision is half in memory and whole on disk."""
    found = {}
    for dtype in ("float32", "float16", "uint8"):
        run(forks, place, f"stitch.dtype={dtype}", "stitch.products=[probabilities]", "run.dry_run=true")
        plan = json.loads((place / "out/plan.json").read_text())
        found[dtype] = [subject["output_at_most"] for subject in plan["per_subject"]]
    voxels = [np.prod(shape) for shape in SHAPES.values()]
    assert found["float32"] == found["float16"] == [16 * n for n in voxels]
    assert found["uint8"] == [4 * n for n in voxels]


# A file per class


def test_each_class_has_a_file(place: Path, forks: Server) -> None:
    """With a safe name; the manifest, resume and overwrite know all of them, and labels stay one file."""
    run(forks, place)
    run(forks, place, "stitch.files=per_class", "output_dir=each")
    ends = ["ground", "grey_white", "Other", "other_3"]
    for name in SHAPES:
        wanted = [f"{name}_labels.nii.gz", *(f"{name}_probabilities_{end}.nii.gz" for end in ends)]
        assert rows(place / "each")[name] == wanted
        whole = read(place / f"out/{name}_probabilities.nii.gz")
        for n, end in enumerate(ends):
            np.testing.assert_array_equal(read(place / f"each/{name}_probabilities_{end}.nii.gz"), whole[..., n])
    times = {path.name: path.stat().st_mtime_ns for path in (place / "each").glob("*.nii.gz")}
    (place / "each/d_probabilities_Other.nii.gz").unlink()
    text = run(forks, place, "stitch.files=per_class", "output_dir=each")
    assert "2 of them before" in text
    redone = {path.name for path in (place / "each").glob("*.nii.gz") if path.stat().st_mtime_ns != times[path.name]}
    assert redone == {f"d_{end}.nii.gz" for end in ("labels", *(f"probabilities_{end}" for end in ends))}
    assert "stitch.files was" in run(forks, place, "output_dir=each", status=2)
    run(forks, place, "output_dir=each", "run.overwrite=true", "stitch.dtype=uint8")
    left = {path.name for path in (place / "each").glob("*.nii.gz")}
    assert left == {f"{name}_{product}.nii.gz" for name in SHAPES for product in ("labels", "probabilities")}


@given(st.lists(st.text(max_size=60), min_size=1, max_size=12))
def test_names_of_files_are_safe_and_differ(names: list[str]) -> None:
    """Whatever classes are called; also where case does not count."""
    found = file_names(names)
    assert len({name.casefold() for name in found}) == len(names)
    for name in found:
        assert re.fullmatch(r"[\w.-]{1,60}", name)
        assert not name.startswith(".")
        _ = name.encode()


# Temperature


@pytest.mark.parametrize("restore", ["scores", "probabilities"])
def test_a_temperature_changes_probabilities_and_no_label(restore: str) -> None:
    """They are those of divided scores; disagreement is that of these probabilities."""
    products = ["labels", "probabilities", "entropy", "disagreement", "logits"]

    class Divided(Uneven):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) / 2.5

    options = {"preprocess": Preprocess(spacing=0.9)}
    plain = predicted(Uneven(), Stitch(products=products, restore=restore), **options)
    found = predicted(Uneven(), Stitch(products=products, restore=restore, temperature=2.5), **options)
    divided = predicted(Divided(), Stitch(products=products, restore=restore), **options)
    for name in ("labels", "logits"):
        np.testing.assert_array_equal(found[name], plain[name])
    for name in ("probabilities", "entropy", "disagreement"):
        np.testing.assert_allclose(found[name], divided[name], atol=1e-6)
        assert np.abs(found[name] - plain[name]).max() > 1e-3
    assert found["entropy"].mean() > plain["entropy"].mean()


def test_a_temperature_moves_no_threshold() -> None:
    """Labels by a threshold other than a half are those without it, though their probabilities change."""
    options = {"activation": "sigmoid", "threshold": 0.9, "products": ["labels", "probabilities"]}
    plain = predicted(Masks(), Stitch(**options))
    found = predicted(Masks(), Stitch(**options, temperature=30))
    np.testing.assert_array_equal(found["labels"], plain["labels"])
    assert np.abs(found["probabilities"] - plain["probabilities"]).max() > 0.1


@pytest.mark.parametrize("wrong", [0, -1, float("inf"), float("nan"), True])
def test_a_temperature_is_a_number_above_zero(wrong: object) -> None:
    with pytest.raises(ConfigError, match=r"stitch\.temperature must be a number above 0"):
        Stitch(temperature=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["none", "applied"])
def test_a_temperature_needs_scores(activation: str, place: Path, forks: Server) -> None:
    """Probabilities cannot be divided; the command says so before anything starts."""
    with pytest.raises(ConfigError, match=r"stitch\.temperature divides scores"):
        Stitch(temperature=2, activation=activation)
    setting = "model.activation=none" if activation == "none" else "model.average=probabilities"
    assert "stitch.temperature divides scores" in run(forks, place, setting, "stitch.temperature=2", status=2)
    assert not (place / "out").exists() or not list((place / "out").glob("*.nii.gz"))


# Names and colours


def test_viewers_get_names_and_colours_of_every_set_of_classes(tmp_path: Path) -> None:
    """The colours are those of pictures, whose labels are numbered as classes are."""
    assert len(np.unique(PALETTE, axis=0)) == 255
    write_label_tables(tmp_path, "labels", [3, 7, 1002], {7: "grey  matter", 3: 'a "b"'}, [0, 7, 1002, 3])
    colours = colours_of([3, 7, 1002], [0, 7, 1002, 3])
    assert colours == [tuple(PALETTE[n].tolist()) for n in (2, 0, 1)]
    lines = [line for line in (tmp_path / "labels.txt").read_text().splitlines() if not line.startswith("#")]
    pattern = re.compile(r'\s*(\d+)\s+(\d+)\s+(\d+)\s+(\d+)\s+([\d.]+)\s+(\d)\s+(\d)\s+"([^"]*)"')  # as ITK-SNAP scans
    found = [pattern.fullmatch(line) for line in lines]
    entries = [match.groups() for match in found if match]
    assert len(entries) == len(lines) == 4
    assert [int(entry[0]) for entry in entries] == [0, 3, 7, 1002]
    assert [entry[7] for entry in entries] == ["Clear Label", "a 'b'", "grey matter", "label 1002"]
    assert [tuple(map(int, entry[1:4])) for entry in entries[1:]] == colours
    table = [line.split() for line in (tmp_path / "labels.ctbl").read_text().splitlines() if not line.startswith("#")]
    assert [(int(line[0]), line[1]) for line in table[1:]] == [(3, 'a_"b"'), (7, "grey_matter"), (1002, "label_1002")]
    assert [tuple(map(int, line[2:5])) for line in table[1:]] == colours
    assert [line[5] for line in table] == ["0", "255", "255", "255"]


def test_a_run_writes_them_once(place: Path, forks: Server) -> None:
    """Beside the label files."""
    run(forks, place)
    assert '"grey/white?"' in (place / "out/labels.txt").read_text()
    assert "1 grey/white? 230 159 0 255" in (place / "out/labels.ctbl").read_text()
    assert sorted(path.name for path in (place / "out").glob("*.ctbl")) == ["labels.ctbl"]
