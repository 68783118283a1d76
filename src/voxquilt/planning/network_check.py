"""Checks before a run, from shapes alone, that network, patches and classes fit each other."""

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

# Multiples that a network's strides may require of a patch: powers of 2 for nearly all networks.
_MULTIPLES = (2, 4, 8, 16, 32, 64)


class ChannelsError(ConfigError):
    """The network takes another number of channels.

    Args:
        message: The message for people.
        wanted: The number of channels that the network takes.
    """

    def __init__(self, message: str, wanted: int) -> None:
        super().__init__(message)
        self.wanted = wanted


def check_network(
    network: nn.Module,
    images: Sequence[str],
    channels: int,
    patch_size: Triple,
    class_names: Sequence[str] | None,
    known: Probe | None = None,
    layout: str | None = None,
) -> Probe | None:
    """Refuse channels, patches or classes that the network cannot take, with a suggestion of what it can.

    Args:
        network: Maps (B, C, I, J, K) to outputs by name.
        images: Names of a subject's images, for the message.
        channels: Channels of these images together.
        patch_size: Voxels along i, j, k.
        class_names: Names of the only output's channels; None for any number.
        known: The network's forward pass on such patches, if it was probed before.
        layout: How outputs lie in patches, see `voxquilt.geometry.output_layout.factor_of`; None takes the network's.

    Returns:
        The forward pass; None where the network cannot be run without voxels.

    Raises:
        ConfigError: another number of channels or classes, or a patch that the network's strides do not divide.
    """
    layout = layout or (network.layout if isinstance(network, PatchNetwork) else "auto")
    result = known or try_probe(network, channels, patch_size)
    if isinstance(result, Probe):
        try:
            _check_layout(network, channels, patch_size, layout, result)
        except PatchShapeError as error:
            result = error
    if isinstance(result, OutputError):
        raise ConfigError(str(result))
    if isinstance(result, torch.OutOfMemoryError):
        return None  # other batches would not tell more
    if isinstance(result, Exception):
        # If no other channels or patches work either, the network just cannot run without voxels.
        _check_channels(network, images, channels, patch_size)
        _check_multiple(network, channels, patch_size, layout, result)
        if isinstance(result, PatchShapeError):
            raise ConfigError(str(result))
        return None
    _check_classes(result, class_names)
    return result


def _check_channels(network: nn.Module, images: Sequence[str], channels: int, patch_size: Triple) -> None:
    """Raise ChannelsError if the network works with the channels that its first convolution takes."""
    wanted = wanted_channels(network)
    if wanted not in (None, channels) and isinstance(try_probe(network, wanted, patch_size), Probe):
        assert wanted is not None
        raise ChannelsError(
            f"the network takes {wanted} channel{'s' * (wanted != 1)}; subjects have {channels} ({', '.join(images)}). "
            f"Set data.images or data.inputs to what it was trained on, or model.net.in_channels={channels} for a "
            f"network that is.",
            wanted,
        )


def _check_multiple(network: nn.Module, channels: int, patch_size: Triple, layout: str, error: Exception) -> None:
    """Raise ConfigError, naming a patch size, if the network works with patches of some multiple of voxels."""
    larger = [m for m in _MULTIPLES if _rounded_up(patch_size, m) != patch_size]
    multiple = next((m for m in larger if _accepts(network, channels, _rounded_up(patch_size, m), m, layout)), None)
    if multiple is not None:
        axes = ", ".join(f"{axis} has {n}" for axis, n in zip(AXES, patch_size, strict=True) if n % multiple)
        raise ConfigError(
            f"the network cannot take patches of {list(patch_size)} voxels: wanted is a multiple of {multiple} "
            f"({axes}). data.patch_size={list(_rounded_up(patch_size, multiple))} would work. Its error: "
            f"{_summary(error)}"
        )


def _check_classes(probe: Probe, class_names: Sequence[str] | None) -> None:
    """Raise ConfigError if the only output has another number of channels than there are names."""
    channels = {shape[1] for shape in probe.outputs.values()}
    if class_names and len(probe.outputs) == 1 and channels != {len(class_names)}:
        raise ConfigError(
            f"stitch.class_names has {len(class_names)} names ({', '.join(class_names)}); the network gives "
            f"{channels.pop()} channels."
        )


def try_zeros(network: nn.Module, channels: int, patch_size: Triple) -> None:
    """Run a network that has no shapes without voxels, on a patch of zeros on the host.

    Raises:
        ConfigError: it cannot take such a patch.
    """
    training = network.training
    try:
        with torch.inference_mode():
            network.eval()(torch.zeros(1, channels, *patch_size))
    except (torch.OutOfMemoryError, MemoryError):
        return  # the host may be smaller than the device
    except Exception as error:  # a network's own code may raise anything
        raise ConfigError(
            f"the network cannot take patches of {list(patch_size)} voxels with {channels} "
            f"channel{'s' * (channels > 1)}; see model.net and data.patch_size. Its error: {_summary(error)}"
        ) from error
    finally:
        network.train(training)


