"""Tests what is made once for volumes that are alike: nobody gets what was made for another blend, grid or queue."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from voxquilt.geometry import axis_map, neighbour_tables
from voxquilt.geometry.axis_map import AxisMap
from voxquilt.geometry.device_queue import queue_on
from voxquilt.geometry.grid import Grid, make_grid
from voxquilt.geometry.neighbour_tables import NeighbourTables
from voxquilt.geometry.streamed_resample import Restorer
from voxquilt.stitching import patch_shares as module
from voxquilt.stitching.blend import HANN, MONAI, Blend, MonaiGaussian, Windowed, gaussian, hann, to_blend
from voxquilt.stitching.patch_shares import PatchShares, patch_shares

CPU, META = torch.device("cpu"), torch.device("meta")
GRID = make_grid((12, 8, 8), (6, 4, 4), 2)


def shares_of(blend: Blend, grid: Grid = GRID) -> PatchShares:
    return patch_shares(blend, grid, torch.float32, CPU)


def weights_of(blend: Blend) -> Tensor:
    return shares_of(blend).weights[0].clone()


@dataclass
class Window:
    """A window whose width can be changed, and which says that all of its kind are equal."""

    sigma: float

    def __call__(self, patch: int) -> Tensor:
        return gaussian(patch, self.sigma)

    def __eq__(self, _: object) -> bool:
        return True

    def __hash__(self) -> int:
        return hash(hann)


class WithWidth(Windowed):
    """A frozen dataclass's subclass with more than its fields."""

    def __init__(self, sigma: float) -> None:
        super().__init__(hann)
        object.__setattr__(self, "sigma", sigma)

    sigma: float

    def axis_weights(self, grid: Grid, axis: int) -> Tensor:
        return Windowed(Window(self.sigma)).axis_weights(grid, axis)


@dataclass(frozen=True)
class Uncompared:
    """A frozen dataclass, which does not compare its field."""

    sigma: list[float] = field(compare=False)
    averages = True

    def axis_weights(self, grid: Grid, axis: int) -> Tensor:
        return Windowed(Window(self.sigma[0])).axis_weights(grid, axis)


@dataclass(frozen=True, eq=False)
class ByIdentity(Uncompared):
    """Two of it are never equal, and each can be changed."""


BLENDS_OF_USERS: list[Callable[[float], Blend]] = [
    lambda sigma: Windowed(Window(sigma)),
    WithWidth,
    lambda sigma: Uncompared([sigma]),
    lambda sigma: ByIdentity([sigma]),
    MonaiGaussian,
]


@pytest.mark.parametrize("make", BLENDS_OF_USERS)
def test_no_blend_gets_the_weights_of_another(make: Callable[[float], Blend]) -> None:
    weights_of(HANN)
    first, second = weights_of(make(0.1)), weights_of(make(0.9))
    assert not torch.equal(first, second)
    assert torch.equal(weights_of(make(0.1)), first)


def test_a_blend_may_change_between_volumes() -> None:
    """Also by what its function reads."""
    window, changed = Window(0.1), [0.1]
    for blend, change in (
        (Windowed(window), lambda: setattr(window, "sigma", 0.9)),
        (Windowed(lambda patch: gaussian(patch, changed[0])), lambda: changed.__setitem__(0, 0.9)),
        (ByIdentity(changed), lambda: changed.__setitem__(0, 0.5)),
    ):
        before = weights_of(blend)
        change()
        assert not torch.equal(weights_of(blend), before)


