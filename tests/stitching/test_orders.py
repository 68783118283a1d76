"""Tests orders of interpolation, slices by themselves and boxes of native space, from patches to products."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from voxquilt.data.foreground import patches_to_predict
from voxquilt.data.grid_sampler import GridSampler
from voxquilt.data.preprocess import Preprocess
from voxquilt.data.subject import ScalarImage, Subject
from voxquilt.errors import ConfigError
from voxquilt.geometry.resample import resample
from voxquilt.geometry.slab_split import split_rows
from voxquilt.geometry.space import Space
from voxquilt.predict import predict_volume
from voxquilt.stitching.stitch import Stitch
from voxquilt.stitching.subject_stitcher import SubjectStitcher

AFFINE = np.diag([-1.0, 1, 4, 1])
PRODUCTS = ["labels", "logits", "probabilities", "entropy"]
ORDERS, PER_SLICE = st.sampled_from([0, 1, 3]), st.sampled_from([None, 3, True])


def pointwise(x: Tensor) -> Tensor:
    return torch.cat([0.5 - x, x - 0.5, 0.1 - 3 * x.abs()], 1)


def subject_of(shape: tuple[int, int, int], seed: int) -> Subject:
    """Noise with margins of 0, which a crop leaves out."""
    volume = torch.from_numpy(np.random.default_rng(seed).normal(0.4, 1, (1, *shape))).float()
    volume[:, : shape[0] // 5], volume[..., shape[2] - shape[2] // 4 :] = 0, 0
    return Subject(t1=ScalarImage(tensor=volume, affine=AFFINE))


def slow(subject: Subject, preprocess: Preprocess, stitch: Stitch) -> tuple[Space, np.ndarray]:
    """Logits of the whole volume, without patches, in the box."""
    model, space = preprocess(subject)
    scores = pointwise(model["t1"].data[None].float())[0]
    return space, resample(scores, space.in_scores([(0, 0)] * 3, (1, 1, 1), stitch.order, stitch.per_slice)).numpy()


@given(
    st.tuples(st.integers(3, 14), st.integers(3, 11), st.integers(3, 9)), ORDERS, PER_SLICE,
    st.sampled_from(["scores", "labels"]), st.sampled_from([None, "nonzero"]), st.integers(0, 999),
)  # fmt: skip
@example((14, 11, 9), 3, 3, "labels", "nonzero", 0)
@settings(deadline=None, max_examples=60)
def test_products_are_those_of_the_whole_volumes_scores(
    shape: tuple[int, int, int], order: int, per_slice: float | bool | None, restore: str, crop: str | None, seed: int
) -> None:
    """For every order, with slices by themselves, in a crop, and for labels that are made in model space."""
    subject = subject_of(shape, seed)
    preprocess = Preprocess("RAS", (1.7, 1.3, 2.5), grid="corner", crop=crop, interpolation=order, per_slice=per_slice)
    stitch = Stitch("nnunet", PRODUCTS, order=order, per_slice=per_slice, restore=restore)
    made = predict_volume(pointwise, subject, 4, 2, preprocess=preprocess, stitch=stitch)
    space, logits = slow(subject, preprocess, stitch)
    np.testing.assert_allclose(made["logits"][:, *space.where], logits, rtol=0, atol=2e-5)
    total = made["probabilities"].sum(0)
    np.testing.assert_allclose(total, 1, rtol=0, atol=1e-5)
    if restore == "scores":
        best = np.sort(logits, 0)
        sure = best[-1] - best[-2] > 1e-3
        np.testing.assert_array_equal(made["labels"][0][space.where][sure], logits.argmax(0)[sure])
        return
    model, _ = preprocess(subject)
    classes = pointwise(model["t1"].data[None].float())[0]
    first, second = classes.sort(0).values[-1], classes.sort(0).values[-2]
    maps = space.in_scores([(0, 0)] * 3, (1, 1, 1), order, per_slice)
    near = resample(torch.stack([classes.argmax(0).float(), (first - second > 1e-3).float()]), maps, linear=False)
    sure = near[1].numpy() > 0
    np.testing.assert_array_equal(made["labels"][0][space.where][sure], near[0].numpy()[sure])


@pytest.mark.parametrize("restore", ["scores", "labels"])
def test_products_of_model_space_do_not_swing_below_their_range(restore: str) -> None:
    """Disagreement and entropy are at least 0, also with a cubic spline of scores."""
    generator = torch.Generator().manual_seed(0)

    def disagreeing(x: Tensor) -> Tensor:
        return pointwise(x) * (1 + (torch.rand(1, generator=generator) > 0.5) * 60)

    subject = subject_of((16, 12, 9), 1)
    preprocess = Preprocess("RAS", (2.3, 1.9, 3), grid="corner", interpolation=3)
    stitch = Stitch("average", ["disagreement", "entropy"], order=3, restore=restore)
    made = predict_volume(disagreeing, subject, 4, 2, preprocess=preprocess, stitch=stitch)
    assert made["disagreement"].max() > 0.01
    assert made["disagreement"].min() >= 0
    assert made["entropy"].min() >= 0


def quilts(subject: Subject, preprocess: Preprocess, stitch: Stitch, ranks: int) -> list[SubjectStitcher]:
    model, space = preprocess(subject)
    sampler = GridSampler(model, 4, placement="even", step=0.5, fit=True)
    parts = split_rows(sampler.grid, ranks)
    team = [SubjectStitcher(stitch, sampler, space, part=part, holds_all=n == 0) for n, part in enumerate(parts)]
    for part, quilt in zip(parts, team, strict=True):
        for number in patches_to_predict(sampler, [], part):
            quilt.add({"": pointwise(sampler.cut("t1", number)[None].float())}, [number])
    return team


@given(
    st.tuples(st.integers(6, 20), st.integers(4, 11), st.integers(3, 9)), st.sampled_from([0, 1]), PER_SLICE,
    st.sampled_from([None, "nonzero"]), st.integers(2, 4), st.integers(0, 999),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_parts_in_a_box_are_put_together_to_the_volumes_of_one_process(
    shape: tuple[int, int, int], order: int, per_slice: float | bool | None, crop: str | None, ranks: int, seed: int
) -> None:
    """Background before, behind and beside the box included."""
    subject = subject_of(shape, seed)
    preprocess = Preprocess("RAS", (1.7, 1.3, 2.5), grid="corner", crop=crop)
    stitch = Stitch("nnunet", PRODUCTS, order=order, per_slice=per_slice)
    (one,) = quilts(subject, preprocess, stitch, 1)
    team = quilts(subject, preprocess, stitch, ranks)
    for quilt, following in reversed(list(pairwise(team))):
        quilt.join(following.head() or [])
    for quilt in team[1:]:
        for name, where, array in quilt.parts():
            team[0].place(name, where, array)
    wanted, made = one.volumes(), team[0].volumes()
    best = np.sort(wanted["logits"], 0)
    for name in PRODUCTS:
        if name == "labels":
            sure = best[-1] - best[-2] > 1e-4
            np.testing.assert_array_equal(made[name][0][sure], wanted[name][0][sure])
        else:
            np.testing.assert_allclose(made[name], wanted[name], rtol=0, atol=1e-5, err_msg=name)


def test_parts_refuse_a_cubic_spline_of_scores() -> None:
    """Which needs more planes of the part that follows; without it planes would be missing, or come twice."""
    subject, stitch = subject_of((20, 8, 6), 0), Stitch(order=3)
    preprocess = Preprocess("RAS", (1.7, 1.3, 2.5))
    with pytest.raises(ConfigError, match=r"stitch\.order=3 goes with whole volumes"):
        quilts(subject, preprocess, stitch, 2)
    assert quilts(subject, preprocess, stitch, 1)[0].volumes()


@pytest.mark.parametrize("crop", [None, "nonzero"])
@pytest.mark.parametrize("order", [0, 1, 3])
def test_a_smaller_output_is_restored_in_a_crop(order: int, crop: str | None) -> None:
    """Voxels of the output lie in the middle of the model's; around the crop all is background."""
    subject = subject_of((16, 12, 8), 3)
    preprocess = Preprocess(None, crop=crop)
    stitch = Stitch("average", ["logits"], order=order)
    made = predict_volume(
        lambda x: pointwise(torch.nn.functional.avg_pool3d(x, 2)), subject, 4, 0, preprocess=preprocess, stitch=stitch,
        divisible_by=4,
    )["logits"]  # fmt: skip
    model, space = preprocess(subject)
    sampler = GridSampler(model, 4, fit=True, divisible_by=4)
    scores = pointwise(torch.nn.functional.avg_pool3d(sampler.volume("t1")[None].float(), 2))[0]
    wanted = resample(scores, space.in_scores(sampler.padding, (2, 2, 2), order))
    np.testing.assert_allclose(made[:, *space.where], wanted, rtol=0, atol=2e-5)
    outside = np.ones(made.shape[1:], bool)
    outside[space.where] = False
    assert outside.any() == (crop is not None)
    assert (made[0][outside] == 0).all()
    assert (made[1:, outside] == -30).all()
