"""Provides the optional keywords of TrainingDataModule and their defaults."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypedDict

from voxquilt.training.random_patches import Augment


class TrainingKeywords(TypedDict, total=False):
    """The keywords for type checkers, which know their types by this class; TrainingOptions has the defaults."""

    inference_patch_size: int | Iterable[int] | None
    patch_overlap: int | Iterable[int]
    padding_mode: str | float | None
    divisible_by: int | Iterable[int]
    placement: str
    step: float | None
    label_interpolation: int
    batch_size: int
    num_workers: int
    patches_per_volume: int
    balanced: float
    augment: Augment | None
    cache: float | None
    folds: int | None
    fold: int
    split: str | None
    seed: int


@dataclass(frozen=True)
class TrainingOptions:
    """The values of these keywords; see TrainingDataModule for what they mean."""

    inference_patch_size: int | Iterable[int] | None = None
    patch_overlap: int | Iterable[int] = 0
    padding_mode: str | float | None = None
    divisible_by: int | Iterable[int] = 1
    placement: str = "regular"
    step: float | None = None
    label_interpolation: int = 0
    batch_size: int = 2
    num_workers: int = 0
    patches_per_volume: int = 8
    balanced: float = 0.5
    augment: Augment | None = None
    cache: float | None = None
    folds: int | None = 5
    fold: int = 0
    split: str | None = None
    seed: int = 0
