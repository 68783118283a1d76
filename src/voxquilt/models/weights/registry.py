"""Lists the formats of weights files; nothing of them is imported before a file is looked at."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from voxquilt.vocabulary import Registry

LIGHTNING, STATE_DICT = "lightning", "state_dict"

_FOLDER = "voxquilt.models.weights"
WEIGHTS = Registry(
    "weights format",
    {
        "torchscript": f"{_FOLDER}.torchscript:TorchScript",
        "exported": f"{_FOLDER}.exported:Exported",
        "onnx": f"{_FOLDER}.onnx:Onnx",
        LIGHTNING: f"{_FOLDER}.lightning:LightningCheckpoint",
        STATE_DICT: f"{_FOLDER}.state_dict:StateDict",
    },
    "voxquilt.weights",
)
"""Classes of formats by name. A file is of the first format that recognises it, other packages' after those here; a
state dict is what no other format recognises."""


@dataclass(frozen=True)
class ReadOptions:
    """What is asked of a format, beside the file.

    Args:
        net: The network (nn.Module) that the weights are for, if the user names one. It is not to be changed.
        prefix: Only keys that begin so are used, without it.
        strict: Whether every key must fit.
        trust: Whether code that the file holds may run.
    """

    net: Any = None
    prefix: str | None = None
    strict: bool = True
    trust: bool = False


class WeightsFormat(Protocol):
    """A format of weights files.

    A format is made without arguments. Its module should import torch inside `read` only, so that a file can be
    recognised, and a wrong configuration answered, before torch has loaded.
    """

    needs_network: bool
    """Whether a file holds tensors alone, so that the user must name the network."""

    def recognises(self, path: Path) -> bool:
        """Whether the file is of this format, told from its first bytes or from the names in its archive."""
        ...

    def read(self, path: Path, options: ReadOptions) -> Any:
        """A network (nn.Module) with the file's weights.

        Raises:
            ConfigError: the file is damaged, holds more than is trusted, or does not fit the network.
        """
        ...
