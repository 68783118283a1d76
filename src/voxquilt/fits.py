"""Do network, patches and classes fit each other? Asked before a run, of shapes alone."""

from collections.abc import Sequence

import torch
from torch import nn

from voxquilt.errors import ConfigError, OutputError, PatchShapeError
from voxquilt.geometry import AXES, Triple
from voxquilt.probe import Probe, probe

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
) -> Probe | None:
    """Refuse what the network cannot take, with what it could; None where it cannot be asked without voxels.

    Args:
        network: (B, C, I, J, K) to outputs by name.
        images: Of a subject, for the message.
        channels: Of these together.
        patch_size: Voxels.
        class_names: Of the only output's channels; None for any number.
        known: What the network makes of such patches, where that was found before.

    Raises:
        ConfigError: another number of channels or classes, or a patch that the network's strides do not divide.
    """
    found = known or _probed(network, channels, patch_size)
    if isinstance(found, OutputError):
        raise ConfigError(str(found))
    if isinstance(found, torch.OutOfMemoryError):
        return None  # which batches of other sizes would not tell more about
    if isinstance(found, Exception):
        # Where nothing else would do either, the network just cannot run without voxels.
        wanted = _wanted_channels(network)
        if wanted not in (None, channels) and isinstance(_probed(network, wanted, patch_size), Probe):
            assert wanted is not None
            raise ChannelsError(
                f"the network takes {wanted} channel{'s' * (wanted != 1)}; subjects have {channels} "
                f"({', '.join(images)}). Set data.images or data.inputs to what it was trained on, or "
                f"model.net.in_channels={channels} for a network that is.",
                wanted,
            )
        larger = [m for m in _MULTIPLES if _up(patch_size, m) != patch_size]
        multiple = next((m for m in larger if isinstance(_probed(network, channels, _up(patch_size, m)), Probe)), None)
        if multiple is not None:
            axes = ", ".join(f"{axis} has {n}" for axis, n in zip(AXES, patch_size, strict=True) if n % multiple)
            raise ConfigError(
                f"the network cannot take patches of {list(patch_size)} voxels: wanted is a multiple of {multiple} "
                f"({axes}). data.patch_size={list(_up(patch_size, multiple))} would do. It said: {_first(found)}"
            )
        return None
    sizes = {shape[1] for shape in found.outputs.values()}
    if class_names and len(found.outputs) == 1 and sizes != {len(class_names)}:
        raise ConfigError(
            f"stitch.class_names has {len(class_names)} names ({', '.join(class_names)}); the network gives "
            f"{sizes.pop()} channels."
        )
    return found


def _probed(network: nn.Module, channels: int | None, patch_size: Triple) -> Probe | Exception:
    try:
        found = probe(network, channels or 1, patch_size)
        bad = [shape for shape in found.outputs.values() if not _divides(patch_size, shape)]
        return PatchShapeError(f"its output is {bad[0]}.") if bad else found
    except Exception as error:  # a network's own code may raise anything
        return error


def _divides(patch_size: Triple, shape: Sequence[int]) -> bool:
    """Whether an output has the patch's voxels, or fewer by a whole factor."""
    return len(shape) == 5 and all(n and p % n == 0 for p, n in zip(patch_size, shape[2:], strict=True))


def _wanted_channels(network: nn.Module) -> int | None:
    """What the first convolution takes."""
    weight = next((p for p in network.parameters() if p.ndim in (4, 5)), None)
    return None if weight is None else weight.shape[1]


def _up(patch_size: Triple, multiple: int) -> Triple:
    i, j, k = (n if n == 1 else -(-n // multiple) * multiple for n in patch_size)  # 1: an axis that a 2-D network lacks
    return i, j, k


def _first(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
