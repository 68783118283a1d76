"""Tests outputs smaller than their patches: by a whole factor, or by the border that valid convolutions lose."""

from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Server, checked
from hypothesis import example, given, settings
from hypothesis import strategies as st
from synthetic import noise, read, save
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d, conv3d, pad

from voxquilt import predict_volume
from voxquilt.data.discovery import SubjectFiles
from voxquilt.data.grid_sampler import GridSampler
from voxquilt.data.preprocess import Preprocess
from voxquilt.data.subject import ScalarImage, Subject
from voxquilt.errors import ConfigError, GridError, PatchShapeError
from voxquilt.geometry.output_layout import factor_of, halo_of
from voxquilt.models.patch_network import PatchNetwork
from voxquilt.planning.network_check import check_network, find_halo
from voxquilt.stitching.stitch import Stitch

MODES = ["crop", "average", "hann", "gaussian"]


class Valid(nn.Module):
    """Two valid convolutions: the output lacks a border."""

    def __init__(self, kernel: int | tuple[int, int, int] = 3, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv3d(1, 4, kernel), nn.ReLU(), nn.Conv3d(4, classes, kernel))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x / 50 - 1)


class Pooling(nn.Module):
    """Pools and upsamples by 4; voxels at the end of a patch that 4 does not divide are lost."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(avg_pool3d(x, 4), scale_factor=4.0)


@pytest.fixture
def one(tmp_path: Path) -> list[SubjectFiles]:
    """A subject with one channel, listed after one that cannot be read."""
    save(tmp_path / "b.nii", noise((4, 4, 4)))
    return [SubjectFiles(name, {"image": tmp_path / f"{name}.nii"}) for name in "ab"]


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(*[st.integers(1, 13)] * 3),
    st.tuples(*[st.integers(1, 4)] * 3),
    st.tuples(*[st.integers(1, 6)] * 3),
    st.sampled_from(MODES),
    st.booleans(),
    st.sampled_from([None, 7.0]),
    st.integers(1, 3),
    st.integers(0, 2**32 - 1),
)
@example((13, 13, 13), (3, 3, 3), (4, 4, 4), "crop", False, None, 2, 0)
def test_cropped_patch_outputs_join_to_the_output_of_the_whole_volume(
    shape: tuple[int, int, int],
    kernel: tuple[int, int, int],
    left: tuple[int, int, int],
    mode: str,
    overlaps: bool,
    padding: float | None,
    batch_size: int,
    seed: int,
) -> None:
    """For valid convolutions with any kernel, even sizes included, and any patch; padding surrounds the volume."""
    random = np.random.default_rng(seed)
    weight = torch.from_numpy(random.normal(size=(2, 1, *kernel))).float()
    volume = torch.from_numpy(random.normal(size=(1, *shape))).float()
    lost = [k - 1 for k in kernel]
    around = [n for k in reversed(lost) for n in (k // 2, k - k // 2)]
    whole = conv3d(pad(volume, around, value=padding or 0.0)[None], weight)[0]
    patch = [n + k for n, k in zip(left, lost, strict=True)]
    overlap = [(n - 1) // 2 * 2 if overlaps else 0 for n in left]
    made = predict_volume(
        lambda x: conv3d(x, weight), Subject(t1=ScalarImage(volume)), patch, overlap, batch_size=batch_size,
        padding_mode=padding, preprocess=Preprocess(None), stitch=Stitch(mode, ["logits"]), output="cropped",
    )  # fmt: skip
    np.testing.assert_allclose(made["logits"], whole, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=40)
@given(st.tuples(*[st.integers(3, 12)] * 3), st.tuples(*[st.integers(0, 2)] * 6), st.integers(0, 2**32 - 1))
def test_a_patch_is_its_grid_location_extended_by_the_halo(
    shape: tuple[int, int, int], halo: tuple[int, ...], seed: int
) -> None:
    """The patch's affine is that of its first voxel, which may lie outside the volume."""
    volume = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, *shape)))
    around = ((halo[0], halo[1]), (halo[2], halo[3]), (halo[4], halo[5]))
    patch = [2 + sum(pair) for pair in around]
    sampler = GridSampler(Subject(t1=ScalarImage(volume)), patch, 0, halo=around)
    padded = pad(volume, [n for pair in reversed(around) for n in pair])
    assert sampler.patch_size == tuple(patch)
    for n, item in enumerate(sampler):
        i, j, k, *ends = item["location"].tolist()
        assert [e - s for e, s in zip(ends, (i, j, k), strict=True)] == [2, 2, 2]
        seen = padded[:, i : i + patch[0], j : j + patch[1], k : k + patch[2]]
        assert torch.equal(item["t1"]["data"], seen)
        assert torch.equal(sampler.cut("t1", n), seen)
        first = np.array([i, j, k]) - [before for before, _ in around]
        np.testing.assert_array_equal(item["t1"]["affine"][:3, 3], first)


