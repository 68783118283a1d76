"""Tests crops, boxes, intensities by channel, one-hot labels and images by their names' ends: there and back."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devices import host_as_device
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from scipy import ndimage
from synthetic import noise, read, save
from torch import Tensor

from voxquilt.data.discovery import find_cases
from voxquilt.data.foreground import box_of_mask
from voxquilt.data.preprocess import Preprocess
from voxquilt.data.subject import LabelMap, ScalarImage, Subject
from voxquilt.errors import ConfigError, InputError
from voxquilt.geometry.label_resampling import resample_labels
from voxquilt.geometry.resample import resample_image
from voxquilt.geometry.space import make_space
from voxquilt.models.predictor import PatchPredictor
from voxquilt.predict import predict_volume
from voxquilt.prediction.datamodule import GridDataModule
from voxquilt.prediction.writer_callback import VolumeWriter
from voxquilt.stitching.stitch import Stitch

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]
AFFINE = np.array([[0, 0, -1.3, 4], [-0.8, 0, 0, 9], [0, 2, 0, -7], [0, 0, 0, 1.0]])
TURN = np.array([[0.96, -0.28, 0, 0], [0.28, 0.96, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
PRODUCTS = ["logits", "labels", "probabilities", "entropy", "disagreement"]
BACKGROUND = {"logits": [0, -30], "labels": [0], "probabilities": [1, 0], "entropy": [0], "disagreement": [0]}
SEEDS = st.integers(0, 999)


def with_margins(shape: Sequence[int], seed: int, share: float = 0.3) -> np.ndarray:
    """Integers from 1, with random voxels of 0 inside, and margins of 0."""
    random = np.random.default_rng(seed)
    values = random.integers(1, 100, shape) * (random.random(shape) > share)
    for axis in range(3):
        first, last = random.integers(0, max(1, shape[axis] // 3), 2)
        index = np.arange(shape[axis])
        outside = (index < first) | (index >= shape[axis] - last)
        values[tuple(outside if a == axis else slice(None) for a in range(3))] = 0
    return values.astype(np.int16)


def subject_of(*volumes: np.ndarray, affine: np.ndarray = AFFINE) -> Subject:
    images = {f"i{n}": ScalarImage(tensor=torch.from_numpy(v)[None], affine=affine) for n, v in enumerate(volumes)}
    return Subject(images)


def slow_inside(volumes: Sequence[np.ndarray]) -> tuple[np.ndarray, tuple[slice, ...]]:
    """Where a volume is not 0, with holes filled by scipy, and the box around it."""
    mask = ndimage.binary_fill_holes(np.any([v != 0 for v in volumes], 0))
    places = np.argwhere(mask)
    if not len(places):
        return mask, tuple(slice(0, n) for n in mask.shape)
    return mask, tuple(slice(int(a), int(b) + 1) for a, b in zip(places.min(0), places.max(0), strict=True))


@given(st.tuples(*[st.integers(1, 9)] * 3), st.integers(1, 3), st.sampled_from([0.3, 0.9, 1.0]), SEEDS)
@example((7, 7, 7), 1, 1.0, 0)
@settings(deadline=None, max_examples=80)
def test_a_crop_leaves_the_box_around_what_is_not_0_in_any_image(
    shape: tuple[int, int, int], count: int, share: float, seed: int
) -> None:
    """With its place in the file; an all-zero subject stays whole."""
    volumes = [with_margins(shape, seed + n, share) for n in range(count)]
    mask, box = slow_inside(volumes)
    seen: list[Tensor | None] = []

    class Looks:
        uses_inside = True

        def __call__(self, data: Tensor, inside: Tensor | None) -> Tensor:
            seen.append(inside)
            return data

    prepared = Preprocess(None, crop="nonzero", intensity=[Looks()], intensity_first=True)(subject_of(*volumes))
    assert prepared.space.where == box
    for n, volume in enumerate(volumes):
        image = prepared.subject.images[f"i{n}"]
        np.testing.assert_array_equal(image.data[0], volume[box])
        first = np.array([*(along.start for along in box), 1])
        np.testing.assert_allclose(image.affine[:, 3], AFFINE @ first, rtol=0, atol=1e-9)
    assert len(seen) == count
    assert all(inside is not None and np.array_equal(inside, mask[box]) for inside in seen)


def pointwise(x: Tensor) -> Tensor:
    return torch.cat([50 - x[:, :1], x[:, :1] - 50], 1)


@given(
    st.tuples(*[st.integers(2, 12)] * 3), st.sampled_from([None, (1.0, 1.1, 1.7)]),
    st.sampled_from(["corner", "centre"]),
    st.sampled_from([None, "RAS", "PSL"]), st.sampled_from([None, (2, 0, 1)]), st.sampled_from([0, 1, 3]),
    st.sampled_from(["scores", "labels"]), SEEDS,
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_outside_of_a_crop_every_product_is_background(
    shape: tuple[int, int, int], spacing: Any, grid: str, orientation: str | None, transpose: Any, order: int,
    restore: str, seed: int,
) -> None:  # fmt: skip
    """And inside it is that of the cut-out volume by itself, however it is turned and resampled."""
    volume = with_margins(shape, seed)
    volume[:1] = 0
    _, box = slow_inside([volume])
    options: dict[str, Any] = {
        "orientation": orientation, "spacing": spacing, "grid": grid, "transpose": transpose, "interpolation": order,
    }  # fmt: skip
    stitch = Stitch("nnunet", PRODUCTS, order=order, restore=restore)
    grids: dict[str, Any] = {"patch_size": 4, "placement": "even", "stitch": stitch}
    given_step = {"patch_overlap": 2}
    made = predict_volume(
        pointwise, subject_of(volume), preprocess=Preprocess(crop="nonzero", **options), **grids, **given_step
    )
    affine = AFFINE.copy()
    affine[:3, 3] = (AFFINE @ [*(along.start for along in box), 1])[:3]
    alone = predict_volume(
        pointwise, subject_of(volume[box], affine=affine), preprocess=Preprocess(**options), **grids, **given_step
    )
    outside = np.ones(shape, bool)
    outside[box] = False
    for name in PRODUCTS:
        np.testing.assert_allclose(made[name][:, *box], alone[name], rtol=0, atol=2e-4, err_msg=name)
        for channel, value in zip(made[name], BACKGROUND[name], strict=True):
            np.testing.assert_allclose(channel[outside], value, rtol=0, atol=1e-6, err_msg=name)


# The whole run.


def predict(
    out: Path, scans: Path, network: Any, *, stitch: Stitch | None = None, memory: Any = None, **options: Any
) -> dict[str, np.ndarray]:
    writer = VolumeWriter(out, stitch, compress=False, log="plain", in_memory=memory)
    data = GridDataModule(scans, 8, 4, batch_size=3, **options)
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[writer], enable_progress_bar=False)
    trainer.predict(PatchPredictor(network), datamodule=data, return_predictions=False)
    return {path.name: read(path) for path in sorted(out.glob("*.nii"))}


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Three subjects with margins of 0, one of which is all 0."""
    for n, shape in enumerate([(19, 11, 14), (9, 12, 10), (5, 6, 7)]):
        volume = with_margins(shape, n)
        volume[:1], volume[:, -2:] = 0, 0
        save(tmp_path / f"scans/s{n}.nii.gz", volume * (n < 2), AFFINE)
    return tmp_path / "scans"


