"""Do network, patches and classes fit each other? Asked before a run, of shapes alone."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

import torch
from torch import nn

from voxquilt.data.discovery import SubjectFiles
from voxquilt.data.subject import ScalarImage
from voxquilt.errors import ConfigError, OutputError, PatchShapeError, VoxquiltError
from voxquilt.geometry.frame import AXES, Padding, Triple
from voxquilt.geometry.grid import make_grid
from voxquilt.geometry.output_layout import factor_of, halo_of
from voxquilt.geometry.padding import NO_PADDING
from voxquilt.models.patch_network import PatchNetwork
from voxquilt.planning.shape_probe import Probe, probe

# What a network's strides may ask of a patch: powers of 2, as nearly all networks have them.
_MULTIPLES = (2, 4, 8, 16, 32, 64)


class ChannelsError(ConfigError):
    """The network takes another number of channels.

    Args:
        message: For people.
        wanted: That number.
    """

    def __init__(self, message: str, wanted: int) -> None:
        super().__init__(message)
        self.wanted = wanted


def check_fits(
    network: nn.Module,
    images: Sequence[str],
    channels: int,
    patch_size: Triple,
    class_names: Sequence[str] | None,
    known: Probe | None = None,
    layout: str | None = None,
) -> Probe | None:
    """Refuse what the network cannot take, with what it could; None where it cannot be asked without voxels.

    Args:
        network: (B, C, I, J, K) to outputs by name.
        images: Of a subject, for the message.
        channels: Of these together.
        patch_size: Voxels.
        class_names: Of the only output's channels; None for any number.
        known: What the network makes of such patches, where that was found before.
        layout: How outputs lie in patches, see `voxquilt.geometry.output_layout.factor_of`; None is as the network has
            it.

    Raises:
        ConfigError: another number of channels or classes, or a patch that the network's strides do not divide.
    """
    layout = layout or (network.layout if isinstance(network, PatchNetwork) else "auto")
    found = known or probed(network, channels, patch_size)
    if isinstance(found, Probe):
        try:
            _check_layout(network, channels, patch_size, layout, found)
        except PatchShapeError as error:
            found = error
    if isinstance(found, OutputError):
        raise ConfigError(str(found))
    if isinstance(found, torch.OutOfMemoryError):
        return None  # which batches of other sizes would not tell more about
    if isinstance(found, Exception):
        # Where nothing else would do either, the network just cannot run without voxels.
        wanted = _wanted_channels(network)
        if wanted not in (None, channels) and isinstance(probed(network, wanted, patch_size), Probe):
            assert wanted is not None
            raise ChannelsError(
                f"the network takes {wanted} channel{'s' * (wanted != 1)}; subjects have {channels} "
                f"({', '.join(images)}). Set data.images or data.inputs to what it was trained on, or "
                f"model.net.in_channels={channels} for a network that is.",
                wanted,
            )
        larger = [m for m in _MULTIPLES if _up(patch_size, m) != patch_size]
        multiple = next((m for m in larger if _does(network, channels, _up(patch_size, m), m, layout)), None)
        if multiple is not None:
            axes = ", ".join(f"{axis} has {n}" for axis, n in zip(AXES, patch_size, strict=True) if n % multiple)
            raise ConfigError(
                f"the network cannot take patches of {list(patch_size)} voxels: wanted is a multiple of {multiple} "
                f"({axes}). data.patch_size={list(_up(patch_size, multiple))} would do. It said: {_first(found)}"
            )
        if isinstance(found, PatchShapeError):
            raise ConfigError(str(found))
        return None
    sizes = {shape[1] for shape in found.outputs.values()}
    if class_names and len(found.outputs) == 1 and sizes != {len(class_names)}:
        raise ConfigError(
            f"stitch.class_names has {len(class_names)} names ({', '.join(class_names)}); the network gives "
            f"{sizes.pop()} channels."
        )
    return found


def find_halo(network: PatchNetwork, cases: Iterable[SubjectFiles], patch_size: Triple) -> Padding:
    """The border that a network's valid convolutions use up of a patch; nothing where no channels are known.

    Args:
        network: With model.output=cropped.
        cases: The subjects; their headers are asked for channels where the network's first convolution does not tell.
        patch_size: Voxels.

    Raises:
        ConfigError: the network cannot take such patches, its outputs lack different borders, or they lack something
            because of the patch's size.
    """
    count = _wanted_channels(network) or next(_channels(cases), None)
    if count is None:
        return NO_PADDING
    try:
        found = probed(network, count, patch_size)
        if isinstance(found, Exception):
            # A network that looks at voxels is shown some.
            with torch.inference_mode():
                made = network.eval()(torch.zeros(1, count, *patch_size))
            return halo_of({name: tensor.shape for name, tensor in made.items()}, patch_size, network.flips)
        halo = halo_of(found.outputs, patch_size, network.flips)
    except PatchShapeError as error:
        raise ConfigError(f"data.patch_size={list(patch_size)}: {error}") from error
    except Exception as error:
        raise ConfigError(
            f"the network cannot take patches of {list(patch_size)} voxels with {count} channel{'s' * (count != 1)}: "
            f"{_first(error)}"
        ) from error
    lost = [sum(around) for around in halo]
    for more in range(1, 17):
        larger = _plus(patch_size, more)
        other = probed(network, count, larger)
        if isinstance(other, Probe) and not any(a < b for a, b in zip(_lost(other, larger), lost, strict=True)):
            continue
        if isinstance(other, Probe):
            raise ConfigError(
                f"of patches of {list(patch_size)} voxels the network's output lacks {lost}, and of {list(larger)} "
                f"only {_lost(other, larger)}: some are lost because of the patch's size, not at its border, and it is "
                f"not certain where the output lies. Set data.patch_size={list(larger)}."
            )
    return halo


def _channels(cases: Iterable[SubjectFiles]) -> Iterator[int]:
    """Of subjects' images, as far as their headers can be read."""
    for case in cases:
        with suppress(VoxquiltError):
            yield sum(ScalarImage(path).shape[0] for path in case.images.values())


