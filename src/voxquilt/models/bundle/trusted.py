"""Runs parts of a bundle that the user trusts, by MONAI's own parser: its network, and transforms that are not read."""

import sys
from functools import cache
from pathlib import Path
from typing import Any

from monai.bundle.config_parser import ConfigParser
from monai.data.meta_tensor import MetaTensor
from monai.transforms.transform import MapTransform
from torch import Tensor, nn

from voxquilt.errors import ConfigError
from voxquilt.text import first_line


@cache
def _parser(folder: str, config: str) -> ConfigParser:
    """The parser of a bundle, whose folder can be imported from."""
    if folder not in sys.path:
        sys.path.append(folder)
    parser = ConfigParser()
    parser.read_config(str(Path(folder) / "configs" / config))
    parser["bundle_root"] = folder
    if "imports" in parser:
        parser.get_parsed_content("imports")
    return parser


def _made(folder: str, config: str, place: str) -> Any:
    try:
        return _parser(folder, config).get_parsed_content(place)
    except Exception as error:  # of any code
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"{folder}/configs/{config}: {place} cannot be made: {reason}.") from error


def bundle_network(folder: str, config: str) -> nn.Module:
    """The network of a bundle, with what its code makes of it.

    Args:
        folder: The bundle.
        config: Name of the configuration in its folder `configs`.

    Raises:
        ConfigError: it cannot be made, or is not a network.
    """
    network = _made(folder, config, "network_def")
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{folder}/configs/{config}: network_def made a {type(network).__name__}; not a network.")
    return network


def evaluate_value(folder: str, config: str, place: str) -> Any:
    """The value of an expression: plain, since it becomes a setting.

    Raises:
        ConfigError: it cannot be evaluated, or is not plain.
    """
    value = _made(folder, config, place)
    value = list(value) if isinstance(value, tuple) else value
    values = value if isinstance(value, list) else [value]
    if not all(item is None or isinstance(item, bool | int | float | str) for item in values):
        raise ConfigError(f"{folder}/configs/{config}: {place} is {value!r}; wanted are plain values.")
    return value


class BundleTransform:
    """A transform of a bundle, on the whole tensor of one image or label map.

    It sees the tensor and nothing of the file: neither its affine nor other entries.

    Args:
        folder: The bundle.
        config: Name of the configuration in its folder `configs`.
        place: The transform's id.
        key: The name by which a dictionary transform finds the tensor.
    """

    def __init__(self, folder: str, config: str, place: str, key: str) -> None:
        self._place, self._key = place, key
        self._transform = _made(folder, config, place)
        self._of_dictionary = isinstance(self._transform, MapTransform)

    def __call__(self, data: Tensor) -> Tensor:
        """The transform's result."""
        given = MetaTensor(data)
        return self._transform({self._key: given})[self._key] if self._of_dictionary else self._transform(given)

    def __repr__(self) -> str:
        return f"{self._place} of the bundle"
