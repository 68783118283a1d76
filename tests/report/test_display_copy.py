"""Tests what the viewer gets of a volume: true labels by way of dense ones, and the right place of every voxel."""

import itertools
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from run_folders import CONFIGURATION, done
from synthetic import noise, read, save

from voxquilt.errors import InputError
from voxquilt.report.display_copy import MOST_COLOURS, SubjectVolumes, dense_labels, step_for, window_of
from voxquilt.report.viewer_page import framed
from voxquilt.reporting.manifest import Row
from voxquilt.reporting.overlay import PALETTE

OBLIQUE = np.array([[0.9, 0.3, 0, 1], [-0.3, 0.9, 0, 2], [0, 0, -1.5, 3], [0, 0, 0, 1.0]])


def volumes(folder: Path, row: Row, **stitch: Any) -> SubjectVolumes:
    return SubjectVolumes(row, folder, {"stitch": CONFIGURATION["stitch"] | stitch})


def copied(volumes: SubjectVolumes, number: int, path: Path) -> tuple[nib.Nifti1Image, dict[str, Any]]:
    content, about = volumes.copy(number)
    path.write_bytes(content)
    return nib.load(path), about  # type: ignore[return-value]


@given(arrays(st.sampled_from([np.uint8, np.uint16, np.int64]), (3, 4, 2), elements=st.integers(0, 200)))
def test_dense_labels_are_the_ranks_of_the_true_ones(labels: np.ndarray) -> None:
    """Without gaps from 0, and back through the legend they are what they were."""
    shown, numbers = dense_labels(labels)
    assert np.array_equal(np.array(numbers)[shown], labels)
    assert numbers[0] == 0
    assert numbers == sorted({0, *labels.ravel().tolist()})
    assert shown.dtype == np.uint8


def test_a_label_of_any_size_is_shown_by_a_small_number(tmp_path: Path) -> None:
    """With the name and the colour that pictures give its class; the display copy has no gap."""
    labels = np.zeros((4, 4, 4), np.int32)
    labels[0], labels[1], labels[2] = 1002, 7, 900000
    save(tmp_path / "a_labels.nii.gz", labels)
    values = [0, 7, 1002, 900000]
    image, about = copied(
        volumes(tmp_path, done("a"), label_values=values, class_names=["background", "x", "y", "z"]),
        0,
        tmp_path / "c.nii",
    )
    legend = about["classes"]
    assert [(c["shown"], c["number"], c["name"]) for c in legend[1:]] == [(1, 7, "x"), (2, 1002, "y"), (3, 900000, "z")]
    assert [c["colour"] for c in legend[1:]] == PALETTE[:3].tolist()
    assert image.get_data_dtype() == np.uint8
    assert np.array_equal(np.array([c["number"] for c in legend])[np.asarray(image.dataobj)], labels)


@pytest.mark.parametrize("classes", [MOST_COLOURS, MOST_COLOURS + 1, 300])
def test_many_labels_are_marked_as_such_for_the_viewer(tmp_path: Path, classes: int) -> None:
    """Up to 63 in bytes; more by the intent of the file, without which NiiVue paints the background too."""
    labels = (np.arange(10 * 10 * 10) % (classes + 1)).reshape(10, 10, 10).astype(np.uint16)
    save(tmp_path / "a_labels.nii.gz", labels)
    image, about = copied(volumes(tmp_path, done("a"), class_names=None), 0, tmp_path / "c.nii")
    assert np.array_equal(np.asarray(image.dataobj), labels)
    assert int(image.header["intent_code"]) == (0 if classes <= MOST_COLOURS else 1002)
    assert image.get_data_dtype() == (np.uint16 if classes >= 256 else np.uint8)
    assert len(about["classes"]) == classes + 1


def test_masks_in_channels_are_one_volume_with_their_names(tmp_path: Path) -> None:
    """Where they overlap, the last one is shown, as in pictures."""
    masks = np.zeros((4, 4, 4, 2), np.uint8)
    masks[:3, ..., 0], masks[2:, ..., 1] = 1, 1
    save(tmp_path / "a_labels.nii.gz", masks)
    image, about = copied(volumes(tmp_path, done("a"), class_names=["whole", "core"]), 0, tmp_path / "c.nii")
    assert [(c["number"], c["name"]) for c in about["classes"][1:]] == [(0, "whole"), (1, "core")]
    assert np.asarray(image.dataobj)[:, 0, 0].tolist() == [1, 1, 2, 2]


