"""Makes what tests of loggers run on: three subjects with labels, and a training that takes a moment."""

from pathlib import Path

import numpy as np
from synthetic import noise, save

TRAIN = (
    "data.inputs=in", "data.labels=labels/{subject}.nii", "data.patch_size=8", "model.net.channels=[2,2]",
    "model.net.strides=[2]", "trainer=cpu", "trainer.check_val_every_n_epoch=1", "data.patches_per_volume=1",
    "data.folds=3",
)  # fmt: skip


def save_labelled(folder: Path) -> Path:
    """Save the subjects in `in` and their labels in `labels`; returns the folder."""
    for n in range(3):
        volume = noise((12, 10, 9 + n), n)
        save(folder / f"in/s{n}.nii", volume)
        save(folder / f"labels/s{n}.nii", (volume > 50).astype(np.uint8))
    return folder
