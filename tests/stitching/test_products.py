"""Tests products: how scores at native resolution become labels, probabilities, images and measures of uncertainty."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import zoom
from synthetic import unpacked
from torch import Tensor
from torch.nn.functional import avg_pool3d

from voxquilt import predict_volume
from voxquilt.data.formats.nifti import write
from voxquilt.data.grid_sampler import GridSampler
from voxquilt.data.preprocess import Preprocess
from voxquilt.data.subject import LabelMap, ScalarImage, Subject
from voxquilt.errors import ConfigError, GridError, OutputError, PatchShapeError
from voxquilt.geometry.resample import resample
from voxquilt.geometry.streamed_resample import Piece
from voxquilt.stitching.aggregator import GridAggregator
from voxquilt.stitching.blend import to_blend
from voxquilt.stitching.output_rings import Memory
from voxquilt.stitching.output_volumes import OutputVolumes, Scratch
from voxquilt.stitching.products.labels import ArgMax, contenders
from voxquilt.stitching.products.spec import make_products
from voxquilt.stitching.stitch import Stitch
from voxquilt.stitching.subject_stitcher import SubjectStitcher

SEEDS = st.integers(0, 2**32 - 1)
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def products_of(scores: Tensor, names: Sequence[str] | None = None, **options: object) -> dict[str, np.ndarray]:
    """Products in the scores' own space."""
    products = make_products(names, len(scores), **options)  # type: ignore[arg-type]
    _, i, j, k = scores.shape
    volumes = OutputVolumes({name: spec.product for name, spec in products.items()}, len(scores), (i, j, k))
    for name, spec in products.items():
        volumes.store(name, (slice(0, i), slice(0, j), slice(0, k)), spec.product(scores))
    return volumes.arrays


# Labels.


@given(
    st.integers(2, 9),
    st.tuples(*[st.integers(1, 5)] * 3),
    st.sampled_from([torch.uint8, torch.int64, *FLOATS]),
    st.sampled_from([3, 10_000]),
    SEEDS,
)
@settings(deadline=None, max_examples=80)
def test_labels_are_the_arg_max(
    classes: int, shape: tuple[int, int, int], dtype: torch.dtype, values: int, seed: int
) -> None:
    """As numpy's: the class with the highest score, and the first of those that tie."""
    scores = torch.from_numpy(np.random.default_rng(seed).integers(0, values, (classes, *shape))).to(dtype)
    (labels,) = products_of(scores).values()
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, scores.double().numpy().argmax(0)[None])


@pytest.mark.parametrize("classes", [2, 3, 40])
def test_ties_go_to_the_first_class(classes: int) -> None:
    """Background where all scores are equal, else the first of the classes that tie."""
    scores = torch.zeros(classes, 33, 17, 9)
    assert not products_of(scores)["labels"].any()
    scores[-2:] = 1
    assert (products_of(scores)["labels"] == classes - 2).all()


@pytest.mark.parametrize(("classes", "dtype"), [(2, np.uint8), (256, np.uint8), (257, np.uint16), (65_537, np.uint32)])
def test_labels_have_the_smallest_type_that_holds_all_classes(classes: int, dtype: type) -> None:
    """By the number of possible classes, so that all subjects of a run share a type."""
    assert ArgMax().form(classes) == (1, np.dtype(dtype))
    for best in (0, classes - 1):
        scores = torch.zeros(classes, 1, 2, 1)
        scores[best] = 1
        labels = products_of(scores)["labels"]
        assert labels.dtype == dtype
        assert labels.tolist() == [[[[best], [best]]]]


@pytest.mark.parametrize(
    ("activation", "threshold", "limit"), [(None, 0.3, 0.3), ("none", 2.0, 2.0), ("sigmoid", 0.25, np.log(1 / 3))]
)
def test_one_channel_is_thresholded(activation: str | None, threshold: float, limit: float) -> None:
    """Label 1 where the activated score is strictly above the threshold."""
    scores = torch.tensor([-3, limit - 1e-3, limit, limit + 1e-3, 3], dtype=torch.float64).reshape(1, 5, 1, 1)
    labels = products_of(scores, activation=activation, threshold=threshold)["labels"]
    assert labels.dtype == np.uint8
    assert labels[0, [0, 1, 3, 4], 0, 0].tolist() == [0, 0, 1, 1]
    if activation != "sigmoid":
        assert labels[0, 2, 0, 0] == 0


def test_sigmoid_gives_one_binary_volume_per_label() -> None:
    """Each channel is thresholded separately, at 0.5 by default: (C, I, J, K) of 0 and 1."""
    scores = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 4, 5, 6)))
    labels = products_of(scores, activation="sigmoid")["labels"]
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, scores.numpy() > 0)
    labels = products_of(scores, activation="sigmoid", threshold=0.9)["labels"]
    np.testing.assert_array_equal(labels, scores.numpy() > np.log(9))


