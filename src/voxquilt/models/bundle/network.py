"""Reads which network a bundle has, and what its metadata say of channels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from voxquilt.models.bundle.config import BundleConfig, read_config
from voxquilt.models.bundle.steps import read_step

NETWORK = "network_def"
_NETWORKS = "monai.networks.nets"


def read_network(config: BundleConfig) -> dict[str, Any]:
    """The node of `network_def`: a class of monai.networks.nets, and its arguments.

    Raises:
        ConfigError: it is another class, one of another number of axes, or its arguments are not plain.
    """
    step = read_step(config, NETWORK)
    name = step.name_in(_NETWORKS)
    if name is None:
        raise step.config.refusal(step.place("_target_"), f"this is not a class of {_NETWORKS}.")
    arguments = {option: step.take(option) for option in sorted(step.options)}
    axes = arguments.get("spatial_dims", arguments.get("dimensions", 3))
    if axes != 3:
        raise step.refusal(None, f"it has {axes} axes; voxquilt reads bundles of 3-D networks.", "")
    return {"_target_": f"{_NETWORKS}.{name}" if "." not in step.target else step.target, **arguments}


class Metadata:
    """What metadata.json says of the network's channels, where it says it in the usual places.

    Args:
        folder: The bundle.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / "configs" / "metadata.json"
        self._format: Any = read_config(file).root.get("network_data_format") if file.is_file() else {}

    @property
    def input_channels(self) -> int | None:
        """Channels of the first input."""
        count = self._of("inputs").get("num_channels")
        return count if isinstance(count, int) and not isinstance(count, bool) else None

    @property
    def input_names(self) -> list[str]:
        """Their names, in order; empty if they are not known."""
        return self._names("inputs")

    @property
    def class_names(self) -> list[str]:
        """Names of the first output's channels, in order; empty if they are not known."""
        return self._names("outputs")

    def _names(self, where: str) -> list[str]:
        given = self._of(where).get("channel_def")
        if not isinstance(given, Mapping) or set(given) != {str(n) for n in range(len(given))}:
            return []
        names = [given[str(n)] for n in range(len(given))]
        plain = all(isinstance(name, str) and "${" not in name and len(name) <= 200 for name in names)
        return names if plain and len(set(names)) == len(names) else []

    def _of(self, where: str) -> Mapping[str, Any]:
        entries = self._format.get(where) if isinstance(self._format, Mapping) else None
        first = next(iter(entries.values()), None) if isinstance(entries, Mapping) else None
        return first if isinstance(first, Mapping) else {}


def check_imports(config: BundleConfig) -> None:
    """Refuse imports of code that is neither Python's own nor of the packages that every bundle may use.

    Those of `glob` and the like serve the workflow around the network, which voxquilt does not run.

    Raises:
        ConfigError: there is another import, or something that is not an import.
    """
    if config.is_trusted or "imports" not in config:
        return
    _, imports = config.raw("imports")
    for n, text in enumerate(imports if isinstance(imports, list) else [imports]):
        words = str(text).lstrip("$").split()
        harmless = len(words) in (2, 4) and words[0] == "import" and words[1] in _USUAL
        if not harmless or (len(words) == 4 and words[2] != "as"):
            key = f"imports#{n}" if isinstance(imports, list) else "imports"
            raise config.refusal(key, "it would import code, which voxquilt does not.")


_USUAL = ("glob", "os", "os.path", "json", "math", "pathlib", "re", "sys", "numpy", "torch", "monai", "ignite", "scipy")
