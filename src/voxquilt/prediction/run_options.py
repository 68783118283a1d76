"""Lists the options of a predict run's data that have nothing to do with the size of its patches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from voxquilt.data.grid_loader import GridLoader
from voxquilt.prediction.resume import Resume
from voxquilt.vocabulary import CHANNELS


class RunOptions(TypedDict, total=False):
    """How a predict run places patches and treats its subjects.

    Args:
        suffixes, extra_images: See `voxquilt.data.discovery.find_cases`.
        placement, step: See GridSampler.
        within: A pattern of mask files with `{subject}`, on the grid of the first image: only the bounding box of what
            is above 0 is seen by the network; all around it is background.
        margin: mm around that box.
        nonfinite: What to do with NaN and infinite voxels: 'error' (the default) or 'zero'.
        shard: (index, count): predict one of `count` parts of the subjects, which have about equally many patches. All
            parts are computed from the same headers; with `resume` one run reads them for all.
        distribute: With several processes, 'subject' (the default) gives each subject to one of them, 'slab' divides
            every volume's grid between all, 'auto' does so if there are fewer subjects than processes, or for a subject
            that has more than an even share of the patches.
        resume: Finds the subjects that are done already; None predicts all.
        output_dir: Where the run writes; files there are never inputs. By default the folder of `resume`.
        time: What the last axis of a 4-D file has: 'channels' (the default) of one volume, or 'volumes' of a series,
            each predicted like a volume of its own, with one file of all of them for each product.
        more_models: Where several models predict each subject, how it is read and cut for those behind the first.
    """

    placement: str
    step: float | None
    within: str | None
    margin: float
    suffixes: Mapping[str, str] | None
    extra_images: Mapping[str, str] | None
    nonfinite: str
    time: str
    shard: tuple[int, int]
    distribute: str
    resume: Resume | None
    output_dir: str | Path | None
    more_models: Sequence[GridLoader]


@dataclass(frozen=True)
class RunChoices:
    """RunOptions with their defaults; an unknown one is a TypeError that names it."""

    placement: str = "regular"
    step: float | None = None
    within: str | None = None
    margin: float = 0.0
    suffixes: Mapping[str, str] | None = None
    extra_images: Mapping[str, str] | None = None
    nonfinite: str = "error"
    time: str = CHANNELS
    shard: tuple[int, int] = (0, 1)
    distribute: str = "subject"
    resume: Resume | None = None
    output_dir: str | Path | None = None
    more_models: Sequence[GridLoader] = ()