def find_halo(network: PatchNetwork, cases: Iterable[SubjectFiles], patch_size: Triple) -> Padding:
    """The border of a patch that a network's valid convolutions use up; none if the number of channels is unknown.

    Args:
        network: A network with model.output=cropped.
        cases: The subjects, whose headers give the number of channels where the network's first convolution does not.
        patch_size: Voxels along i, j, k.

    Raises:
        ConfigError: the network cannot take such patches, its outputs lack different borders, or they lack voxels
            because of the patch's size.
    """
    count = wanted_channels(network) or next(_channels(cases), None)
    if count is None:
        return NO_PADDING
    try:
        result = try_probe(network, count, patch_size)
        if isinstance(result, Exception):
            # The network may look at values, so it is run on zeros.
            with torch.inference_mode():
                outputs = network.eval()(torch.zeros(1, count, *patch_size))
            return halo_of({name: tensor.shape for name, tensor in outputs.items()}, patch_size, network.flips)
        halo = halo_of(result.outputs, patch_size, network.flips)
    except PatchShapeError as error:
        raise ConfigError(f"data.patch_size={list(patch_size)}: {error}") from error
    except Exception as error:
        raise ConfigError(
            f"the network cannot take patches of {list(patch_size)} voxels with {count} channel{'s' * (count != 1)}: "
            f"{_summary(error)}"
        ) from error
    _check_halo(network, count, patch_size, [sum(around) for around in halo])
    return halo


def _check_halo(network: PatchNetwork, channels: int, patch_size: Triple, missing: list[int]) -> None:
    """Raise ConfigError, naming a patch size, if outputs of slightly larger patches lack fewer voxels."""
    for more in range(1, 17):
        larger = _enlarged(patch_size, more)
        other = try_probe(network, channels, larger)
        if isinstance(other, Exception):
            continue
        missing_of_larger = _missing_voxels(other, larger)
        if any(a < b for a, b in zip(missing_of_larger, missing, strict=True)):
            raise ConfigError(
                f"the network's output lacks {missing} voxels of patches of {list(patch_size)}, and only "
                f"{missing_of_larger} of patches of {list(larger)}: some are missing because of the patch's size, not "
                f"at its border, so it is not certain where the output lies. Set data.patch_size={list(larger)}."
            )


def _channels(cases: Iterable[SubjectFiles]) -> Iterator[int]:
    """The number of channels of each subject whose headers can be read."""
    for case in cases:
        with suppress(VoxquiltError):
            yield sum(ScalarImage(path).shape[0] for path in case.images.values())


def check_overlap(patch_size: Triple, halo: Padding, patch_overlap: Triple) -> None:
    """Raise ConfigError where outputs, which are patches without their halo, cannot overlap by patch_overlap."""
    i, j, k = (n - sum(around) for n, around in zip(patch_size, halo, strict=True))
    try:
        make_grid((i, j, k), (i, j, k), patch_overlap)
    except VoxquiltError as error:
        raise ConfigError(
            f"patches of {list(patch_size)} voxels have outputs of {[i, j, k]}, and data.patch_overlap is the overlap "
            f"of the outputs: {error}"
        ) from error


def try_probe(network: nn.Module, channels: int | None, patch_size: Triple) -> Probe | Exception:
    """The network's forward pass on patches, or the error that it raises."""
    try:
        return probe(network, channels or 1, patch_size)
    except Exception as error:  # a network's own code may raise anything
        return error


def _check_layout(network: nn.Module, channels: int, patch_size: Triple, layout: str, probe: Probe) -> None:
    """Raise PatchShapeError for outputs that do not lie in patches as `layout` says.

    Where 'auto' would take an output for one of lower resolution, a patch of twice the size shows whether it is: valid
    convolutions use up as many voxels of it as of this one.
    """
    if layout == "cropped":
        halo_of(probe.outputs, patch_size)
        return
    for name, shape in probe.outputs.items():
        factor = factor_of(layout, name, shape, patch_size)
        if layout != "auto" or max(factor) == 1:
            continue
        doubled = _enlarged(patch_size, max(patch_size))
        other = try_probe(network, channels, doubled)
        if isinstance(other, Probe) and (
            _missing_voxels(other, doubled, name) == _missing_voxels(probe, patch_size, name)
        ):
            raise PatchShapeError(
                f"the network's output {name!r} has {tuple(shape[2:])} voxels for patches of {patch_size}, and lacks "
                f"as many of larger patches: it lacks a border, as outputs of valid convolutions do. Set "
                f"model.output=cropped (or model.output=resampled, if its voxels are larger nonetheless)."
            )


def _accepts(network: nn.Module, channels: int, patch_size: Triple, multiple: int, layout: str) -> bool:
    """Whether the network takes such patches: their outputs lie in them as those of the next multiple do."""
    factors = []
    for size in (patch_size, _enlarged(patch_size, multiple)):
        result = try_probe(network, channels, size)
        if isinstance(result, Exception):
            return False
        try:
            factors.append({name: factor_of(layout, name, shape, size) for name, shape in result.outputs.items()})
        except PatchShapeError:
            return False
    return factors[0] == factors[1]


def _enlarged(patch_size: Triple, more: int) -> Triple:
    i, j, k = (n if n == 1 else n + more for n in patch_size)  # 1: an axis that a 2-D network lacks
    return i, j, k


def _missing_voxels(probe: Probe, patch_size: Triple, name: str | None = None) -> list[int]:
    """How many voxels along i, j, k an output has less than its patch; the first output if no name is given."""
    shape = next(iter(probe.outputs.values())) if name is None else probe.outputs[name]
    return [p - n for p, n in zip(patch_size, shape[2:], strict=True)]


def wanted_channels(network: nn.Module) -> int | None:
    """The number of channels that the first convolution takes."""
    weight = next((p for p in network.parameters() if p.ndim in (4, 5)), None)
    return None if weight is None else weight.shape[1]


def _rounded_up(patch_size: Triple, multiple: int) -> Triple:
    i, j, k = (n if n == 1 else -(-n // multiple) * multiple for n in patch_size)  # 1: an axis that a 2-D network lacks
    return i, j, k


def _summary(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