def test_a_halo_that_fills_the_patch_is_refused() -> None:
    """No voxel would be left to predict."""
    with pytest.raises(GridError, match="are all halo"):
        GridSampler(Subject(t1=ScalarImage(torch.zeros(1, 8, 8, 8))), 4, 0, halo=((2, 2), (1, 1), (1, 1)))


@pytest.mark.parametrize(
    ("layout", "shape", "patch", "factor"),
    [
        ("auto", (8, 8, 8), (8, 8, 8), (1, 1, 1)),
        ("auto", (4, 4, 4), (8, 8, 8), (2, 2, 2)),
        ("auto", (3, 4, 5), (6, 8, 10), (2, 2, 2)),
        ("auto", (4, 4, 1), (8, 8, 1), (2, 2, 1)),  # of a 2-D network
        ("auto", (8, 8, 4), (8, 8, 8), None),
        ("auto", (4, 4, 4), (8, 8, 12), None),
        ("auto", (6, 6, 6), (8, 8, 8), None),
        ("auto", (9, 9, 9), (8, 8, 8), None),
        ("resampled", (8, 8, 4), (8, 8, 8), (1, 1, 2)),
        ("resampled", (8, 8, 3), (8, 8, 8), None),
        ("cropped", (8, 8, 8), (8, 8, 8), (1, 1, 1)),
        ("cropped", (4, 4, 4), (8, 8, 8), None),
    ],
)
def test_a_factor_is_inferred_only_if_it_is_the_same_along_all_axes(
    layout: str, shape: tuple[int, ...], patch: tuple[int, int, int], factor: tuple[int, int, int] | None
) -> None:
    """Unequal factors must be configured, since the difference may as well be a lost border."""
    if factor is not None:
        assert factor_of(layout, "", (1, 2, *shape), patch) == factor
        return
    with pytest.raises(PatchShapeError, match="the network's output"):
        factor_of(layout, "", (1, 2, *shape), patch)


def test_outputs_that_lack_different_borders_are_refused() -> None:
    """Each would need patches of its own. Under flips, an odd border is refused too."""
    with pytest.raises(PatchShapeError, match="lack the same border"):
        halo_of({"a": (1, 2, 4, 4, 4), "b": (1, 2, 6, 6, 6)}, (8, 8, 8))
    with pytest.raises(PatchShapeError, match="axis j, an odd number"):
        halo_of({"": (1, 2, 6, 5, 6)}, (8, 8, 8), flips=[1])
    assert halo_of({"": (1, 2, 6, 5, 6)}, (8, 8, 8), flips=[0]) == ((1, 1), (1, 2), (1, 1))


@pytest.mark.parametrize("patch", [8, 12, 9])
def test_valid_convolutions_are_not_mistaken_for_a_lower_resolution(patch: int) -> None:
    """A step from 8 to 4 voxels could be either; a larger patch decides, and the message says what to set."""
    network = PatchNetwork([Valid()])
    with pytest.raises(ConfigError, match=r"model\.output=cropped"):
        check_network(network, ["t1"], 1, (patch,) * 3, None)
    half = PatchNetwork([nn.AvgPool3d(2)])
    assert check_network(half, ["t1"], 1, (8, 8, 8), None) is not None


