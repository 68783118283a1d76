"""Tests which components of labels are kept, against a search from voxel to voxel."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from voxquilt.stitching.largest_component import KeepLargest


def keep(labels: list[int], *unions: list[int]) -> list[int]:
    """A row of labels after post-processing."""
    return KeepLargest(unions)(torch.tensor(labels).view(1, 1, 1, -1)).flatten().tolist()


def test_other_components_become_background() -> None:
    """Other labels stay as they are."""
    assert keep([1, 1, 0, 1, 2, 0, 3], [1]) == [1, 1, 0, 0, 2, 0, 3]


def test_labels_of_a_union_count_together() -> None:
    """A voxel of one connects those of another."""
    assert keep([1, 2, 1, 0, 1, 1], [1]) == [0, 2, 0, 0, 1, 1]
    assert keep([1, 2, 1, 0, 1, 1], [1, 2]) == [1, 2, 1, 0, 0, 0]


def test_unions_are_processed_in_turn() -> None:
    """The second one sees what the first one left."""
    assert keep([2, 2, 0, 1, 1, 1, 2], [1, 2], [2]) == [0, 0, 0, 1, 1, 1, 2]
    assert keep([2, 2, 0, 1, 1, 1, 2], [2], [1, 2]) == [0, 0, 0, 1, 1, 1, 0]


def test_components_of_the_same_size_are_all_kept() -> None:
    """Only smaller ones are removed."""
    assert keep([1, 1, 0, 1, 1, 0, 1], [1]) == [1, 1, 0, 1, 1, 0, 0]


def test_labels_that_are_not_there_change_nothing() -> None:
    """No voxel is removed."""
    assert keep([1, 0, 1], [2]) == [1, 0, 1]
    assert keep([1, 0, 1]) == [1, 0, 1]


def test_voxels_that_share_a_corner_are_connected() -> None:
    """The diagonal of a cube is one component."""
    labels = torch.zeros(1, 5, 3, 3, dtype=torch.uint8)
    for n in range(3):
        labels[0, n, n, n] = 1
    labels[0, 4, 0, :2] = 1
    kept = KeepLargest([[1]])(labels)
    assert kept.nonzero().tolist() == [[0, n, n, n] for n in range(3)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64])
def test_the_type_and_the_input_stay_as_they_are(dtype: torch.dtype) -> None:
    """And the background may be another label."""
    labels = torch.tensor([7, 7, 0, 7]).to(dtype).view(1, 1, 1, 4)
    result = KeepLargest([[7]], background=9)(labels)
    assert result.dtype == dtype
    assert result.flatten().tolist() == [7, 7, 0, 9]
    assert labels.flatten().tolist() == [7, 7, 0, 7]


def search(array: np.ndarray, union: list[int]) -> np.ndarray:
    """The same by definition."""
    remaining = {tuple(place) for place in np.argwhere(np.isin(array, union)).tolist()}
    components = []
    while remaining:
        component, reached = set(), [remaining.pop()]
        while reached:
            place = reached.pop()
            component.add(place)
            for step in product((-1, 0, 1), repeat=3):
                neighbour = tuple(a + b for a, b in zip(place, step, strict=True))
                if neighbour in remaining:
                    remaining.remove(neighbour)
                    reached.append(neighbour)
        components.append(component)
    most = max(map(len, components), default=0)
    result = array.copy()
    for component in components:
        if len(component) < most:
            result[tuple(np.array(list(component)).T)] = 0
    return result


@settings(max_examples=150, deadline=None)
@given(
    labels=arrays.arrays(
        np.uint8, st.tuples(*[st.integers(1, 5)] * 3), elements=st.sampled_from([0, 0, 0, 1, 2]), fill=st.nothing()
    )
)
def test_what_is_kept_is_what_a_search_finds(labels: np.ndarray) -> None:
    """For any labels and for two unions in turn."""
    kept = KeepLargest([[1, 2], [2]])(torch.from_numpy(labels)[None])[0].numpy()
    assert np.array_equal(kept, search(search(labels, [1, 2]), [2]))