@pytest.mark.parametrize("name", ["crop", "average", "hann", "gaussian", "nnunet", "monai"])
def test_the_weights_of_own_blends_are_made_once(name: str) -> None:
    """Also of grids whose numbers are of other types, or in lists."""
    first = shares_of(to_blend(name))
    assert shares_of(to_blend(name)) is first
    alike = object.__new__(Grid)  # as one is made without the tests' checks of types
    for of_axes in ("shape", "patch_size", "patch_overlap"):
        object.__setattr__(alike, of_axes, [torch.tensor(n) for n in getattr(GRID, of_axes)])
    object.__setattr__(alike, "starts", [list(along) for along in GRID.starts])
    alike.__post_init__()
    assert alike == GRID
    assert shares_of(to_blend(name), alike) is first
    assert shares_of(to_blend(name), make_grid((12, 8, 8), (6, 4, 4), 0)) is not first


def test_each_queue_of_a_device_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another stream would read what has not been uploaded yet."""
    assert queue_on(CPU) == CPU
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    assert queue_on(torch.device("cuda", 1)) == "stream of cuda:1"
    tables = NeighbourTables([AxisMap(axis, 5, 0.7, 0.1).neighbours(4) for axis in range(3)])
    made: dict[str, list[object]] = {}
    for queue in ("a", "b", "a"):
        monkeypatch.setattr(neighbour_tables, "queue_on", lambda _, queue=queue: queue)
        monkeypatch.setattr(module, "queue_on", lambda _, queue=queue: queue)
        own = [tables.on(META)[0].below, tables.pairs(META)[0], patch_shares(MONAI, GRID, torch.float32, META)]
        assert all(now is before for now, before in zip(own, made.setdefault(queue, own), strict=True))
    assert not any(a is b for a, b in zip(made["a"], made["b"], strict=True))
    assert tables.on(CPU) is tables.on_host
    for queue in "cdefg":
        monkeypatch.setattr(neighbour_tables, "queue_on", lambda _, queue=queue: queue)
        assert tables.on(META) is tables.on(META)
        assert tables.pairs(META) is tables.pairs(META)
    assert len(tables._copies) == len(tables._pairs) == 2


def test_places_of_patches_belong_to_a_queue_too(monkeypatch: pytest.MonkeyPatch) -> None:
    blend_add = pytest.importorskip("voxquilt.stitching.kernels.blend_add")
    planes = [torch.zeros(1, *GRID.shape)]
    made: dict[str, object] = {}
    for queue in ("a", "b", "a"):
        monkeypatch.setattr(blend_add, "queue_on", lambda _, queue=queue: queue)
        places = blend_add.BlendAdd(GRID, 0, shares_of(HANN).weights, planes)._places
        assert made.setdefault(queue, places) is places
    assert made["a"] is not made["b"]


def test_neighbours_are_on_the_host_whoever_asks_first() -> None:
    """As `torch.device` would have others make tensors elsewhere."""
    where = AxisMap(0, 13, 0.71, 0.3, order=3)
    with META, torch.inference_mode():
        assert where.neighbours(9).below.device == CPU
    weights = where.neighbours(9).weights
    assert weights is not None
    assert weights.device == CPU
    assert not weights.is_inference()


def test_large_weights_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spline along a thousand voxels takes 8 MiB, one along ten thousand 800."""
    maps = AxisMap(0, 11, 0.7, 0.1), AxisMap(1, 12, 0.6, 0.1), AxisMap(2, 13, 0.5, 0.1)
    spline = AxisMap(0, 11, 0.7, 0.1, order=3)

    def are_kept(tile: int | None) -> bool:
        first, second = (Restorer(maps, 0, (8, 8, 8), tile=tile) for _ in range(2))
        return first.tables is second.tables

    assert spline.neighbours(8) is spline.neighbours(8)
    assert are_kept(None)
    assert are_kept(4)
    monkeypatch.setattr(axis_map, "_KEPT", 12 * 8)
    assert spline.neighbours(8) is spline.neighbours(8)
    assert not are_kept(4)
    monkeypatch.setattr(axis_map, "_KEPT", 11 * 8 - 1)
    assert spline.neighbours(8) is not spline.neighbours(8)
    assert maps[0].neighbours(8) is maps[0].neighbours(8)
    assert are_kept(None)
