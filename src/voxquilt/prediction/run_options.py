"""Lists the options of a predict run that GridDataModule passes on, with their defaults."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from voxquilt.data.grid_loader import GridLoader
from voxquilt.prediction.resume import Resume


class RunOptions(TypedDict, total=False):
    """How a predict run places patches and treats its subjects; see GridDataModule."""

    placement: str
    step: float | None
    within: str | None
    margin: float
    suffixes: Mapping[str, str] | None
    extra_images: Mapping[str, str] | None
    nonfinite: str
    shard: tuple[int, int]
    distribute: str
    resume: Resume | None
    output_dir: str | Path | None
    more_models: Sequence[GridLoader]


@dataclass(frozen=True)
class FilledOptions:
    """RunOptions with their defaults; an unknown one is a TypeError that names it."""

    placement: str = "regular"
    step: float | None = None
    within: str | None = None
    margin: float = 0.0
    suffixes: Mapping[str, str] | None = None
    extra_images: Mapping[str, str] | None = None
    nonfinite: str = "error"
    shard: tuple[int, int] = (0, 1)
    distribute: str = "subject"
    resume: Resume | None = None
    output_dir: str | Path | None = None
    more_models: Sequence[GridLoader] = ()
