"""Determines how a network's outputs lie in their patches.

Along one axis, a patch of 12 voxels and the outputs that a network may give for it:

    patch        |-|-|-|-|-|-|-|-|-|-|-|-|
    as large     |-|-|-|-|-|-|-|-|-|-|-|-|
    resampled    |---|---|---|---|---|---|     with voxels that are larger by an integer factor
    cropped          |-|-|-|-|-|-|-|-|         without the halo that valid convolutions use up
"""

from collections.abc import Iterable, Mapping, Sequence

from voxquilt.errors import PatchShapeError
from voxquilt.geometry.frame import AXES, Padding, Triple


def factor_of(layout: str, name: str, shape: Sequence[int], patch: Triple) -> Triple:
    """The factors along i, j, k by which the voxels of an output are larger than those of the patch.

    Args:
        layout: 'resampled' allows any integer factors, 'auto' the same factor along all axes on which the patch has
            several voxels, 'cropped' none: the output has the voxels of `patch`, which is given without its halo.
            'equal', for training, allows outputs that are as large as patches.
        name: Name of the output, '' for the only one.
        shape: Shape (B, C, I, J, K) of the output.
        patch: Voxels of the patch, for 'cropped' without its halo.

    Raises:
        PatchShapeError: another shape; the message names those that are allowed.
    """
    sizes = tuple(shape[2:])
    if len(shape) != 5 or 0 in shape or any(n > p for n, p in zip(sizes, patch, strict=True)):
        raise PatchShapeError(
            f"the network's output {name!r} has shape {tuple(shape)} for patches of {patch} voxels; wanted is "
            f"(B, C, I, J, K) with as many voxels, or fewer."
        )
    if layout == "equal" and sizes != patch:
        raise PatchShapeError(
            f"the network's output {name!r} has {sizes} voxels for patches of {patch}; train.py trains networks whose "
            f"outputs are as large as their patches: pad its convolutions (padding='same')."
        )
    if layout == "cropped":
        if sizes != patch:
            raise PatchShapeError(
                f"the network's output {name!r} has {sizes} voxels where other outputs or patches have {patch}; with "
                f"model.output=cropped all outputs lack the same border. Choose one by model.outputs."
            )
        return 1, 1, 1
    divides = all(p % n == 0 for p, n in zip(patch, sizes, strict=True))
    i, j, k = (p // n for p, n in zip(patch, sizes, strict=True))
    if divides and (layout == "resampled" or len({f for f, p in zip((i, j, k), patch, strict=True) if p > 1}) <= 1):
        return i, j, k
    resampled = "model.output=resampled if its voxels are larger by these factors, or " if divides else ""
    raise PatchShapeError(
        f"the network's output {name!r} has shape {tuple(shape)} for patches of {patch} voxels, which is not fewer by "
        f"one integer factor along all axes. Set {resampled}model.output=cropped if it lacks a border, as outputs of "
        f"valid convolutions do."
    )


def halo_of(outputs: Mapping[str, Sequence[int]], patch: Triple, flips: Iterable[int] = ()) -> Padding:
    """The border that valid convolutions use up, before and after along i, j, k.

    An odd border, as even kernels have it, is one voxel wider at the end, as for torch's padding='same'.

    Args:
        outputs: Shapes (B, C, I, J, K) by name, for patches of `patch` voxels.
        patch: Voxels along i, j, k.
        flips: Axes along which patches are also predicted flipped.

    Raises:
        PatchShapeError: outputs that lack different borders, or whose border cannot be determined.
    """
    sizes = {name: tuple(shape[2:]) for name, shape in outputs.items()}
    first = next(iter(sizes.values()))
    if any(other != first for other in sizes.values()):
        raise PatchShapeError(
            f"with model.output=cropped all outputs lack the same border; for patches of {patch} voxels they have "
            f"{sizes}. Choose one by model.outputs."
        )
    if len(first) != 3 or any(not 0 < n <= p for n, p in zip(first, patch, strict=True)):
        raise PatchShapeError(f"outputs of {first} voxels are not an inner part of patches of {patch} voxels.")
    missing = [p - n for p, n in zip(patch, first, strict=True)]
    odd = [axis for axis in flips if missing[axis] % 2]
    if odd:
        raise PatchShapeError(
            f"outputs lack {missing[odd[0]]} voxels along axis {AXES[odd[0]]}, an odd number, so that the outputs of "
            f"flipped patches (model.flips) would be shifted by a voxel."
        )
    i, j, k = ((n // 2, n - n // 2) for n in missing)
    return i, j, k


def describe_layouts(layout: str, outputs: Mapping[str, Sequence[int]], patch: Triple) -> list[str]:
    """A line of text for each output that does not have the patch's voxels: how it is taken to lie in the patch.

    Args:
        layout: See `factor_of`; for 'cropped', `patch` includes the halo.
        outputs: Shapes (B, C, I, J, K) by name.
        patch: Voxels along i, j, k.
    """
    lines = []
    for name, shape in outputs.items():
        sizes = tuple(shape[2:])
        if sizes == patch:
            continue
        what = f"the network's output {name!r} has {sizes} voxels for patches of {patch}: taken for"
        if layout == "cropped":
            missing = [p - n for p, n in zip(patch, sizes, strict=True)]
            lines.append(
                f"{what} the inner part of a patch, without a border of {missing} voxels in all (model.output=cropped)."
            )
        else:
            factor = factor_of(layout, name, shape, patch)
            lines.append(
                f"{what} the whole patch at {factor} times the voxel size (model.output=resampled). If it lacks a "
                f"border instead, as outputs of valid convolutions do, set model.output=cropped."
            )
    return lines