# Probabilities, logits, images.


@given(st.integers(2, 6), st.sampled_from(FLOATS), SEEDS)
@settings(deadline=None, max_examples=40)
def test_probabilities_are_the_soft_max_and_sum_to_1(channels: int, dtype: torch.dtype, seed: int) -> None:
    """In float32 for scores of every type, also where exp would overflow."""
    scores = torch.from_numpy(np.random.default_rng(seed).normal(0, 300, (channels, 4, 3, 2))).to(dtype)
    probabilities = products_of(scores, ["probabilities"])["probabilities"]
    assert probabilities.dtype == np.float32
    assert probabilities.shape == scores.shape
    np.testing.assert_allclose(probabilities.sum(0), 1, rtol=0, atol=1e-6)
    rounded = scores.float().double().numpy()  # at 1,000, float64's scores lose 3e-5
    shifted = rounded - rounded.max(0)
    np.testing.assert_allclose(probabilities, np.exp(shifted) / np.exp(shifted).sum(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.uint8, torch.int32])
def test_float_products_are_float32_for_every_type_of_scores(dtype: torch.dtype) -> None:
    """Logits and images equal the scores; sigmoid probabilities lie in 0 to 1, for half and integer scores too."""
    scores = torch.arange(24).reshape(2, 3, 4, 1).to(dtype)
    made = products_of(scores, ["logits", "probabilities", "labels"], activation="sigmoid")
    assert {name: data.dtype for name, data in made.items()} == {
        "logits": np.float32,
        "probabilities": np.float32,
        "labels": np.uint8,
    }
    np.testing.assert_array_equal(made["logits"], scores.float())
    np.testing.assert_allclose(made["probabilities"], 1 / (1 + np.exp(-scores.double().numpy())), rtol=1e-6)
    (image,) = products_of(scores[:1]).values()
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image, scores[:1].float())


def test_probabilities_from_the_network_are_not_activated_again() -> None:
    """With activation=none, or =applied where they were activated before averaging."""
    scores = torch.from_numpy(np.random.default_rng(0).dirichlet([1, 1, 1], (2, 3, 4))).movedim(-1, 0).float()
    for activation in ("none", "applied"):
        made = products_of(scores, ["probabilities", "labels"], activation=activation)
        np.testing.assert_array_equal(made["probabilities"], scores)
        np.testing.assert_array_equal(made["labels"], scores.argmax(0, keepdim=True))


def test_volumes_have_the_memory_layout_of_files() -> None:
    """Axis i is contiguous, so that writing needs no copy."""
    volume = products_of(torch.rand(2, 3, 4, 5))["labels"]
    assert volume[0].flags.f_contiguous
    assert products_of(torch.rand(2, 3, 4, 5), ["logits"])["logits"].transpose(3, 2, 1, 0).flags.f_contiguous is False


# Defaults and errors.


@pytest.mark.parametrize(
    ("channels", "options", "names"),
    [
        (1, {}, ["image"]),
        (1, {"threshold": 0.5}, ["labels"]),
        (1, {"activation": "sigmoid", "threshold": 0.5}, ["labels"]),
        (2, {}, ["labels"]),
        (5, {"activation": "sigmoid"}, ["labels"]),
    ],
)
def test_the_default_product_depends_on_the_output(channels: int, options: dict, names: list[str]) -> None:
    """Labels for several channels or one with a threshold, else the image. An empty list counts as unset."""
    assert list(make_products(None, channels, **options)) == names
    assert list(make_products([], channels, **options)) == names


@pytest.mark.parametrize(
    ("names", "channels", "options", "message"),
    [
        (["labels"], 1, {}, r"one output channel need stitch\.threshold, such as 0\.5"),
        (["probabilities"], 1, {"activation": "softmax"}, r"1 everywhere; set model\.activation=sigmoid"),
        (["labels"], 1, {"activation": "softmax", "threshold": 0.5}, r"1 everywhere; set model\.activation=sigmoid"),
        (["labels"], 3, {"threshold": 0.5}, r"stitch\.threshold=0\.5 goes with one output channel.*3 channels"),
        (["logits"], 3, {"activation": "applied"}, r"no logits when model\.average=probabilities"),
    ],
)
def test_a_product_that_an_output_does_not_have_is_an_error(
    names: list[str], channels: int, options: dict, message: str
) -> None:
    """The message says which setting makes it possible."""
    with pytest.raises(OutputError, match=message):
        make_products(names, channels, **options)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"products": ["label"]}, r"products must be one of .* it is 'label'\. Did you mean labels"),
        ({"products": {"seg": ["labels", "entropie"]}}, "products must be one of"),
        ({"activation": "soft-max"}, r"activation must be one of .*Did you mean softmax"),
        ({"overlap_mode": "gauss"}, "overlap_mode must be one of"),
    ],
)
def test_a_stitch_refuses_unknown_words_on_construction(settings_: dict, message: str) -> None:
    """Before anything is predicted; the message suggests the nearest word."""
    with pytest.raises(ConfigError, match=message):
        Stitch(**settings_)


