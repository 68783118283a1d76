"""Says in this project's settings what a MONAI bundle asks for: nothing else needs to know of bundles."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from voxquilt.errors import ConfigError
from voxquilt.models.bundle.config import BundleConfig, read_config
from voxquilt.models.bundle.inferer import read_inferer
from voxquilt.models.bundle.location import find_config, find_weights, locate_bundle
from voxquilt.models.bundle.network import NETWORK, Metadata, check_imports, read_network
from voxquilt.models.bundle.postprocessing import read_postprocessing
from voxquilt.models.bundle.preprocessing import read_preprocessing


@dataclass(frozen=True)
class Bundle:
    """A bundle that has been read.

    Args:
        file: The configuration.
        weights: The file of weights.
        settings: Settings by section and key: plain values, with a `_target_` for what is a callable.
        input_names: What metadata.json calls the channels of the network's input, in order.
    """

    file: Path
    weights: Path
    settings: dict[str, dict[str, Any]]
    input_names: list[str]


def read_bundle(path: Path, *, config: str | None = None, checkpoint: str | None = None, trust: bool = False) -> Bundle:
    """Read a bundle as text; nothing of it is run, unless it is trusted.

    Args:
        path: The bundle's folder, or its zip.
        config: Name of the file in its folder `configs`; None takes inference.json, else inference.yaml.
        checkpoint: Name of the file in its folder `models`; None takes model.pt, or model.ts where the configuration
            names no network that can be read.
        trust: Whether MONAI may evaluate and import what voxquilt cannot read.

    Raises:
        ConfigError: a file is missing or wrong, or asks for something that is not known; it is named.
    """
    folder = locate_bundle(path).absolute()
    file = find_config(folder, config)
    asked = read_config(file)
    if trust:
        asked = replace(asked, evaluate=_evaluator(folder, file))
    check_imports(asked)
    metadata, part = Metadata(folder), {"folder": str(folder), "config": file.name}
    network, weights = _network(asked, folder, checkpoint, part)
    channels = (network or {}).get("in_channels", metadata.input_channels)
    before = read_preprocessing(asked, channels, part)
    outputs = (network or {}).get("out_channels")
    made = read_postprocessing(asked, before, part, outputs)
    after, cut = made.as_settings(), read_inferer(asked)
    names = metadata.class_names
    if made.renumbers or len(names) != (len(names) if outputs is None else outputs):
        names = []  # metadata of other labels, or of some other network
    settings = {
        "data": cut["data"],
        "preprocess": before.as_settings(),
        "model": after["model"] | ({} if network is None else {"net": network}),
        "stitch": cut["stitch"] | after["stitch"] | ({"class_names": names} if names else {}),
    }
    return Bundle(file, weights, settings, metadata.input_names)


def _network(
    asked: BundleConfig, folder: Path, checkpoint: str | None, part: dict[str, str]
) -> tuple[dict[str, Any] | None, Path]:
    """The network's node and its weights; None for TorchScript, which is a network by itself."""
    if checkpoint is not None and checkpoint.endswith(".ts"):
        return None, find_weights(folder, checkpoint, program=True)
    try:
        network = read_network(asked)
    except ConfigError:
        if asked.is_trusted and NETWORK in asked:
            network = {"_target_": "voxquilt.bundle_network", **part}
        elif checkpoint is None and (folder / "models" / "model.ts").is_file():
            return None, find_weights(folder, None, program=True)
        else:
            raise
    return network, find_weights(folder, checkpoint, program=False)


def _evaluator(folder: Path, file: Path) -> Callable[[str], Any]:
    def evaluate(key: str) -> Any:
        from voxquilt.models.bundle.trusted import evaluate_value  # imports MONAI, for a bundle that is trusted

        return evaluate_value(str(folder), file.name, key)

    return evaluate