def test_voxels_that_pooling_drops_are_not_a_halo(one: list[SubjectFiles]) -> None:
    """The message suggests a patch size at which pooling loses nothing."""
    network = PatchNetwork([Pooling()], output="cropped")
    with pytest.raises(ConfigError, match=r"Set data.patch_size=\[16, 16, 16\]"):
        find_halo(network, one, (14, 14, 14))
    assert find_halo(network, one, (16, 16, 16)) == ((0, 0),) * 3
    with pytest.raises(ConfigError, match=r"multiple of 4 .*\n?.*data.patch_size=\[16, 16, 16\] would work"):
        check_network(PatchNetwork([Pooling()]), ["t1"], 1, (14, 14, 14), None)


def test_a_network_that_depends_on_values_is_probed_with_a_forward_pass(one: list[SubjectFiles]) -> None:
    """Its output shape cannot be inferred from shapes alone."""

    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[..., 1:-1] if float(x.sum()) == 0 else x[..., 1:-1] + 0

    assert find_halo(PatchNetwork([Looks()]), one, (4, 4, 4)) == ((0, 0), (0, 0), (1, 1))


JOB = ("data.inputs=in", "model=state_dict", "ckpt_path=null", "trainer=cpu", "model.net._target_=networks.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two subjects whose shapes are not multiples of any patch."""
    folder = tmp_path_factory.mktemp("layout")
    for name, shape in {"a": (13, 11, 9), "b": (6, 17, 5)}.items():
        save(folder / f"in/{name}.nii.gz", noise(shape))
    return folder


@pytest.mark.parametrize("more", [(), ("data.patch_overlap=2", "data.batch_size=3"), ("trainer.devices=2",)])
def test_the_command_predicts_with_valid_convolutions(folder: Path, forks: Server, more: tuple[str, ...]) -> None:
    """Labels are exactly x > 50 up to the border, with one process and with two that share each volume."""
    slab = ("trainer.strategy=ddp_spawn", "run.distribute=slab") if "trainer.devices=2" in more else ()
    out = f"out{len(more)}{len(slab)}"
    job = (*JOB[:-1], f"{JOB[-1]}ValidOver50", "model.output=cropped", "data.patch_size=8")
    run = forks.start(*job, *more, *slab, f"output_dir={out}", cwd=folder)
    assert checked(run.wait(120)) == 0, run.text
    assert "without a border of [4, 4, 4] voxels in all" in run.text
    for name in "ab":
        np.testing.assert_array_equal(
            read(folder / out / f"{name}_labels.nii.gz"), read(folder / f"in/{name}.nii.gz") > 50
        )


@pytest.mark.parametrize("option", ["model.output=auto", "model.output=resampled", "model.output=crop"])
def test_the_command_refuses_valid_convolutions_without_model_output_cropped(
    folder: Path, forks: Server, option: str
) -> None:
    """One message, status 2, nothing started. From 8 to 4 voxels is not half the resolution unless configured."""
    size = 8 if option.endswith("auto") else 9
    job = (*JOB[:-1], f"{JOB[-1]}ValidOver50", option, f"data.patch_size={size}", "output_dir=refused")
    run = forks.start(*job, cwd=folder)
    assert checked(run.wait()) == 2, run.text
    assert "cropped" in run.text
    assert "Traceback" not in run.text
    assert not (folder / "refused/manifest.csv").exists()


def test_plan_and_log_state_how_a_smaller_output_is_interpreted(folder: Path, forks: Server) -> None:
    """Here as half the resolution along all axes."""
    job = (*JOB[:-1], "model.net._target_=torch.nn.AvgPool3d", "model.net.kernel_size=2", "data.patch_size=8")
    for more in (("run.dry_run=true",), ()):
        run = forks.start(*job, *more, "data.divisible_by=2", "output_dir=half", cwd=folder)
        assert checked(run.wait()) == 0, run.text
        assert "(2, 2, 2) times the voxel size (model.output=resampled)" in " ".join(run.text.split())