@pytest.mark.parametrize(
    ("value", "names"),
    [
        *(
            (value, [name])
            for value in (torch.nan, torch.inf, -torch.inf)
            for name in ("labels", "probabilities", "image")
        ),
        (torch.nan, ["disagreement"]),
        (torch.inf, ["disagreement"]),
    ],
)
@pytest.mark.parametrize("restore", ["scores", "labels"])
def test_non_finite_scores_are_an_error(value: float, names: list[str], restore: str) -> None:
    """A single NaN in the last slab is detected for every product; an arg-max would hide it."""
    image = torch.zeros(1, 40, 5, 5)
    image[0, 39, 4, 4] = 1
    with pytest.raises(OutputError, match="the network's output is NaN or infinite"):
        predicted(
            lambda x: torch.cat([torch.zeros_like(x), torch.where(x == 1, value, x)], 1),
            Subject(t1=ScalarImage(image)),
            5,
            2,
            stitch=Stitch("average", names, restore=restore),
        )


# From patches to native space.


def predicted(network: object, subject: Subject, patch: object = 4, overlap: object = 2, **options: object) -> dict:
    return predict_volume(network, subject, patch, overlap, **options)  # type: ignore[arg-type]


@given(
    st.tuples(*[st.integers(1, 9)] * 3),
    st.sampled_from(["crop", "average", "hann", "gaussian"]),
    st.sampled_from([None, "RAS", "LPI", "SAL", "PIR"]),
    st.sampled_from([None, "reflect", 0]),
    st.integers(1, 5),
    SEEDS,
)
@settings(deadline=None, max_examples=60)
def test_an_identity_network_gives_the_image_back(
    shape: tuple[int, int, int],
    mode: str,
    orientation: str | None,
    padding: str | int | None,
    batch_size: int,
    seed: int,
) -> None:
    """From cutting to native space, also for a volume smaller than a patch; exact for crop."""
    volume = torch.from_numpy(np.random.default_rng(seed).normal(0, 100, (1, *shape))).float()
    subject = Subject(t1=ScalarImage(tensor=volume, affine=LPS))
    made = predicted(
        lambda x: x,
        subject,
        padding_mode=padding,
        batch_size=batch_size,
        preprocess=Preprocess(orientation),
        stitch=Stitch(mode),
    )
    assert list(made) == ["image"]
    np.testing.assert_allclose(made["image"], volume, rtol=0, atol=0 if mode == "crop" else 2e-4)


def test_input_channels_follow_the_order_of_images() -> None:
    """The two channels of t1, then that of flair, for any mix of types."""
    data = torch.from_numpy(np.random.default_rng(0).integers(0, 100, (3, 5, 6, 7)))
    subject = Subject(t1=ScalarImage(data[:2].short()), flair=ScalarImage(data[2:].float()))
    seen = []
    logits = predicted(lambda x: seen.append(x.dtype) or x, subject, stitch=Stitch("crop", ["logits"]))["logits"]
    assert set(seen) == {torch.float32}
    np.testing.assert_array_equal(logits, data.float())


def test_scores_are_interpolated_before_labels_are_taken() -> None:
    """Between voxels of class 0 and 1 lies class 2, the second choice of both."""
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.9]])
    subject = Subject(t1=ScalarImage(torch.zeros(1, 4, 1, 1)))
    made = predicted(
        lambda x: scores.reshape(1, 3, 2, 1, 1).expand(len(x), -1, -1, -1, -1),
        subject,
        (2, 1, 1),
        0,
        preprocess=Preprocess(spacing=(2, None, None)),
    )
    # Native voxels lie at -1/4, 1/4, 3/4 and 5/4 of the two model voxels.
    at = [0, 0.25, 0.75, 1]
    expected = [int(np.argmax([1 - x, x, 0.9])) for x in at]
    assert expected == [0, 2, 2, 1]
    assert made["labels"].flatten().tolist() == expected


