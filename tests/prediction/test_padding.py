"""Tests that padding never changes a native voxel, for every product, every way of restoring, and slabs."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import avg_pool3d

from voxquilt import predict_volume
from voxquilt.data.foreground import patches_to_predict
from voxquilt.data.grid_sampler import GridSampler
from voxquilt.data.preprocess import Preprocess
from voxquilt.data.subject import ScalarImage, Subject
from voxquilt.geometry.resample import resample
from voxquilt.geometry.slab_split import split_rows
from voxquilt.geometry.space import make_space
from voxquilt.stitching.products.spec import make_products
from voxquilt.stitching.stitch import Stitch
from voxquilt.stitching.subject_stitcher import SubjectStitcher

SPACINGS = st.tuples(*[st.sampled_from([None, 0.7, 1.7, 2.05, 3.0, 4.6])] * 3)
PRODUCTS = ["logits", "labels", "probabilities", "entropy", "disagreement"]


def pointwise(x: Tensor) -> Tensor:
    """Scores that are far off in the padding, which holds -1000."""
    return torch.cat([0.5 - x, x - 0.5, 0.1 - 3 * x.abs()], 1)


def slow(subject: Subject, preprocess: Preprocess, name: str, restore: str) -> np.ndarray:
    """A product of the whole volume's scores, without patches and padding."""
    in_model, space = preprocess(subject)
    scores = pointwise(in_model["t1"].data[None].float())[0]
    product = make_products([name], len(scores))[name].product
    if name == "disagreement":
        return np.zeros((1, *subject.spatial_shape), np.float32)
    if name == "labels" and restore == "labels":
        return resample(product(scores).to(torch.uint8), space.maps, linear=False).numpy()
    return product(resample(scores, space.maps)).numpy()


def certain(subject: Subject, preprocess: Preprocess, restore: str) -> np.ndarray:
    """Where rounding cannot change a label: by the scores there, or for 'labels' at the nearest model voxel."""
    in_model, space = preprocess(subject)
    scores = pointwise(in_model["t1"].data[None].float())[0]
    scores = scores if restore == "labels" else resample(scores, space.maps)
    best = scores.sort(0).values
    sure = (best[-1:] - best[-2:-1] > 1e-4).to(torch.uint8)
    sure = resample(sure, space.maps, linear=False) if restore == "labels" else sure
    return sure[0].numpy().astype(bool)


def in_slabs(subject: Subject, preprocess: Preprocess, sampler: GridSampler, stitch: Stitch, ranks: int) -> dict:
    """The volumes of several processes, run one after the other."""
    space = preprocess.space(subject)
    parts = split_rows(sampler.grid, ranks)
    quilts = [SubjectStitcher(stitch, sampler, space, part=part, holds_all=n == 0) for n, part in enumerate(parts)]
    for part, quilt in zip(parts, quilts, strict=True):
        for number in patches_to_predict(sampler, [], part):
            quilt.add({"": pointwise(sampler.cut("t1", number)[None].float())}, [number])
    for quilt, following in reversed(list(pairwise(quilts))):
        quilt.join(following.head() or [])
    for quilt in quilts[1:]:
        for name, where, array in quilt.parts():
            quilts[0].place(name, where, array)
    return quilts[0].volumes()