class Scores(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x)


CROPPED = {"preprocess": Preprocess("RAS", 1.2, crop="nonzero", grid="corner")}
STITCH = Stitch("nnunet", PRODUCTS)


def test_scratch_files_hold_what_memory_holds(scans: Path, tmp_path: Path) -> None:
    """Background included."""
    usual = predict(tmp_path / "usual", scans, Scores(), stitch=STITCH, **CROPPED)
    kept = predict(tmp_path / "kept", scans, Scores(), stitch=STITCH, memory=0, **CROPPED)
    assert usual.keys() == kept.keys()
    assert len(usual) == 3 * len(PRODUCTS)
    for name, volume in usual.items():
        np.testing.assert_array_equal(kept[name], volume, err_msg=name)
    assert not read(tmp_path / "usual/s0_labels.nii")[0].any()


def test_a_device_makes_what_the_host_makes(scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the host in the device's place."""
    usual = predict(tmp_path / "usual", scans, Scores(), stitch=STITCH, **CROPPED)
    seen = host_as_device(monkeypatch)
    made = predict(tmp_path / "device", scans, Scores(), stitch=STITCH, **CROPPED)
    assert seen.uploads
    assert usual.keys() == made.keys()
    for name, volume in usual.items():
        np.testing.assert_allclose(made[name], volume, rtol=0, atol=1e-4, err_msg=name)


# Intensities.


def test_intensities_by_the_numbers_of_channels() -> None:
    """Counted over all images; a channel without a number is unchanged."""
    first = ScalarImage(tensor=torch.ones(2, 3, 3, 3), affine=AFFINE)
    second = ScalarImage(tensor=torch.ones(1, 3, 3, 3), affine=AFFINE)
    preprocess = Preprocess(None, intensity={0: [lambda x: x + 1], 2: [lambda x: x * 7, lambda x: x + 1]})
    made, _ = preprocess(Subject(a=first, b=second))
    assert [channel.unique().tolist() for channel in made["a"].data] == [[2.0], [1.0]]
    assert made["b"].data.unique().tolist() == [8.0]


@pytest.mark.parametrize("first", [True, False])
def test_intensities_change_before_or_after_resampling(first: bool) -> None:
    """A square, which does not commute with interpolation."""
    data = torch.from_numpy(noise((6, 7, 5))).float()[None]
    subject = Subject(t1=ScalarImage(tensor=data, affine=np.eye(4)))
    preprocess = Preprocess("RAS", 1.7, [torch.square], intensity_first=first, interpolation=3, grid="corner")
    made, space = preprocess(subject)
    maps = space.to_model(3)
    wanted = resample_image(data.square(), maps) if first else resample_image(data, maps).square()
    np.testing.assert_allclose(made["t1"].data, wanted, rtol=1e-6)


def test_an_intensity_of_an_unknown_image_is_refused() -> None:
    """Also beside numbers."""
    with pytest.raises(ConfigError, match=r"a name in preprocess\.intensity must be one of i0; it is 't2'"):
        Preprocess(None, intensity={0: [torch.square], "t2": [torch.square]})(subject_of(noise((3, 3, 3))))


# Labels of an earlier stage.


@pytest.mark.parametrize("crop", [None, "nonzero"])
def test_labels_become_a_channel_each(crop: str | None) -> None:
    """By the largest share; outside of a filled crop, 0 is a label of its own."""
    image = with_margins((19, 18, 17), 0, share=0.8)  # so that much of the box is outside
    labels = np.random.default_rng(1).choice([0, 0, 1, 3], image.shape).astype(np.uint8)
    subject = Subject(
        t1=ScalarImage(tensor=torch.from_numpy(image)[None], affine=np.eye(4)),
        stage=LabelMap(tensor=torch.from_numpy(labels)[None], affine=np.eye(4)),
    )
    made, space = Preprocess(None, 1.4, grid="corner", crop=crop, one_hot={"stage": [3, 1, 9]})(subject)
    mask, box = slow_inside([image])
    where = box if crop else (slice(None),) * 3
    own = labels.astype(np.int64)[where]
    if crop:
        own = np.where((own == 0) & ~mask[where], -1, own)
        plain = resample_labels(torch.from_numpy(own).clamp(min=0)[None], space.to_model())
        assert not torch.equal(plain, resample_labels(torch.from_numpy(own)[None], space.to_model()).clamp(min=0))
    wanted = resample_labels(torch.from_numpy(own)[None], space.to_model())
    assert made["stage"].data.dtype == torch.float32
    assert made["stage"].data.shape == (3, *space.model.shape)
    for channel, label in zip(made["stage"].data, (3, 1, 9), strict=True):
        np.testing.assert_array_equal(channel, wanted[0] == label)
    assert made["stage"].data[:2].any()


@pytest.mark.parametrize("how", [0, "half"])
def test_labels_that_become_channels_are_resampled_as_is_said(how: int | str) -> None:
    """By the nearest voxel, or by shares in half precision; neither is what 1 makes."""
    labels = torch.from_numpy(np.random.default_rng(1).integers(0, 4, (1, 16, 17, 18)))
    subject = Subject(stage=LabelMap(tensor=labels, affine=np.eye(4)))
    preprocess = Preprocess(None, 4 / 3, grid="corner", one_hot={"stage": [1, 2, 3]})
    made, space = replace(preprocess, one_hot_interpolation=how)(subject)
    plain = preprocess(subject).subject
    wanted = resample_labels(labels, space.to_model(0 if how == 0 else 1), half=how == "half")
    for channel, label in zip(made["stage"].data, (1, 2, 3), strict=True):
        np.testing.assert_array_equal(channel, wanted[0] == label)
    assert not torch.equal(made["stage"].data, plain["stage"].data)


def test_another_way_to_resample_labels_is_refused() -> None:
    """Such as the cubic splines of images."""
    with pytest.raises(ConfigError, match=r"preprocess\.one_hot_interpolation must be 0 .* or half .*; it is 3"):
        Preprocess(one_hot_interpolation=3)


# Files.


def names(cases: Sequence[Any]) -> dict[str, dict[str, str]]:
    return {case.subject: {name: path.name for name, path in case.images.items()} for case in cases}


ENDS = {"t1": "_0000", "t2": "_0001"}


def touch(folder: Path, *files: str) -> Path:
    for file in files:
        save(folder / file, noise((3, 3, 3)))
    return folder


def test_files_of_one_subject_are_put_together_by_their_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the order of the ends, in each file's format; a missing image keeps its name, and other files are named."""
    touch(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "b_0001.nii", "b_0000.nii", "c_0001.nii.gz", "other.nii.gz")
    with caplog.at_level("WARNING", "voxquilt"):
        cases = find_cases(tmp_path, suffixes=ENDS)
    assert names(cases) == {
        "a": {"t1": "a_0000.nii.gz", "t2": "a_0001.nii.gz"},
        "b": {"t1": "b_0000.nii", "t2": "b_0001.nii"},
        "c": {"t1": "c_0000.nii.gz", "t2": "c_0001.nii.gz"},
    }
    assert "1 files whose names do not end in _0000 or _0001 are left out: other.nii.gz" in caplog.text


def test_a_single_image_needs_no_end(tmp_path: Path) -> None:
    """Files by any name are subjects, if none has the end."""
    touch(tmp_path / "plain", "a.nii.gz", "b.nii.gz")
    assert [*names(find_cases(tmp_path / "plain", suffixes={"t1": "_0000"}))] == ["a", "b"]
    touch(tmp_path / "ends", "a_0000.nii.gz", "b_0000.nii.gz")
    assert [*names(find_cases(tmp_path / "ends", suffixes={"t1": "_0000"}))] == ["a", "b"]
    with pytest.raises(ConfigError, match="a subject has 2 images, whose files' names end in t1 _0000, t2 _0001"):
        find_cases(tmp_path / "plain", suffixes=ENDS)


def test_extra_images_come_after_the_others(tmp_path: Path) -> None:
    """By a path with the subject's name."""
    touch(tmp_path / "in", "a_0000.nii.gz", "a_0001.nii.gz")
    cases = find_cases(tmp_path / "in", suffixes=ENDS, extra={"stage": f"{tmp_path}/low/{{subject}}_labels.nii.gz"})
    assert names(cases)["a"] == {"t1": "a_0000.nii.gz", "t2": "a_0001.nii.gz", "stage": "a_labels.nii.gz"}
    for wrong in ({"stage": "low/a.nii.gz"}, {"stage": "{name}"}):
        with pytest.raises(ConfigError, match=r"data\.extra_images has a path with \{subject\} for each name"):
            find_cases(tmp_path / "in", suffixes=ENDS, extra=wrong)


# Boxes of masks.


@given(st.tuples(*[st.integers(1, 9)] * 3), st.integers(0, 80).map(lambda mm: mm / 10), st.booleans(), SEEDS)
@settings(deadline=None, max_examples=80)
def test_a_box_has_all_voxels_that_overlap_the_margin(
    shape: tuple[int, int, int], margin: float, oblique: bool, seed: int
) -> None:
    """mm along the volume's axes, also where they are oblique and voxels are not cubes; never beyond the volume."""
    random = np.random.default_rng(seed)
    mask = random.random(shape) < 0.03
    affine = (TURN if oblique else np.eye(4)) @ AFFINE
    subject = subject_of(noise(shape), affine=affine)
    box = box_of_mask(LabelMap(tensor=torch.from_numpy(mask)[None].byte(), affine=affine), subject, margin)
    if not mask.any():
        assert box is None
        return
    assert box is not None
    places = np.argwhere(mask)
    for axis, mm in enumerate((0.8, 2.0, 1.3)):
        low, high = places[:, axis].min(), places[:, axis].max()
        near = [x for x in range(shape[axis]) if max(low - x, x - high, 0) * mm < margin + mm - 1e-5]
        assert box[axis] == (near[0], near[-1] + 1)


def rows(folder: Path) -> Mapping[str, Mapping[str, str]]:
    with open(folder / "manifest.csv", newline="", encoding="utf-8") as file:
        return {row["subject"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("crop", [None, "nonzero"])
def test_only_the_box_of_a_mask_is_predicted(crop: str | None, scans: Path, tmp_path: Path) -> None:
    """All around it, and where a mask is empty, is background; a missing or foreign mask fails its subject alone."""
    mask = np.zeros((19, 11, 14), np.uint8)
    mask[6:11, 3:5, 4:9] = 1
    save(tmp_path / "masks/s0.nii.gz", mask, AFFINE)
    save(tmp_path / "masks/s1.nii.gz", np.zeros((9, 12, 10), np.uint8), AFFINE)
    options = {"within": f"{tmp_path}/masks/{{subject}}.nii.gz", "margin": 2.1}
    made = predict(tmp_path / "out", scans, Scores(), stitch=STITCH, preprocess=Preprocess(None, crop=crop), **options)
    assert {name: row["status"] for name, row in rows(tmp_path / "out").items()} == {
        "s0": "done", "s1": "done", "s2": "failed",
    }  # fmt: skip
    volume = read(scans / "s0.nii.gz")
    box = (slice(3, 14), slice(1, 7), slice(2, 11))  # 3 voxels of 0.8 mm, 2 of 2 mm, 2 of 1.3 mm
    wanted = np.zeros(volume.shape, np.uint8)
    wanted[box] = volume[box] > 50
    np.testing.assert_array_equal(made["s0_labels.nii"], wanted)
    for name in ("s0", "s1"):
        outside = np.ones(made[f"{name}_labels.nii"].shape, bool)
        if name == "s0":
            outside[box] = False
        for product in PRODUCTS:
            found = made[f"{name}_{product}.nii"].reshape(*outside.shape, -1)
            np.testing.assert_allclose(found[outside], np.array([BACKGROUND[product]] * outside.sum()), atol=1e-6)
    assert rows(tmp_path / "out")["s1"]["patches"] == "0"


def test_a_mask_on_another_grid_is_refused() -> None:
    """By name, as an image's is."""
    mask = LabelMap(tensor=torch.ones(1, 3, 3, 3), affine=np.eye(4))
    with pytest.raises(InputError, match="the mask of within"):
        box_of_mask(mask, subject_of(noise((4, 3, 3)), affine=np.eye(4)))


def test_a_box_and_masks_of_skip_go_together(scans: Path, tmp_path: Path) -> None:
    """Patches of the box without foreground are left out, and are background."""
    for n, shape in enumerate([(19, 11, 14), (9, 12, 10), (5, 6, 7)]):
        half = np.zeros(shape, np.uint8)
        half[: shape[0] // 3] = 1
        save(tmp_path / f"masks/s{n}.nii.gz", half, AFFINE)
        save(tmp_path / f"boxes/s{n}.nii.gz", np.ones(shape, np.uint8), AFFINE)
    masks = f"{tmp_path}/masks/{{subject}}.nii.gz"
    options = {"skip": masks, "within": f"{tmp_path}/boxes/{{subject}}.nii.gz"}
    made = predict(tmp_path / "out", scans, Scores(), preprocess=Preprocess(None, crop="nonzero"), **options)
    for n in range(2):
        volume, mask = read(scans / f"s{n}.nii.gz"), read(tmp_path / f"masks/s{n}.nii.gz") > 0
        np.testing.assert_array_equal(made[f"s{n}_labels.nii"][mask], (volume > 50)[mask])
        assert (made[f"s{n}_labels.nii"] <= (volume > 50)).all()
    assert any(int(row["skipped"]) for row in rows(tmp_path / "out").values())


def test_the_space_of_a_box_is_that_of_the_cut_out_volume() -> None:
    """Affine, shape and maps."""
    whole = make_space(subject_of(noise((9, 8, 7))).frame, "RAS", 1.1, box=((2, 7), (0, 8), (3, 4)))
    affine = AFFINE.copy()
    affine[:3, 3] = (AFFINE @ [2, 0, 3, 1])[:3]
    alone = make_space(subject_of(noise((5, 8, 1)), affine=affine).frame, "RAS", 1.1)
    assert whole.model.shape == alone.model.shape
    np.testing.assert_allclose(whole.model.affine, alone.model.affine, rtol=0, atol=1e-9)
    assert whole.maps == alone.maps


def test_a_subject_that_a_table_names_keeps_its_name(tmp_path: Path) -> None:
    """Though its file ends as images of a subject do; without such a column subjects are named by their files."""
    save(tmp_path / "in/p_0000.nii.gz", noise((4, 4, 4)))
    (tmp_path / "named.csv").write_text("subject,image\nzz,in/p_0000.nii.gz\n")
    (tmp_path / "plain.csv").write_text("image\nin/p_0000.nii.gz\n")
    (named,) = find_cases(tmp_path / "named.csv", suffixes={"t1": "_0000"})
    (plain,) = find_cases(tmp_path / "plain.csv", suffixes={"t1": "_0000"})
    assert (named.subject, plain.subject) == ("zz", "p")