@pytest.mark.parametrize("mode", ["crop", "average", "hann", "gaussian"])
@pytest.mark.parametrize("factor", [(2, 2, 2), (4, 1, 2)])
def test_an_output_smaller_than_its_patch_is_restored_in_place(mode: str, factor: tuple[int, int, int]) -> None:
    """Means over `factor` voxels of a ramp, padded and overlapping, in LPS: the ramp again, except at the border."""
    i, j, k = np.indices((17, 14, 12)).astype(np.float32)
    ramp = 3 * i - 2 * j + k
    subject = Subject(t1=ScalarImage(tensor=torch.from_numpy(ramp), affine=LPS))
    made = predicted(
        lambda x: avg_pool3d(x, factor),
        subject,
        8,
        4,
        padding_mode="edge",
        divisible_by=factor,
        stitch=Stitch(mode),
        output="resampled" if len(set(factor)) > 1 else "auto",
    )
    inner = (0, *[slice(4, -4)] * 3)
    np.testing.assert_allclose(made["image"][inner], ramp[inner[1:]], rtol=0, atol=1e-4)


def test_a_volume_that_is_not_a_multiple_of_the_factor_is_refused() -> None:
    """The GridError says what must be a multiple; divisible_by is the remedy."""
    subject = Subject(t1=ScalarImage(torch.zeros(1, 9, 8, 8)))
    with pytest.raises(GridError, match="axis i: volume 9 is not a multiple of downsampling_factor 2"):
        predicted(lambda x: avg_pool3d(x, 2), subject)
    assert predicted(lambda x: avg_pool3d(x, 2), subject, divisible_by=2)["image"].shape == (1, 9, 8, 8)


def test_named_outputs_have_products_and_resolutions_of_their_own() -> None:
    """Each gets `<output>_<product>`, equal to that of a network with this output alone."""
    volume = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 12, 8, 8))).float()
    subject = Subject(t1=ScalarImage(volume))

    def network(x: Tensor) -> dict[str, Tensor]:
        return {"seg": torch.cat([-x, x], 1), "coarse": avg_pool3d(x, 2)}

    products = {"seg": ["labels", "logits"], "coarse": ["image"]}
    made = predicted(network, subject, 4, 0, stitch=Stitch("crop", products))
    assert set(made) == {"seg_labels", "seg_logits", "coarse_image"}
    np.testing.assert_array_equal(made["seg_labels"], volume > 0)
    np.testing.assert_array_equal(made["seg_logits"], torch.cat([-volume, volume]))
    alone = predicted(lambda x: avg_pool3d(x, 2), subject, 4, 0, stitch=Stitch("crop"))
    np.testing.assert_array_equal(made["coarse_image"], alone["image"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("mode", ["crop", "gaussian"])
@pytest.mark.parametrize("spacing", [None, 2.0])
def test_products_accept_network_outputs_of_any_type(dtype: torch.dtype, mode: str, spacing: float | None) -> None:
    """Half precision under autocast and integers, blended or not."""
    volume = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (1, 6, 6, 6))).float()
    made = predicted(
        lambda x: torch.cat([1 - x, x], 1).to(dtype),
        Subject(t1=ScalarImage(volume)),
        preprocess=Preprocess(spacing=spacing),
        stitch=Stitch(mode, ["labels", "logits", "probabilities"]),
    )
    if spacing is None:
        np.testing.assert_array_equal(made["labels"], volume)
        np.testing.assert_allclose(made["logits"], torch.cat([1 - volume, volume]), rtol=0, atol=1e-6)
    if dtype.is_floating_point:
        np.testing.assert_allclose(made["logits"].sum(0), 1, rtol=0, atol=1e-2)
    np.testing.assert_allclose(made["probabilities"].sum(0), 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda x: x[..., :3], r"output '' has shape \(1, 1, 4, 4, 3\) for patches of \(4, 4, 4\) voxels"),
        (lambda x: torch.cat([x, x], 2), r"output '' has shape \(1, 1, 8, 4, 4\)"),
        (lambda x: x[0], r"output '' has shape \(1, 4, 4, 4\)"),
        (lambda x: x[..., :0], r"output '' has shape \(1, 1, 4, 4, 0\)"),
        (lambda x: {"seg": x[..., :3]}, "output 'seg' has shape"),
    ],
)
def test_an_output_of_another_shape_is_an_error(network: object, message: str) -> None:
    """The message says what came and what was wanted."""
    with pytest.raises(PatchShapeError, match=message):
        predicted(network, Subject(t1=ScalarImage(torch.zeros(1, 8, 8, 8))))


def test_a_change_of_output_names_between_patches_is_an_error() -> None:
    """A network that omits an output for some patches would leave a hole in it."""
    calls: list[int] = []

    def network(x: Tensor) -> dict[str, Tensor]:
        calls.append(1)
        return {"a": x, "b": x} if len(calls) < 3 else {"a": x}

    with pytest.raises(PatchShapeError, match=r"outputs are \['a'\] after \['a', 'b'\]"):
        predicted(network, Subject(t1=ScalarImage(torch.zeros(1, 8, 8, 8))))


