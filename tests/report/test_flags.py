"""Tests what is flagged in a report: outliers of volume, empty labels, labels at the border."""

from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folders import done, line

from voxquilt.report.flags import LEAST, LIMIT, cohorts_of, flags_of, robust_scores
from voxquilt.report.run_folder import ClassVolume, RunFolder
from voxquilt.reporting.manifest import Row

VOLUMES = st.lists(st.floats(0, 1e6, allow_subnormal=False), max_size=40)


def run_of(ml: dict[str, float], *, name: str = "ball", touching: Sequence[str] = (), total: bool = True) -> RunFolder:
    """A run whose subjects have one class."""
    rows = {subject: done(subject, volume if total else None) for subject, volume in ml.items()}
    volumes = {subject: [ClassVolume(name, volume, subject in touching)] for subject, volume in ml.items()}
    return RunFolder(Path("out"), rows, volumes)


def flagged(run: RunFolder) -> dict[str, list[str]]:
    return {subject: [flag.kind for flag in flags] for subject, flags in flags_of(run, cohorts_of(run)).items()}


@given(VOLUMES)
def test_scores_are_distances_from_the_median_in_units_of_the_scaled_mad(values: list[float]) -> None:
    """As numpy computes them; none at all where the MAD is 0. The factor makes it the SD of a normal distribution."""
    scores = robust_scores(values)
    mad = np.median(np.abs(np.array(values) - np.median(values))) if values else 0.0
    assert scores == ([] if mad == 0 else pytest.approx((np.array(values) - np.median(values)) / (1.4826 * mad)))
    assert 1 / NormalDist().inv_cdf(0.75) == pytest.approx(1.4826, abs=1e-4)


def test_a_volume_far_from_the_others_is_an_outlier_in_either_direction() -> None:
    """The furthest first; one just within the limit is none."""
    ml = {f"s{n}": 100.0 + n for n in range(20)}
    ml |= {"large": 400.0, "small": 1.0, "near": 132.0}
    run = run_of(ml)
    (cohort,) = cohorts_of(run)
    assert cohort.outliers == ["large", "small"]
    assert 2 < cohort.scores["near"] < LIMIT
    assert flagged(run) == {"large": ["outlier"], "small": ["outlier"]}


def test_no_outlier_is_sought_among_few_subjects_or_where_most_are_equal() -> None:
    """The page says so, instead of flagging all that differ."""
    few = run_of({f"s{n}": 1000.0**n for n in range(LEAST - 1)})
    equal = run_of({f"s{n}": 5.0 if n < 8 else 900.0 for n in range(12)})
    for run, note in ((few, "outliers are sought from"), (equal, "more than half")):
        (cohort,) = cohorts_of(run)
        assert note in cohort.note
        assert flagged(run) == {}


def test_a_class_that_most_subjects_have_is_missed_where_it_is_absent() -> None:
    """But not where it is rare, such as a lesion."""
    common, rare = ({f"s{n}": float(n < most) * (10 + n) for n in range(9)} for most in (7, 2))
    assert flagged(run_of(common, total=False)) == {"s7": ["empty"], "s8": ["empty"]}
    assert "empty" not in {kind for kinds in flagged(run_of(rare, total=False)).values() for kind in kinds}


def test_a_subject_without_any_label_comes_first() -> None:
    """Once, and before every outlier."""
    run = run_of({f"s{n}": 100.0 + n for n in range(9)} | {"none": 0.0, "huge": 1e6})
    flags = flags_of(run, cohorts_of(run))
    assert [flag.kind for flag in flags["none"]].count("empty") == 1
    assert flags["none"][0].weight > flags["huge"][0].weight


def test_touching_the_border_is_a_flag_only_where_most_do_not() -> None:
    """Of a cohort whose class always reaches the edge, nobody need look at all."""
    ml = {f"s{n}": 10.0 + n for n in range(6)}
    assert flagged(run_of(ml, touching=["s2"])) == {"s2": ["border"]}
    assert flagged(run_of(ml, touching=list(ml))) == {}
    assert flagged(run_of({"alone": 3.0}, touching=["alone"])) == {"alone": ["border"]}


def test_failed_subjects_are_in_no_cohort() -> None:
    """Even if an earlier run has left numbers of them."""
    run = run_of({f"s{n}": 10.0 + n for n in range(9)})
    run.rows["s8"] = Row("s8", "failed", error="damaged")
    (cohort,) = cohorts_of(run)
    assert "s8" not in cohort.ml


def test_without_statistics_the_manifest_has_the_volume_of_all_labels() -> None:
    """By which outliers are found all the same."""
    rows = {f"s{n}": done(f"s{n}", 500.0 if n == 3 else 100.0 + n) for n in range(9)}
    run = RunFolder(Path("out"), rows)
    assert flagged(run) == {"s3": ["outlier"]}
    assert line("a", "b", 2.0)["voxels"] == 2000
