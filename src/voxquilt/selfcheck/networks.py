"""Provides the networks of a self-check: one gives back its input, one makes class scores that are linear in it."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from voxquilt.geometry.frame import Padding, Triple


@dataclass(frozen=True)
class OutputForm:
    """How the outputs of the user's network lie in their patches, which the stand-ins imitate.

    Args:
        channels: Channels of each output, by name.
        factors: Voxels of a patch per voxel of each output, along i, j, k.
        halo: Voxels that outputs lack before and after, along i, j, k.
    """

    channels: Mapping[str, int]
    factors: Mapping[str, Triple]
    halo: Padding

    @property
    def factor(self) -> Triple:
        """That of the output with the smallest voxels."""
        return min(self.factors.values(), key=prod)

    def span(self, output: str, span: tuple[float, float]) -> tuple[float, float]:
        """The image's values at which the first and the last class of an output win.

        Every second output has its classes in the other order, so that one in the place of another shows.
        """
        first, last = span
        return (last, first) if list(self.channels).index(output) % 2 else span


class GiveBack(nn.Module):
    """Gives back its patches: without their halo, as means of blocks where outputs have larger voxels.

    A mean of a linear function is its value in the middle of the block, so that ramps stay ramps.

    Args:
        factor, halo: See OutputForm.
        squeeze_axis: See PatchNetwork.
        gain: What outputs are multiplied by. Of the members of an ensemble each has its own, and their mean is 1.
    """

    def __init__(self, factor: Triple, halo: Padding, squeeze_axis: int | None = None, gain: float = 1.0) -> None:
        super().__init__()
        self._gain = gain
        axes = [axis for axis in range(3) if axis != squeeze_axis]
        self._factor = [factor[axis] for axis in axes]
        self._halo = [halo[axis] for axis in axes]

    def forward(self, patches: Tensor) -> Tensor:
        laid = self.laid(patches)
        return as_in_a_run(laid if self._gain == 1 else self._gain * laid, patches)

    def laid(self, patches: Tensor) -> Tensor:
        """The patches with an output's voxels."""
        for axis, (factor, (before, after)) in enumerate(zip(self._factor, self._halo, strict=True), 2):
            patches = patches.narrow(axis, before, patches.shape[axis] - before - after)
            if factor > 1:
                patches = patches.float().unflatten(axis, (-1, factor)).mean(axis + 1)
        return patches.clone()  # the batch's memory is used again


class MakeClasses(nn.Module):
    """Gives scores from the first channel x, which grows from `least` to `most`, so that every class wins somewhere.

    Of K classes, class k has the score 2 k' y - k'^2, where k' = k - (K - 1) / 2 and y is x on a scale from the first
    k' to the last. It is the highest where y is nearest to k', and it is linear in x, so that averages of patches and
    interpolation change no score and no border between classes. One channel is y itself, from -4 to 4.

    Args:
        form: How outputs lie in patches.
        least, most: See above.
        squeeze_axis: See PatchNetwork.
        ends_activated: Whether outputs are probabilities, as those of a network that ends with a soft-max.
    """

    def __init__(
        self,
        form: OutputForm,
        least: float,
        most: float,
        squeeze_axis: int | None = None,
        *,
        ends_activated: bool = False,
    ) -> None:
        super().__init__()
        self._ends_activated = ends_activated
        self._lays = [GiveBack(factor, form.halo, squeeze_axis) for factor in form.factors.values()]
        self._channels = dict(form.channels)
        self._spans = {name: form.span(name, (least, most)) for name in form.channels}

    def forward(self, patches: Tensor) -> Tensor | dict[str, Tensor]:
        values = patches[:, :1].float()
        outputs = {
            name: class_scores(lay.laid(values), count, *self._spans[name], 1, self._ends_activated)
            for (name, count), lay in zip(self._channels.items(), self._lays, strict=True)
        }
        outputs = {name: as_in_a_run(output, patches) for name, output in outputs.items()}
        return outputs[""] if list(outputs) == [""] else outputs


def class_scores(
    values: Tensor, classes: int, least: float, most: float, axis: int, ends_activated: bool = False
) -> Tensor:
    """The scores of MakeClasses along an axis of size 1, in the values' type; with `ends_activated` probabilities."""
    share = (values - least) / (most - least) - 0.5
    if classes == 1:
        return share + 0.5 if ends_activated else 8 * share
    numbers = torch.arange(classes, dtype=values.dtype, device=values.device) - (classes - 1) / 2
    numbers = numbers.reshape([-1 if n == axis else 1 for n in range(values.ndim)])
    scores = 2 * numbers * (share * (classes - 1)) - numbers.square()
    return scores.softmax(axis) if ends_activated else scores


def largest_score(classes: int) -> float:
    """The largest magnitude of a score of MakeClasses."""
    return 4.0 if classes == 1 else max(1.0, 3 * ((classes - 1) / 2) ** 2)


def as_in_a_run(output: Tensor, patches: Tensor) -> Tensor:
    """An output in the type that a convolution would have given it."""
    kind = patches.device.type
    if torch.is_autocast_enabled(kind):
        return output.to(torch.get_autocast_dtype(kind))
    return output.to(patches.dtype)