def test_a_nan_in_one_patch_fails_the_volume() -> None:
    """It is an error, not a black spot."""
    subject = Subject(t1=ScalarImage(torch.arange(512.0).reshape(1, 8, 8, 8)))
    with pytest.raises(OutputError, match="NaN or infinite"):
        predicted(lambda x: torch.where(x == 511, torch.nan, x), subject)


def test_the_callers_image_is_not_changed() -> None:
    """A network that works in place gets a copy."""
    volume = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 6, 6, 6))).float()
    kept = volume.clone()
    made = predicted(lambda x: x.mul_(2), Subject(t1=ScalarImage(volume)), stitch=Stitch("crop"))
    assert torch.equal(volume, kept)
    np.testing.assert_array_equal(made["image"], kept * 2)


def test_post_processing_gets_labels_in_native_space() -> None:
    """Callables run in turn on (C, I, J, K) label tensors only; type and shape must stay."""
    volume = torch.zeros(1, 6, 5, 4)
    volume[0, 0, 0, 0] = 1
    subject = Subject(t1=ScalarImage(tensor=volume, affine=LPS))
    seen = []

    def grow(labels: Tensor) -> Tensor:
        seen.append(labels.clone())
        return torch.cat([torch.ones_like(labels[:, :1]), labels[:, 1:]], 1)

    stitch = Stitch(products=["labels", "logits"], postprocess=[grow, lambda labels: labels * 1.0])
    made = predicted(lambda x: torch.cat([0.5 - x, x - 0.5], 1), subject, stitch=stitch)
    assert torch.equal(seen[0], volume.long())
    expected = volume.clone()
    expected[:, 0] = 1
    assert made["labels"].dtype == np.uint8
    np.testing.assert_array_equal(made["labels"], expected)
    assert made["logits"].dtype == np.float32
    np.testing.assert_allclose(made["logits"], torch.cat([0.5 - volume, volume - 0.5]), rtol=0, atol=1e-6)
    with pytest.raises(OutputError, match=r"turned \(1, 6, 5, 4\) into \(6, 5, 4\)"):
        predicted(lambda x: torch.cat([x, x], 1), subject, stitch=Stitch(postprocess=[lambda labels: labels[0]]))


def test_a_label_map_can_be_an_input() -> None:
    """It is cut beside the image and not interpolated linearly."""
    labels = torch.tensor([0, 8]).byte().reshape(1, 2, 1, 1)
    subject = Subject(seg=LabelMap(labels))
    seen = []
    predicted(
        lambda x: seen.append(x.unique().tolist()) or x,
        subject,
        (1, 1, 1),
        0,
        preprocess=Preprocess(spacing=(0.5, None, None)),
    )
    assert seen == [[0], [0], [8], [8]]


# Entropy.


@given(st.integers(2, 7), st.sampled_from([None, "softmax", "none", "applied"]), SEEDS)
@settings(deadline=None, max_examples=40)
def test_entropy_is_that_of_the_distribution_in_nats(classes: int, activation: str | None, seed: int) -> None:
    """-sum p ln p over the classes, by a plain loop in float64."""
    scores = torch.from_numpy(np.random.default_rng(seed).normal(0, 3, (classes, 3, 2, 4)))
    p = scores.softmax(0)
    (entropy,) = products_of(
        scores if activation in (None, "softmax") else p, ["entropy"], activation=activation
    ).values()
    assert entropy.dtype == np.float32
    expected = sum(-q * np.log(q) for q in p.numpy())
    np.testing.assert_allclose(entropy[0], expected, rtol=1e-4, atol=1e-5)


def test_entropy_runs_from_0_if_certain_to_ln_classes_if_uniform() -> None:
    """Without NaN for a probability of 0 or one that rounding takes above 1."""
    p = torch.tensor([[1.0000001, 0.25, 0.0], [0, 0.25, 0], [0, 0.25, 1], [0, 0.25, 0]]).reshape(4, 3, 1, 1)
    entropy = products_of(p, ["entropy"], activation="none")["entropy"]
    np.testing.assert_allclose(entropy.ravel(), [0, np.log(4), 0], atol=1e-6)


@pytest.mark.parametrize("activation", ["sigmoid", "applied_sigmoid"])
def test_each_label_of_a_sigmoid_output_has_its_own_entropy_and_threshold(activation: str) -> None:
    """Also if probabilities were averaged before; the entropy is ln(2) at p = 0.5."""
    scores = torch.tensor([[0.0, 3.0], [-3.0, 0.1]]).reshape(2, 2, 1, 1)
    given = scores.sigmoid() if activation == "applied_sigmoid" else scores
    made = products_of(given, ["entropy", "labels", "probabilities"], activation=activation)
    p = scores.sigmoid().double().numpy()
    np.testing.assert_allclose(made["entropy"], -p * np.log(p) - (1 - p) * np.log(1 - p), rtol=1e-5)
    np.testing.assert_array_equal(made["labels"], p > 0.5)
    np.testing.assert_allclose(made["probabilities"], p, rtol=1e-6)