def test_a_large_volume_is_thinned_and_every_voxel_stays_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """World coordinates of a voxel of the copy are those of the voxel that it shows; the step is told."""
    monkeypatch.setattr("voxquilt.report.display_copy.step_for", lambda shape: step_for(shape, 500))
    voxels = save(tmp_path / "a.nii.gz", noise((13, 17, 11)), OBLIQUE)
    row = Row("a", "done", inputs={"image": str(tmp_path / "a.nii.gz")})
    image, about = copied(volumes(tmp_path, row), 0, tmp_path / "c.nii")
    step = about["step"]
    assert (step, about["shape"]) == (2, [13, 17, 11])
    assert image.affine is not None
    for place in itertools.product(*(range(n) for n in image.shape)):
        assert np.asarray(image.dataobj)[place] == voxels[tuple(step * n for n in place)]
        there, here = (m @ [*p, 1] for m, p in ((OBLIQUE, [step * n for n in place]), (image.affine, place)))
        assert np.allclose(there, here, atol=1e-4)


@given(st.tuples(*[st.integers(1, 3000)] * 3))
def test_the_step_leaves_no_more_voxels_than_the_viewer_takes(shape: tuple[int, int, int]) -> None:
    """And is 1 for volumes that are not too large."""
    step, most = step_for(shape, 2**20), 2**20
    assert (step == 1) == (np.prod(shape) <= most)
    assert np.prod([n / step for n in shape]) <= most


def test_the_window_leaves_out_the_extremes_and_what_is_0() -> None:
    """And is never empty."""
    data = np.zeros((10, 10, 30), np.float32)
    data[:, :, 10:] = np.linspace(100, 300, 2000).reshape(10, 10, 20)
    low, high = window_of(data)
    assert (low, high) == pytest.approx((102, 298), abs=0.5)
    for constant in (np.zeros((2, 2, 2)), np.full((2, 2, 2), 7.0)):
        low, high = window_of(constant)
        assert low < high


def test_inputs_come_first_then_labels_then_maps(tmp_path: Path) -> None:
    """Each channel of a map is an entry, by the name of its class; files that are gone, or lie elsewhere, are none."""
    save(tmp_path / "t1.nii.gz", noise((5, 4, 3)))
    save(tmp_path / "out/a_labels.nii.gz", noise((5, 4, 3)).astype(np.uint8))
    save(tmp_path / "out/a_probabilities.nii.gz", np.random.default_rng(0).random((5, 4, 3, 2)).astype(np.float32))
    save(tmp_path / "elsewhere.nii.gz", noise((5, 4, 3)))
    (tmp_path / "out/a_entropy.nii.gz").symlink_to(tmp_path / "elsewhere.nii.gz")
    outputs = ("a_probabilities.nii.gz", "a_labels.nii.gz", "a_entropy.nii.gz", "a_overlay.png", "a_gone.nii.gz")
    inputs = {"t1": str(tmp_path / "t1.nii.gz"), "flair": str(tmp_path / "gone.nii.gz")}
    row = Row("a", "done", outputs, kinds=("map", "labels", "map", "picture", "map"), inputs=inputs)
    found = volumes(tmp_path / "out", row)
    assert [(entry.name, entry.kind) for entry in found.entries] == [
        ("t1", "image"), ("labels", "labels"), ("probabilities: background", "map"), ("probabilities: ball", "map"),
    ]  # fmt: skip
    image, about = copied(found, 3, tmp_path / "c.nii")
    assert np.array_equal(np.asarray(image.dataobj), read(tmp_path / "out/a_probabilities.nii.gz")[..., 1])
    assert (about["low"], about["high"]) == (0.0, 1.0)
    with pytest.raises(InputError, match="there is no number 4"):
        found.copy(4)
    assert (
        framed(found, 0, packed=True)[4 + int.from_bytes(framed(found, 0, packed=True)[:4], "little") :][:2]
        == b"\x1f\x8b"
    )
