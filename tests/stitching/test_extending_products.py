"""Tests that products and blends of other packages work with the real command, as docs/extending.md shows."""

import csv
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from packages import install_documented
from synthetic import noise, read, run, save

from voxquilt import GridAggregator, GridSampler, Stitch, predict_volume
from voxquilt.errors import ConfigError, OutputError
from voxquilt.geometry.grid import Grid
from voxquilt.stitching.blend import Blend, Windowed

JOB = (
    "data.inputs=in", "data.patch_size=8", "data.patch_overlap=4", "model=state_dict",
    "model.net._target_=synthetic.Over50", "ckpt_path=null",
    "callbacks.writer.tensorboard=false", "callbacks.writer.report=false",
    "callbacks.writer.compress=false",
)  # fmt: skip
SHAPE = (9, 12, 10)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with one volume, whose subject's name ends like that of a product."""
    save(tmp_path / "in/x_labels.nii", noise(SHAPE))
    return tmp_path


def margins() -> np.ndarray:
    """The documented margin of Over50's scores: tanh of half their difference."""
    return np.abs(np.tanh(noise(SHAPE) - 50.0))


def check_margin(place: Path) -> None:
    np.testing.assert_allclose(read(place / "outputs/x_labels_margin.nii"), margins(), atol=1e-5)
    np.testing.assert_array_equal(read(place / "outputs/x_labels_labels.nii"), noise(SHAPE) > 50)
    with open(place / "outputs/manifest.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["outputs"] == "x_labels_labels.nii;x_labels_margin.nii"
    assert row["kinds"] == "labels;map"


def test_a_package_adds_a_product_by_one_file_and_one_line(place: Path) -> None:
    """The command refuses the name without the package, and writes the product with it."""
    arguments = (*JOB, "stitch.products=[labels,margin]")
    done = run("predict.py", *arguments, cwd=place)
    assert done.returncode == 2
    assert "stitch.products must be one of labels, probabilities, logits, entropy, disagreement, image;" in done.stderr
    package = install_documented("margin.py", place / "package")
    done = run("predict.py", *arguments, cwd=place, env={"PYTHONPATH": str(package)})
    assert done.returncode == 0, done.stderr
    check_margin(place)


def test_a_product_in_the_working_folder_is_chosen_by_its_class(place: Path) -> None:
    """Without a package; a class that is not a product is one message and status 2."""
    shutil.copy(install_documented("margin.py", place / "package") / "margin.py", place)
    done = run("predict.py", *JOB, "stitch.products=[labels,{_target_: margin.Margin}]", cwd=place)
    assert done.returncode == 0, done.stderr
    check_margin(place)
    done = run("predict.py", *JOB, "stitch.products=[{_target_: builtins.dict}]", "output_dir=other", cwd=place)
    assert done.returncode == 2
    assert done.stderr.startswith("voxquilt: products are names or Products, which have a name"), done.stderr
    assert "Traceback" not in done.stderr
    done = run("predict.py", *JOB, "stitch.overlap_mode={_target_: builtins.dict}", "output_dir=other", cwd=place)
    assert done.returncode == 2
    assert done.stderr == "voxquilt: overlap_mode must be the name of a blend or a Blend; it is {}.\n"


def test_a_package_adds_a_blend_by_one_file_and_one_line(place: Path) -> None:
    """Labels of a pointwise network do not depend on the blend; the name is refused without the package."""
    arguments = (*JOB, "stitch.overlap_mode=triangle", "stitch.products=[labels,logits]", "stitch.compare=[triangle]")
    done = run("predict.py", *arguments, cwd=place)
    assert done.returncode == 2
    assert (
        "stitch.overlap_mode must be one of crop, average, hann, gaussian, nnunet, monai; it is 'triangle'"
        in done.stderr
    )
    package = install_documented("triangle.py", place / "package")
    done = run("predict.py", *arguments, cwd=place, env={"PYTHONPATH": str(package)})
    assert done.returncode == 0, done.stderr
    for name in ("labels", "labels_triangle"):
        np.testing.assert_array_equal(read(place / f"outputs/x_labels_{name}.nii"), noise(SHAPE) > 50)
    np.testing.assert_allclose(read(place / "outputs/x_labels_logits.nii")[..., 1], noise(SHAPE) - 50.0, atol=1e-4)


def test_the_documented_blend_is_a_partition_of_unity_with_triangular_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a Blend in Python: a voxel that two patches cover is their mean, weighted 1, 2, ..., 2, 1."""
    monkeypatch.syspath_prepend(str(install_documented("triangle.py", tmp_path / "package")))
    from triangle import TRIANGLE  # type: ignore[import-not-found]

    assert isinstance(TRIANGLE, Windowed)
    sampler = GridSampler(torch.zeros(1, 6, 4, 4), 4, (2, 0, 0))
    aggregator = GridAggregator(sampler, TRIANGLE)
    patches = torch.stack([torch.zeros(1, 4, 4, 4), torch.ones(1, 4, 4, 4)])
    aggregator.add_batch(patches, sampler.locations)
    # Voxels 2 and 3 lie in both patches: at 2 with weights 2 and 1, at 3 with 1 and 2.
    torch.testing.assert_close(
        aggregator.get_output_tensor()[0, :, 0, 0], torch.tensor([0.0, 0.0, 1 / 3, 2 / 3, 1.0, 1.0])
    )


def test_unknown_products_and_blends_are_refused_by_the_constructor() -> None:
    """The nearest name is suggested."""
    with pytest.raises(ConfigError, match=r"products must be one of labels, .* Did you mean entropy\?"):
        Stitch(products=["entropi"])
    with pytest.raises(ConfigError, match=r"overlap_mode must be one of crop, .* Did you mean hann\?"):
        Stitch("han")


class Own:
    """A product of the mean score, with what a test spoils of it."""

    def __init__(self, name: str = "own", kind: str = "map", shape: str = "right") -> None:
        self.name, self.kind, self.shape = name, kind, shape

    def form(self, channels: int) -> tuple[int, np.dtype]:
        return 1, np.dtype(np.float32)

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        mean = scores.float().mean(0)[None]
        return {"right": mean, "no channel": mean[0], "one voxel": mean[:, :1, :1, :1], "two": scores[:2]}[self.shape]


@pytest.mark.parametrize("shape", ["no channel", "one voxel", "two"])
def test_a_product_of_another_shape_is_an_error_and_not_repeated_over_the_volume(shape: str) -> None:
    """Arrays would be broadcast without an error; the right one is the mean of the scores."""
    volume = torch.rand(1, 7, 6, 5)

    def network(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, 3 * x], 1)

    right = predict_volume(network, volume, 4, stitch=Stitch("crop", products=[Own()]))["own"]
    np.testing.assert_allclose(right, 2 * volume, rtol=1e-6)
    with pytest.raises(OutputError, match=r"the product Own gave .* wanted is a tensor of shape \(1, "):
        predict_volume(network, volume, 4, stitch=Stitch("crop", products=[Own(shape=shape)]))


def test_a_product_needs_a_known_kind_and_a_name_of_its_own() -> None:
    """An unknown kind, and two files that would have one name."""
    with pytest.raises(ConfigError, match=r"the kind of the product 'own' must be one of labels, map, image"):
        Stitch(products=[Own(kind="maps")])
    with pytest.raises(ConfigError, match="two products have the name 'labels'"):
        Stitch(products=["labels", Own("labels")])


class Second:
    """Labels of the second best class."""

    name, kind = "second", "labels"

    def __init__(self, dtype: type = np.uint8) -> None:
        self.dtype = dtype

    def form(self, channels: int) -> tuple[int, np.dtype]:
        return 1, np.dtype(self.dtype)

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.topk(2, 0).indices[1:]


@pytest.mark.parametrize("values", [None, [7, 5, 0], [0, 1002, 70_000]])
def test_labels_of_another_package_get_the_numbers_of_their_classes(values: list[int] | None) -> None:
    """In a type that holds them, whatever type the product has; and post-processed, as our own labels are."""
    volume = torch.rand(1, 7, 6, 5)
    weights = torch.tensor([1.0, -1.0, 0.25])

    def network(x: torch.Tensor) -> torch.Tensor:
        return (x - 0.5) * weights[:, None, None, None]

    scores = (volume[0].numpy() - 0.5)[None] * weights.numpy()[:, None, None, None]
    wanted = np.argsort(scores, 0)[1]
    stitch = Stitch("crop", products=[Second(), "labels"], label_values=values)
    volumes = predict_volume(network, volume, 4, stitch=stitch)
    for name, classes in (("second", wanted), ("labels", np.argmax(scores, 0))):
        np.testing.assert_array_equal(volumes[name][0], np.array(values or [0, 1, 2])[classes])
    turned = replace(stitch, postprocess=[lambda classes: 2 - classes])
    second = predict_volume(network, volume, 4, stitch=turned)["second"]
    np.testing.assert_array_equal(second[0], np.array(values or [0, 1, 2])[2 - wanted])


def test_labels_of_another_type_or_beyond_the_classes_are_refused() -> None:
    """Signed and floating-point types, and a class without a number."""
    volume = torch.rand(1, 5, 5, 5)
    for dtype in (np.int16, np.float32):
        with pytest.raises(
            OutputError, match=f"'second' holds labels, which have an unsigned type; it has {np.dtype(dtype)}"
        ):
            predict_volume(lambda x: torch.cat([x, -x], 1), volume, 4, stitch=Stitch(products=[Second(dtype)]))

    class Beyond(Second):
        def __call__(self, scores: torch.Tensor) -> torch.Tensor:
            return torch.full_like(scores[:1], 2)

    stitch = Stitch(products=[Beyond()], label_values=[0, 9])
    with pytest.raises(OutputError, match="a product of labels gave 2, which is not a class"):
        predict_volume(lambda x: torch.cat([x, -x], 1), volume, 4, stitch=stitch)


@dataclass(frozen=True)
class Shares:
    """A blend with given weights in every patch."""

    along: tuple[float, ...]
    averages: bool = True

    def axis_weights(self, grid: Grid, axis: int) -> torch.Tensor:
        patch = grid.patch_size[axis]
        return torch.tensor(self.along, dtype=torch.float64)[:patch].expand(grid.counts[axis], -1).clone()


@pytest.mark.parametrize(
    ("blend", "message"),
    [
        (Shares((0.5,) * 5), r"sum to 0\.5 to 1 along axis i, and must sum to 1"),
        (Shares((1.0,) * 4), r"gives weights of shape \(3, 4\) along axis i; wanted is \(3, 5\)"),
        (Windowed(lambda patch: torch.zeros(patch, dtype=torch.float64)), "sum to nan to nan .* positive everywhere"),
        (Windowed(lambda patch: torch.ones(patch - 1, dtype=torch.float64)), r"gives shape \(4,\) for patches of 5"),
        (Shares((0.5, 1.0, 1.0, 1.0, 0.5), averages=False), "must sum to 1"),
    ],
)
def test_a_blend_whose_weights_do_not_share_every_voxel_out_is_refused(blend: Blend, message: str) -> None:
    """As the choices are made; otherwise all outputs would be scaled without an error."""
    with pytest.raises(ConfigError, match=message):
        Stitch(blend)


def test_a_blend_that_fails_on_the_real_grid_alone_is_refused_there() -> None:
    """A window that is zero for larger patches only; a grid of one patch takes weights of 1 to copy from."""
    window = Windowed(lambda patch: torch.full((patch,), float(patch < 6), dtype=torch.float64))
    with pytest.raises(ConfigError, match="positive everywhere"):
        predict_volume(torch.nn.Identity(), torch.rand(1, 8, 8, 8), 6, stitch=Stitch(window))
    sampler = GridSampler(torch.rand(1, 4, 4, 4), 4)
    halves = Shares((1.0,) * 4, averages=False)
    whole = GridAggregator(sampler, halves)
    whole.add_batch(torch.full((1, 1, 4, 4, 4), 3.0), sampler.locations)
    assert (whole.get_output_tensor() == 3).all()
