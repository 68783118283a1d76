"""Compares numbers of labels that were computed in two ways."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from voxquilt.reporting.label_intensities import Intensities
from voxquilt.reporting.label_statistics import LabelStatistics


def check_numbers(
    found: Mapping[int, LabelStatistics],
    wanted: Mapping[int, LabelStatistics],
    check_moments: Callable[[Intensities, Intensities], None],
) -> None:
    """Everything is equal but for means and standard deviations, which rounding may tell apart: for `check_moments`."""
    assert list(found) == list(wanted)
    for number, numbers in found.items():
        intensities, others = numbers.intensities or {}, wanted[number].intensities or {}
        assert replace(numbers, intensities=None) == replace(wanted[number], intensities=None)
        assert list(intensities) == list(others)
        for name, ours in intensities.items():
            assert ours.percentiles == others[name].percentiles, name
            check_moments(ours, others[name])