@settings(deadline=None)
@given(
    st.tuples(*[st.integers(1, 14)] * 3),
    SPACINGS,
    st.sampled_from(["RAS", "PIR", "LSA"]),
    st.sampled_from([2, 5, 8, (3, 16, 4)]),
    st.sampled_from([(None, 1), (-1000, 1), (-1000, 5), (None, (4, 7, 1))]),
    st.sampled_from(["crop", "average", "hann", "gaussian"]),
    st.sampled_from(["scores", "labels"]),
    st.integers(1, 3),
    st.integers(0, 2**32 - 1),
)
@example((22, 22, 22), (2.05, 2.05, 2.05), "RAS", 16, (None, 1), "gaussian", "scores", 1, 0)
@example((12, 5, 5), (3.0, None, None), "RAS", 2, (-1000, 5), "hann", "labels", 3, 0)
def test_padding_never_changes_a_native_voxel(
    shape: tuple[int, int, int],
    spacing: tuple[float | None, ...],
    orientation: str,
    patch: int | tuple[int, int, int],
    padding: tuple[float | None, int | tuple[int, int, int]],
    mode: str,
    restore: str,
    ranks: int,
    seed: int,
) -> None:
    """Every voxel equals the result from the volume's own scores; beyond the outermost centres, these are repeated."""
    mode_of_padding, multiple = padding
    value = -1000 if mode_of_padding is None else mode_of_padding
    volume = torch.from_numpy(np.random.default_rng(seed).normal(1, 2, (1, *shape)))
    affine = np.diag([-1.0, 1.0, 1.0, 1.0])
    subject = Subject(t1=ScalarImage(tensor=volume, affine=affine))
    preprocess = Preprocess(orientation, spacing, [lambda x: x])
    stitch = Stitch(mode, PRODUCTS, restore=restore)
    in_model, _ = preprocess(subject)
    sampler = GridSampler(in_model, patch, 2 if patch != 2 else 0, value, fit=True, divisible_by=multiple)
    if ranks == 1:
        made = predict_volume(
            pointwise, subject, patch, sampler.grid.patch_overlap,
            padding_mode=mode_of_padding, divisible_by=multiple, preprocess=preprocess, stitch=stitch,
        )  # fmt: skip
    else:
        made = in_slabs(subject, preprocess, sampler, stitch, ranks)
    sure = certain(subject, preprocess, restore)
    for name in PRODUCTS:
        wanted = slow(subject, preprocess, name, restore)
        if name == "labels":
            np.testing.assert_array_equal(made[name][0][sure], wanted[0][sure])
            assert (~sure).sum() < max(0.1 * sure.size, 8)  # of a volume of a few voxels, some may be ties
        else:
            np.testing.assert_allclose(made[name], wanted, rtol=1e-4, atol=2e-4, err_msg=name)


@pytest.mark.parametrize(
    ("size", "mm", "spacing", "patch"), [(22, 0.6, 2.05, 16), (27, 0.4, 4.6, 8), (60, 1.0, 3.0, 24), (9, 1.0, 1.0, 16)]
)
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_a_volume_of_one_class_is_labelled_up_to_its_border(
    size: int, mm: float, spacing: float, patch: int, factor: int
) -> None:
    """Also if the border voxels of a smaller output average padding, while the volume fills one of them."""
    network: Callable[[Tensor], Tensor] = lambda x: avg_pool3d(torch.cat([0.9 - x, x - 0.9], 1), factor)  # noqa: E731
    subject = Subject(t1=ScalarImage(tensor=torch.ones(1, *[size] * 3), affine=np.diag([mm, mm, mm, 1])))
    made = predict_volume(network, subject, patch, divisible_by=patch, preprocess=Preprocess(spacing=spacing))
    if make_space(subject.frame, "RAS", spacing).model.shape[0] >= 2 * factor - 1:
        assert (made["labels"] == 1).all()


def test_scores_of_the_padding_need_not_be_finite() -> None:
    """A network that divides by the padding's zeros fails no subject, for products in either space."""
    subject = Subject(t1=ScalarImage(tensor=torch.ones(1, 5, 5, 5)))
    for restore in ("scores", "labels"):
        made = predict_volume(
            lambda x: torch.cat([x / x, 2 * x / x], 1), subject, 8, stitch=Stitch("crop", restore=restore)
        )
        assert (made["labels"] == 1).all()


def test_beyond_the_outermost_centres_the_outermost_value_is_repeated() -> None:
    """A ramp of six voxels of 1 mm as two of 3 mm, whose centres lie at voxels 1 and 4."""
    ramp = torch.arange(6.0).reshape(1, 6, 1, 1)
    made = predict_volume(
        lambda x: x, Subject(t1=ScalarImage(ramp)), (8, 1, 1), preprocess=Preprocess(spacing=(3, None, None))
    )
    assert made["image"].flatten().tolist() == pytest.approx([1, 1, 2, 3, 4, 4])