def check_overlap(patch_size: Triple, halo: Padding, patch_overlap: Triple) -> None:
    """Raise ConfigError where what patches leave of themselves cannot overlap so."""
    i, j, k = (n - sum(around) for n, around in zip(patch_size, halo, strict=True))
    try:
        make_grid((i, j, k), (i, j, k), patch_overlap)
    except VoxquiltError as error:
        raise ConfigError(
            f"patches of {list(patch_size)} voxels have outputs of {[i, j, k]}, and data.patch_overlap is that of the "
            f"outputs: {error}"
        ) from error


def probed(network: nn.Module, channels: int | None, patch_size: Triple) -> Probe | Exception:
    """What the network makes of patches, or what it raises for them."""
    try:
        return probe(network, channels or 1, patch_size)
    except Exception as error:  # a network's own code may raise anything
        return error


def _check_layout(network: nn.Module, channels: int, patch_size: Triple, layout: str, found: Probe) -> None:
    """Raise PatchShapeError for outputs that lie otherwise than `layout` says.

    Where 'auto' would take an output for one of lower resolution, a larger patch tells whether it is: valid
    convolutions of twice the patch lack no more than of this one.
    """
    if layout == "cropped":
        halo_of(found.outputs, patch_size)
        return
    for name, shape in found.outputs.items():
        factor = factor_of(layout, name, shape, patch_size)
        if layout != "auto" or max(factor) == 1:
            continue
        doubled = _plus(patch_size, max(patch_size))
        other = probed(network, channels, doubled)
        if isinstance(other, Probe) and _lost(other, doubled, name) == _lost(found, patch_size, name):
            raise PatchShapeError(
                f"the network's output {name!r} has {tuple(shape[2:])} voxels for patches of {patch_size}, and lacks "
                f"as many of larger patches: it lacks a border, as that of valid convolutions does. Set "
                f"model.output=cropped (or model.output=resampled, if its voxels are larger nonetheless)."
            )


def _does(network: nn.Module, channels: int, patch_size: Triple, multiple: int, layout: str) -> bool:
    """Whether patches of a multiple would do: their outputs lie as those of the next multiple do."""
    factors = []
    for size in (patch_size, _plus(patch_size, multiple)):
        found = probed(network, channels, size)
        if isinstance(found, Exception):
            return False
        try:
            factors.append({name: factor_of(layout, name, shape, size) for name, shape in found.outputs.items()})
        except PatchShapeError:
            return False
    return factors[0] == factors[1]


def _plus(patch_size: Triple, more: int) -> Triple:
    i, j, k = (n if n == 1 else n + more for n in patch_size)  # 1: an axis that a 2-D network lacks
    return i, j, k


def _lost(found: Probe, patch_size: Triple, name: str | None = None) -> list[int]:
    """Voxels along i, j, k that an output has less than its patch, or that the first one has."""
    shape = next(iter(found.outputs.values())) if name is None else found.outputs[name]
    return [p - n for p, n in zip(patch_size, shape[2:], strict=True)]


def _wanted_channels(network: nn.Module) -> int | None:
    """What the first convolution takes."""
    weight = next((p for p in network.parameters() if p.ndim in (4, 5)), None)
    return None if weight is None else weight.shape[1]


def _up(patch_size: Triple, multiple: int) -> Triple:
    i, j, k = (n if n == 1 else -(-n // multiple) * multiple for n in patch_size)  # 1: an axis that a 2-D network lacks
    return i, j, k


def _first(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
