"""Compares the model space of a run with the settings that ask for it."""

from collections.abc import Mapping
from typing import Any

import nibabel as nib
import numpy as np

from voxquilt.selfcheck.findings import Finding
from voxquilt.selfcheck.reference import Way

# The cosine from which on an axis of a file is said to run in a direction of the world.
_CLEAR = 0.8


def compare_model_space(way: Way, preprocess: Mapping[str, Any]) -> list[Finding]:
    """Whether voxels of model space are as large as `spacing`, and its axes run as `orientation` and `transpose` say.

    Args:
        way: How a subject went to model space.
        preprocess: The settings.
    """
    lengths = np.linalg.norm(way.model[:3, :3], axis=0)
    found = []
    spacing = preprocess.get("spacing")
    if spacing is not None:
        wanted = spacing if isinstance(spacing, list | tuple) else [spacing] * 3
        pairs = [(n, float(mm)) for n, mm in enumerate(wanted) if mm is not None and way.model_shape[n] > 1]
        if pairs:
            # Other grids fit a whole number of voxels into the volume.
            exact = preprocess.get("grid", "centre") == "centre"
            errors = [
                (abs(lengths[n] - mm), mm * (1e-4 if exact else 1e-4 + 1.5 / way.model_shape[n])) for n, mm in pairs
            ]
            error, allowed = max(errors, key=lambda one: one[0] / one[1])
            found.append(Finding("the voxel size of model space", float(error), allowed, "mm"))
    orientation = preprocess.get("orientation")
    if orientation and (np.abs(way.model[:3, :3] / lengths).max(0) > _CLEAR).all():
        order = preprocess.get("transpose") or range(3)
        wanted = "".join(orientation[n] for n in order)
        runs = "".join(nib.orientations.aff2axcodes(way.model))
        problem = f"its axes run to {runs}; wanted is {wanted}" if runs != wanted else ""
        found.append(Finding("the axes of model space", problem=problem))
    return found