# Disagreement.


def spread(patches: Tensor, sampler: GridSampler, mode: str) -> np.ndarray:
    """The weighted variance of probabilities (n, C, ...) per channel, voxel by voxel in float64."""
    grid = sampler.grid
    i, j, k = (to_blend(mode).axis_weights(grid, axis) for axis in range(3))
    stacked = torch.zeros(len(grid), patches.shape[1], *grid.shape, dtype=torch.float64)
    weights = torch.zeros(len(grid), 1, *grid.shape, dtype=torch.float64)
    for n, (i0, j0, k0, i1, j1, k1) in enumerate(grid.locations.tolist()):
        a, b, c = grid.place(n)
        stacked[n, :, i0:i1, j0:j1, k0:k1] = patches[n]
        weights[n, 0, i0:i1, j0:j1, k0:k1] = i[a][:, None, None] * j[b][:, None] * k[c]
    mean = (weights * stacked).sum(0)
    return (weights * (stacked - mean).square()).sum(0).numpy()


@given(
    st.sampled_from(["crop", "average", "hann", "gaussian"]),
    st.sampled_from([None, "softmax", "none", "applied", "sigmoid", "applied_sigmoid"]),
    st.integers(1, 4),
    st.integers(1, 3),
    SEEDS,
)
@settings(deadline=None, max_examples=60)
def test_disagreement_is_the_weighted_variance_over_patches(
    mode: str, activation: str | None, channels: int, size: int, seed: int
) -> None:
    """Summed over exclusive classes, per channel otherwise; exactly 0 where one patch covers a voxel."""
    if channels == 1 and activation == "softmax":
        return  # refused, see above
    subject = Subject(t1=ScalarImage(torch.zeros(1, 9, 7, 5)))
    sampler, rng = GridSampler(subject, 5, 2), np.random.default_rng(seed)
    scores = torch.from_numpy(rng.normal(0, 2, (len(sampler), channels, 5, 5, 5)))
    kind = activation or ("softmax" if channels > 1 else "none")
    p = {"softmax": scores.softmax(1), "sigmoid": scores.sigmoid()}.get(kind, scores)
    order = iter(sampler.grid.streaming_order.tolist())
    made = predicted(
        lambda x: torch.stack([scores[next(order)] for _ in x]).float(),
        subject,
        5,
        batch_size=size,
        stitch=Stitch(mode, ["disagreement"], activation=activation),
    )["disagreement"]
    each = channels == 1 or kind.endswith("sigmoid")
    expected = spread(p, sampler, mode)
    np.testing.assert_allclose(made, expected if each else expected.sum(0)[None], rtol=1e-4, atol=3e-6)
    assert made.dtype == np.float32
    covered = np.zeros((9, 7, 5))
    for i0, j0, k0, i1, j1, k1 in sampler.locations:
        covered[i0:i1, j0:j1, k0:k1] += 1
    assert (made[:, covered == 1] == 0).all()
    if mode == "crop":
        assert not made.any()


def test_disagreement_of_an_image_keeps_small_differences_of_large_values() -> None:
    """A spread of 1 around 10,000, which a difference of squares in float32 would lose by cancellation."""
    subject = Subject(t1=ScalarImage(torch.zeros(1, 8, 4, 4)))
    values = iter([9_999.0, 10_001.0])
    made = predicted(
        lambda x: x + next(values), subject, (6, 4, 4), (4, 0, 0), stitch=Stitch("average", ["disagreement"])
    )["disagreement"]
    np.testing.assert_allclose(made[0, :, 0, 0], [0, 0, 1, 1, 1, 1, 0, 0], atol=1e-6)


# Several blends, and labels by nearest neighbour.

HEAD = np.random.default_rng(5).uniform(0, 100, (1, 14, 11, 13)).astype(np.float32)
OBLIQUE = np.array([[0, -1.5, 0, 3], [1.1, 0, 0, 2], [0, 0, 2, 1], [0, 0, 0, 1.0]])


def varying(x: Tensor) -> Tensor:
    """A network that sees less at patch borders, so that blends differ."""
    p = torch.linspace(-1, 1, x.shape[-1])
    return torch.cat([x - 50 + 30 * p, 50 - x - 20 * p.square(), 10 * p.expand_as(x)], 1)


