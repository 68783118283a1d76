"""Refuses ONNX files that cannot be used whatever the settings are, by what they say about themselves."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from voxquilt.errors import ConfigError
from voxquilt.models.weights.onnx_header import Header, Value


def check_header(path: Path, header: Header) -> tuple[Value, list[Path]]:
    """The only input of a file, and the files beside it that have its weights.

    Raises:
        ConfigError: the file takes another input than patches, gives no tensors, or its weights are not where they must
            be.
    """
    patches = _check_input(path, header.inputs)
    if not header.outputs:
        raise ConfigError(f"{path} has no outputs.")
    for output in header.outputs:
        if output.type == 0:
            raise ConfigError(f"{path} cannot be used: its output {output.name} is not a tensor.")
    return patches, _check_external(path, header.external)


def _check_input(path: Path, inputs: Sequence[Value]) -> Value:
    """The only input.

    Raises:
        ConfigError: there are several, or none, or it has no (B, C, I, J, K) or (B, C, I, J).
    """
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise ConfigError(f"{path} cannot be used: its inputs are {names}; wanted is one, the patches.")
    if len(inputs[0].sizes) not in (4, 5):
        raise ConfigError(
            f"{path} cannot be used: its input {inputs[0].name} has {len(inputs[0].sizes)} axes; wanted are 5, (B, C, "
            f"I, J, K), or 4 of a 2-D network."
        )
    return inputs[0]


def _check_external(path: Path, external: Mapping[str, int]) -> list[Path]:
    """Files beside the file that have its weights.

    Raises:
        ConfigError: one of them is outside the file's folder, is missing, or is too small.
    """
    folder = path.parent.resolve()
    files = [path.parent / name for name in external]
    for name, file in zip(external, files, strict=True):
        if not name or os.path.isabs(name) or ".." in Path(name).parts or not file.resolve().is_relative_to(folder):
            raise ConfigError(
                f"{path} was not loaded, since it reads weights from {name!r}, outside its own folder. If you know "
                f"where it comes from, export the network again, with its weights in the file or beside it."
            )
        if not file.is_file():
            raise ConfigError(f"{path} has its weights in {name}, which must be beside it, and is not there.")
        if file.stat().st_size < external[name]:
            raise ConfigError(f"{path} has its weights in {name}, which is too small: copying it was broken off.")
    return files
