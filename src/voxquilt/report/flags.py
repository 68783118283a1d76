"""Flags the subjects of a run that people should look at: outliers in volume, empty labels, labels at the border."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from voxquilt.report.run_folder import RunFolder
from voxquilt.text import of_subjects

LIMIT = 3.5
"""The robust z-score beyond which a volume is an outlier."""
LEAST = 5
"""Subjects below which no outlier is sought: a median absolute deviation of so few says little."""
ALL_LABELS = "all labels"
"""The name of the volume of all labels together, which the manifest has."""


@dataclass(frozen=True)
class Flag:
    """Why a subject should be looked at.

    Args:
        kind: 'outlier', 'empty' or 'border'.
        text: What the page says.
        weight: How far it is from the cohort, by which flagged subjects are ordered.
    """

    kind: str
    text: str
    weight: float = 0.0


@dataclass(frozen=True)
class ClassCohort:
    """The volumes of one class in the subjects of a run.

    Args:
        name: The class.
        ml: Volumes in millilitres by subject.
        scores: Robust z-scores by subject; empty where there are too few subjects, or where they do not differ.
        note: What the page says of outliers where none are sought.
    """

    name: str
    ml: Mapping[str, float]
    scores: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def outliers(self) -> list[str]:
        """Subjects beyond the limit, the furthest first."""
        beyond = [subject for subject, score in self.scores.items() if abs(score) > LIMIT]
        return sorted(beyond, key=lambda subject: -abs(self.scores[subject]))


def robust_scores(values: Sequence[float]) -> list[float]:
    """How far values are from their median, in robust standard deviations.

    (x - median) / (1.4826 MAD), where MAD is the median of |x - median| and 1.4826 makes it the standard deviation of
    normally distributed values: the score of Iglewicz and Hoaglin, How to Detect and Handle Outliers (1993).

    >>> [round(score, 2) for score in robust_scores([1, 2, 3, 4, 100])]
    [-1.35, -0.67, 0.0, 0.67, 65.43]

    Returns:
        A score per value; none at all where MAD is 0, since more than half of the values are then equal, and any other
        would be infinitely far.
    """
    if not values:
        return []
    middle = median(values)
    deviation = 1.4826 * median(abs(value - middle) for value in values)
    return [(value - middle) / deviation for value in values] if deviation else []


def cohorts_of(run: RunFolder) -> list[ClassCohort]:
    """The volumes of each class, and of all labels together where there is more than one class or no statistics."""
    by_class: dict[str, dict[str, float]] = {name: {} for name in run.class_names}
    done = {subject: row for subject, row in run.rows.items() if row.status != "failed"}
    for subject in done:
        for entry in (run.volumes or {}).get(subject, ()):
            by_class[entry.name][subject] = entry.ml
    total = {subject: row.volume_ml for subject, row in done.items() if row.volume_ml is not None}
    if total and len(by_class) != 1:
        by_class = {ALL_LABELS: total} | by_class
    return [_cohort(name, ml) for name, ml in by_class.items() if len(ml) > 1]


def _cohort(name: str, ml: Mapping[str, float]) -> ClassCohort:
    if len(ml) < LEAST:
        return ClassCohort(name, ml, note=f"{of_subjects(len(ml))}: outliers are sought from {LEAST} on")
    scores = robust_scores(list(ml.values()))
    if not scores:
        return ClassCohort(name, ml, note="more than half of the subjects have the same volume: no outlier is sought")
    return ClassCohort(name, ml, dict(zip(ml, scores, strict=True)))


def flags_of(run: RunFolder, cohorts: Sequence[ClassCohort]) -> dict[str, list[Flag]]:
    """The flags of each subject that has any, the most serious first.

    A class that is absent is a flag only where most subjects have it, and one at the border only where most are not:
    else nearly every subject of some cohorts would be flagged.
    """
    flags: dict[str, list[Flag]] = {}
    for subject, row in run.rows.items():
        if row.status != "failed" and row.volume_ml == 0:
            flags.setdefault(subject, []).append(Flag("empty", "no voxel has a label", float("inf")))
    for cohort in cohorts:
        for subject in [subject for subject in cohort.outliers if cohort.ml[subject]]:  # others are flagged as empty
            score = cohort.scores[subject]
            text = f"{cohort.name}: {cohort.ml[subject]:.4g} ml, z = {score:+.1f}"
            flags.setdefault(subject, []).append(Flag("outlier", text, abs(score)))
        present = sum(volume > 0 for volume in cohort.ml.values())
        for subject, volume in cohort.ml.items():
            if not volume and 2 * present > len(cohort.ml) and run.rows[subject].volume_ml != 0:
                flags.setdefault(subject, []).append(Flag("empty", f"{cohort.name} is empty", LIMIT))
    for name in run.class_names:
        touching = {
            subject: entry.touches_border
            for subject, entries in (run.volumes or {}).items()
            for entry in entries
            if entry.name == name and entry.ml and run.rows[subject].status != "failed"
        }
        if sum(map(bool, touching.values())) * 2 <= max(len(touching), 2):
            for subject in [subject for subject, touches in touching.items() if touches]:
                flags.setdefault(subject, []).append(Flag("border", f"{name} touches the border"))
    return {subject: sorted(found, key=lambda flag: -flag.weight) for subject, found in flags.items()}