@pytest.mark.parametrize("spacing", [None, 1.7])
@pytest.mark.parametrize("restore", ["scores", "labels"])
def test_comparing_blends_in_one_pass_equals_one_pass_per_blend(spacing: float | None, restore: str) -> None:
    """The network sees every patch once; the blend of overlap_mode is included if listed."""
    subject = Subject(t1=ScalarImage(HEAD, affine=OBLIQUE))
    options = {"batch_size": 3, "preprocess": Preprocess(spacing=spacing)}
    modes = ["crop", "average", "hann", "gaussian"]
    calls: list[int] = []
    stitch = Stitch("hann", ["labels", "probabilities"], compare=modes, restore=restore)
    made = predicted(lambda x: calls.append(len(x)) or varying(x), subject, 6, 4, stitch=stitch, **options)
    assert sum(calls) == len(GridSampler(options["preprocess"](subject).subject, 6, 4, fit=True))
    assert sorted(made) == sorted(["labels", "probabilities", *(f"labels_{mode}" for mode in modes)])
    for mode in modes:
        alone = predicted(varying, subject, 6, 4, stitch=Stitch(mode, restore=restore), **options)
        np.testing.assert_array_equal(made[f"labels_{mode}"], alone["labels"])
    np.testing.assert_array_equal(made["labels"], made["labels_hann"])
    assert len({made[f"labels_{mode}"].tobytes() for mode in modes}) == 4


def test_blends_of_images_and_named_outputs_can_be_compared() -> None:
    """Names are <output>_<product>_<mode>; outputs without labels are compared as images. Labels are post-processed."""
    subject = Subject(t1=ScalarImage(HEAD))
    made = predicted(
        lambda x: {"seg": varying(x), "image": varying(x)[:, :1]},
        subject,
        6,
        4,
        stitch=Stitch("crop", compare=["average"], postprocess=[lambda labels: labels + 5]),
    )
    assert sorted(made) == ["image_image", "image_image_average", "seg_labels", "seg_labels_average"]
    assert made["seg_labels_average"].min() >= 5
    alone = predicted(lambda x: varying(x)[:, :1], subject, 6, 4, stitch=Stitch("average"))
    np.testing.assert_array_equal(made["image_image_average"], alone["image"])


@pytest.mark.parametrize("orientation", ["RAS", "SPL", "AIL"])
@pytest.mark.parametrize("spacing", [None, 0.7, 1.7, (0.8, 2.3, 1.1)])
def test_restoring_labels_takes_the_nearest_model_voxel(orientation: str, spacing: object) -> None:
    """With restore="labels" labels are nearest in world space; scores are still interpolated."""
    subject = Subject(t1=ScalarImage(HEAD, affine=OBLIQUE))
    preprocess = Preprocess(orientation, spacing)  # type: ignore[arg-type]
    model_subject, space = preprocess(subject)
    sampler = GridSampler(model_subject, 6, 4, fit=True)
    aggregator = GridAggregator(sampler, "hann")
    for patch in sampler:
        aggregator.add_batch(varying(patch["t1"]["data"][None]), patch["location"][None])
    labels = aggregator.get_output_tensor().argmax(0).numpy()
    made, scores = (
        predicted(varying, subject, 6, 4, preprocess=preprocess, stitch=Stitch("hann", names, restore="labels"))
        for names in (["labels", "logits"], ["logits"])
    )
    np.testing.assert_array_equal(made["logits"], scores["logits"])
    native = np.stack(np.meshgrid(*map(np.arange, HEAD.shape[1:]), [1], indexing="ij")).reshape(4, -1)
    at = (np.linalg.inv(space.model.affine) @ OBLIQUE @ native)[:3] + np.array([b for b, _ in sampler.padding])[:, None]
    at = at.clip(0, np.array(labels.shape)[:, None] - 1)
    sure = (np.abs(at - np.floor(at) - 0.5) > 1e-6).all(0)  # halfway between two, either is right
    i, j, k = at.round().astype(int)
    np.testing.assert_array_equal(made["labels"].ravel()[sure], labels[i, j, k][sure])
    assert sure.mean() > 0.4
    assert made["labels"].dtype == np.uint8


# Classes that cannot win are not interpolated.


@given(st.integers(2, 12), st.tuples(*[st.integers(1, 4)] * 3), st.sampled_from([0.1, 1.0, 10.0]), st.integers(0, 999))
@settings(deadline=None, max_examples=100)
def test_the_contenders_include_every_class_that_can_win(
    classes: int, shape: tuple[int, int, int], contrast: float, seed: int
) -> None:
    """At and between voxels; the scores have large differences, where few contend, and integers, which often tie."""
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(
        rng.normal(0, 1, (classes, *shape)).round(1) + contrast * rng.normal(size=(classes, 1, 1, 1))
    )
    kept = contenders(scores.float()).tolist()
    assert kept == sorted(kept)
    at = torch.from_numpy(rng.dirichlet(np.ones(int(np.prod(shape))), 200)).float()
    between = scores.flatten(1).double() @ at.double().T
    assert set(between.argmax(0).tolist()) <= set(kept)
    assert set(scores.flatten(1).max(0).indices.tolist()) <= set(kept)


