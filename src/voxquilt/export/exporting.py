"""Exports a checkpoint: builds its network, writes it as another file, and compares the two before the file is kept."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from voxquilt.cli.inherited_settings import default_targets
from voxquilt.cli.instantiate import build, check_classes
from voxquilt.cli.main import conf_dir
from voxquilt.errors import ConfigError
from voxquilt.export.comparison import Difference, compare, outputs_of
from voxquilt.export.writers import to_program, write_onnx, write_program, write_torchscript
from voxquilt.filesystem import temporary_suffix
from voxquilt.geometry.frame import Triple, to_triple
from voxquilt.models.weights.detect import kind_of
from voxquilt.models.weights.reading import read_by_format
from voxquilt.models.weights.registry import WEIGHTS, ReadOptions
from voxquilt.models.weights.stored_settings import carried
from voxquilt.planning.network_check import wanted_channels
from voxquilt.text import first_line

_OTHER = 3


def export(
    source: Path, target: Path, patch_size: Triple | None, batch_size: int | None, allowed: Sequence[str]
) -> str:
    """Write the network of a checkpoint, with its settings, as .onnx, .pt2 or .ts.

    Args:
        source: A file that brings its network and settings.
        target: The file, which appears when it is complete and was compared.
        patch_size: Voxels along i, j, k; None takes those of the settings.
        batch_size: The only number of patches that it will take at a time; None for any number if that is possible.
        allowed: Classes that the checkpoint may name, beside those of run.checkpoint_targets.

    Returns:
        What was written, and how much outputs differ, for people.

    Raises:
        ConfigError: the file brings no network, or it cannot be exported, or gives other outputs; nothing is written.
    """
    settings, network = _load(source, allowed)
    size = patch_size or settings["data"].get("patch_size")
    if size is None:
        raise ConfigError(f"{source} has no data.patch_size: set --patch-size.")
    patch = to_triple(size, "data.patch_size", minimum=1)
    _set_patch(settings["data"], patch)
    text = json.dumps(settings)
    patches = _patches(source, network, settings, patch)
    with tempfile.TemporaryDirectory(
        prefix=f".{target.name}.", suffix=temporary_suffix(os.getpid()), dir=target.parent
    ) as folder:
        file = Path(folder) / target.name
        fixed = _write(file, network, patches, batch_size, text)
        difference = _compare(file, network, patches, fixed)
        written = _keep(Path(folder), target)
    return (
        f"{' and '.join(map(str, written))}: patches of {' x '.join(map(str, patch))}, {fixed or 'any number'} at a "
        f"time. Outputs differ from those of {source} by at most {difference.largest:.2g} ({difference.share:.1g} of "
        f"their range)."
    )


def _set_patch(data: dict[str, Any], patch: Triple) -> None:
    """Set the patch size; where it is another one, neighbours share as large a part of it as they did."""
    before = data.get("patch_size") or patch
    overlap = to_triple(data.get("patch_overlap") or 0, "data.patch_overlap")
    if to_triple(before, "data.patch_size") != patch and any(overlap):
        parts = zip(overlap, to_triple(before, "data.patch_size"), patch, strict=True)
        data["patch_overlap"] = [shared * new // old // 2 * 2 for shared, old, new in parts]
    data["patch_size"] = list(patch)


def _load(source: Path, allowed: Sequence[str]) -> tuple[dict[str, Any], nn.Module]:
    """The settings for the file, and the network in eval mode."""
    kind, settings = kind_of(source), carried(source)
    if not WEIGHTS.load(kind)().needs_network:
        raise ConfigError(f"{source} is a network by itself ({kind}): export the checkpoint that it was made of.")
    if settings is None or settings["model"].get("net") is None:
        raise ConfigError(
            f"{source} does not bring its network and settings, as checkpoints of train.py do: load it in Python, and "
            f"use torch.onnx.export, torch.export.save or torch.jit.save."
        )
    check_classes(settings, [*default_targets(conf_dir()), *allowed], "add its package by --allow 'my_package.*'")
    settings = deepcopy(settings)
    net = build(settings["model"].pop("net"), "model.net")
    (network,) = read_by_format(source, ReadOptions(net, prefix="net."))
    return settings, network.eval()


def _patches(source: Path, network: nn.Module, settings: Mapping[str, Any], patch: Triple) -> Tensor:
    """Random patches that the network takes, as it takes them."""
    axis = settings["model"].get("squeeze_axis")
    sizes = [n for i, n in enumerate(patch) if i != axis]
    counts = dict.fromkeys(filter(None, (wanted_channels(network), len(settings.get("images", ())))))
    problem = "its settings name no images"
    for channels in counts:
        patches = torch.randn(_OTHER, channels, *sizes, generator=torch.Generator().manual_seed(0))
        try:
            outputs_of(network, patches[:1])
        except ConfigError:
            raise
        except Exception as error:  # a network's own code may raise anything
            problem = f"{type(error).__name__}: {first_line(error)}"
            continue
        return patches
    raise ConfigError(f"the network of {source} cannot take patches of {list(patch)} voxels: {problem}")


def _write(file: Path, network: nn.Module, patches: Tensor, batch_size: int | None, settings: str) -> int | None:
    """Write the file; the number of patches that it takes at a time, None for any."""
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1; it is {batch_size}.")
    if file.suffix == ".ts":
        if batch_size is not None:
            raise ConfigError("TorchScript takes batches of any size: leave --batch-size out.")
        write_torchscript(file, network, patches[:2], settings)
        return None
    try:
        # Two patches, since torch takes the size of a single one for fixed.
        program = to_program(network, _batch(patches, batch_size or 2), is_free=batch_size is None)
    except ConfigError:
        if batch_size is not None:
            raise
        batch_size = 1
        program = to_program(network, patches[:1], is_free=False)
    if file.suffix == ".pt2":
        write_program(file, program, settings)
    else:
        write_onnx(file, program, _output_names(network, patches), settings)
    return batch_size


def _batch(patches: Tensor, count: int) -> Tensor:
    return patches[torch.arange(count) % len(patches)]


def _output_names(network: nn.Module, patches: Tensor) -> list[str]:
    """Names of the outputs: those of a mapping, as far as they are names, or out0, out1, ..."""
    with torch.inference_mode():
        outputs = network(patches[:1])
    if isinstance(outputs, Mapping) and all(isinstance(output, Tensor) for output in outputs.values()):
        return [str(name) for name in outputs]
    count = 1 if isinstance(outputs, Tensor) else len(outputs_of(network, patches[:1]))
    return ["scores"] if count == 1 else [f"out{n}" for n in range(count)]


def _compare(file: Path, network: nn.Module, patches: Tensor, fixed: int | None) -> Difference:
    """The largest difference for one patch, and for a batch that is not of the size that was exported."""
    (made,) = read_by_format(file, ReadOptions())
    differences = []
    for count in (1, _OTHER if fixed is None else fixed + 1):
        batch = _batch(patches, count)
        differences.append(compare(file, outputs_of(network, batch), outputs_of(made, batch)))
    return max(differences, key=lambda difference: difference.share)


def _keep(folder: Path, target: Path) -> list[Path]:
    """Move complete files to their place, the target last, without which the others are not read."""
    files = sorted(folder.iterdir(), key=lambda file: file.name == target.name)
    for file in files:
        with open(file, "rb") as content:
            os.fsync(content.fileno())
        os.replace(file, target.parent / file.name)
    return [target.parent / file.name for file in reversed(files)]
