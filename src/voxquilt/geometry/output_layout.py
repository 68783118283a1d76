"""How does a network's output lie in the patch that it was made of?

Along one axis, a patch of 12 voxels and what a network may give for it:

    patch        |-|-|-|-|-|-|-|-|-|-|-|-|
    as large     |-|-|-|-|-|-|-|-|-|-|-|-|
    resampled    |---|---|---|---|---|---|     voxels that are a whole factor larger
    cropped          |-|-|-|-|-|-|-|-|         without the halo that valid convolutions use up
"""

from collections.abc import Iterable, Mapping, Sequence

from voxquilt.errors import PatchShapeError
from voxquilt.geometry.frame import AXES, Padding, Triple


def factor_of(layout: str, name: str, shape: Sequence[int], patch: Triple) -> Triple:
    """How many times larger than the patch's voxels those of an output are, along i, j, k.

    Args:
        layout: 'resampled' takes any whole factors, 'auto' one factor for all axes on which the patch has several
            voxels, 'cropped' none: the output's voxels are those of `patch`, which is without its halo. 'equal', of
            training, takes outputs that are as large as patches.
        name: Of the output, '' for the only one.
        shape: (B, C, I, J, K) of the output.
        patch: Voxels of the patch, or with 'cropped' of what is left of it.

    Raises:
        PatchShapeError: another shape; what it may be is said.
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
                f"the network's output {name!r} has {sizes} voxels where others, or other patches, have {patch}; with "
                f"model.output=cropped all outputs lack the same border. Choose one by model.outputs."
            )
        return 1, 1, 1
    whole = all(p % n == 0 for p, n in zip(patch, sizes, strict=True))
    i, j, k = (p // n for p, n in zip(patch, sizes, strict=True))
    if whole and (layout == "resampled" or len({f for f, p in zip((i, j, k), patch, strict=True) if p > 1}) <= 1):
        return i, j, k
    resampled = "model.output=resampled if its voxels are larger by these factors, or " if whole else ""
    raise PatchShapeError(
        f"the network's output {name!r} has shape {tuple(shape)} for patches of {patch} voxels, which is not fewer by "
        f"one whole factor along all axes. Set {resampled}model.output=cropped if it lacks a border, as that of valid "
        f"convolutions does."
    )


def halo_of(outputs: Mapping[str, Sequence[int]], patch: Triple, flips: Iterable[int] = ()) -> Padding:
    """The border that valid convolutions use up, before and after along i, j, k.

    Where it is odd, as that of even kernels, the voxel more is at the end, as torch's padding='same' has it.

    Args:
        outputs: Shapes (B, C, I, J, K) by name, for patches of `patch` voxels.
        patch: Voxels.
        flips: Axes along which patches are also predicted flipped.

    Raises:
        PatchShapeError: outputs that lack different borders, or no border could be.
    """
    sizes = {name: tuple(shape[2:]) for name, shape in outputs.items()}
    first = next(iter(sizes.values()))
    if any(other != first for other in sizes.values()):
        raise PatchShapeError(
            f"with model.output=cropped all outputs lack the same border; for patches of {patch} voxels they have "
            f"{sizes}. Choose one by model.outputs."
        )
    if len(first) != 3 or any(not 0 < n <= p for n, p in zip(first, patch, strict=True)):
        raise PatchShapeError(f"outputs of {first} voxels are no inner part of patches of {patch} voxels.")
    lost = [p - n for p, n in zip(patch, first, strict=True)]
    odd = [axis for axis in flips if lost[axis] % 2]
    if odd:
        raise PatchShapeError(
            f"outputs lack {lost[odd[0]]} voxels along axis {AXES[odd[0]]}: an odd number lies askew, so that flipped "
            f"patches (model.flips) would not lie on the others."
        )
    i, j, k = ((n // 2, n - n // 2) for n in lost)
    return i, j, k


def described(layout: str, outputs: Mapping[str, Sequence[int]], patch: Triple) -> list[str]:
    """A line for each output that has not the patch's voxels: what it was taken for.

    Args:
        layout: See `factor_of`; with 'cropped' `patch` is the network's, halo included.
        outputs: Shapes (B, C, I, J, K) by name.
        patch: Voxels.
    """
    lines = []
    for name, shape in outputs.items():
        sizes = tuple(shape[2:])
        if sizes == patch:
            continue
        what = f"the network's output {name!r} has {sizes} voxels for patches of {patch}: taken for"
        if layout == "cropped":
            lost = [p - n for p, n in zip(patch, sizes, strict=True)]
            lines.append(
                f"{what} the inner part of a patch, without a border of {lost} voxels in all (model.output=cropped)."
            )
        else:
            factor = factor_of(layout, name, shape, patch)
            lines.append(
                f"{what} the whole patch at {factor} times the voxel size (model.output=resampled). If it lacks a "
                f"border instead, as that of valid convolutions does, set model.output=cropped."
            )
    return lines