@pytest.mark.slow
@pytest.mark.parametrize("orientation", ["RAS", "SPL"])
@pytest.mark.parametrize("spacing", [0.6, 1.4, (0.8, 2.3, 1.1)])
@pytest.mark.parametrize("whole", [False, True])
def test_skipping_classes_that_cannot_win_changes_no_label(
    orientation: str, spacing: object, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal, ties included, to the arg-max of all classes interpolated, while fewer are interpolated."""
    rng = np.random.default_rng(7)
    image = zoom(rng.uniform(0, 10, (4, 3, 5)), (18, 14, 14), order=1).astype(np.float32)[None]
    monkeypatch.setattr("voxquilt.stitching.native_products._TILES", ((7, 2**63),))
    if spacing == 0.6:  # a million calls; what they are given is checked at the other spacings
        monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    subject = Subject(t1=ScalarImage(image.round() if whole else image, affine=OBLIQUE))
    preprocess = Preprocess(orientation, spacing)  # type: ignore[arg-type]

    def network(x: Tensor) -> Tensor:
        # The upper envelope of tangents of a parabola: class c wins around x = c.
        positions = torch.arange(11.0)[:, None, None, None]
        return torch.stack([positions * patch - positions.square() / 2 for patch in x])

    sizes: list[int] = []
    restored = Piece.restored

    def counted(piece: Piece, channels: Tensor | None) -> Tensor:
        sizes.append(11 if channels is None else len(channels))
        return restored(piece, channels)

    monkeypatch.setattr(Piece, "restored", counted)
    made = predicted(network, subject, 16, 8, preprocess=preprocess, stitch=Stitch("crop"))
    model_subject, space = preprocess(subject)
    sampler = GridSampler(model_subject, 16, 8, fit=True)
    aggregator = GridAggregator(sampler, "crop")
    for patch in sampler:
        aggregator.add_batch(network(patch["t1"]["data"][None]), patch["location"][None])
    scores = resample(aggregator.scores(), space.in_scores(sampler.padding, (1, 1, 1)))
    np.testing.assert_array_equal(made["labels"][0], scores.numpy().argmax(0))
    assert len(np.unique(made["labels"])) == 11
    assert min(sizes) < np.mean(sizes) < 8


# Products larger than memory.


@pytest.mark.parametrize("orientation", ["RAS", "SPL", "AIL"])
@pytest.mark.parametrize("longest", [0, 1, 2])
def test_a_product_backed_by_a_file_equals_one_in_memory(tmp_path: Path, orientation: str, longest: int) -> None:
    """For slabs along every native axis; the file is unlinked, so nothing stays behind."""
    volume = np.moveaxis(np.concatenate([HEAD, HEAD], 1), 1, longest + 1)
    subject = Subject(t1=ScalarImage(volume, affine=OBLIQUE))
    model_subject, space = Preprocess(orientation, 1.7)(subject)
    sampler = GridSampler(model_subject, 6, 4, fit=True)
    found = []
    for limit in (0, 1e9):
        quilt = SubjectStitcher(
            Stitch("hann", ["labels", "logits", "entropy"]),
            sampler,
            space,
            memory=Memory(scratch=Scratch(tmp_path, limit)),
        )
        for n in sampler.grid.streaming_order.tolist():
            quilt.add({"": varying(sampler.cut("t1", n)[None].float())}, [n])
        found.append(quilt.volumes())
        assert list(tmp_path.iterdir()) == []
        assert all(isinstance(volume.base, np.memmap) == (limit == 0) for volume in found[-1].values())
    for name, volume in found[0].items():
        np.testing.assert_array_equal(volume, found[1][name])
        write(tmp_path / "a.nii.gz", volume, subject.frame)
        write(tmp_path / "b.nii.gz", found[1][name], subject.frame)
        assert unpacked(tmp_path / "a.nii.gz") == unpacked(tmp_path / "b.nii.gz")
        for path in tmp_path.iterdir():
            path.unlink()


def test_a_full_disk_is_an_error_before_a_product_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing to a mapped file beyond the end of its disk would kill the process."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"product of 4\.0 GiB is too large for memory and .* has no room for it"):
        Scratch(tmp_path, 0).empty((1, 1024, 1024, 1024), np.dtype(np.float32))
    assert list(tmp_path.iterdir()) == []
