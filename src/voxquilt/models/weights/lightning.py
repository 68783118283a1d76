"""Reads Lightning checkpoints: their weights for a network, or the whole LightningModule.

torch and Lightning are imported where a checkpoint is read, so that one can be recognised before they have loaded.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from voxquilt.models.weights.registry import ReadOptions
from voxquilt.models.weights.state_dict import StateDict
from voxquilt.models.weights.stored_settings import pickled


class LightningCheckpoint:
    """The format of Lightning's checkpoints: a state dict among other things, but not the network."""

    needs_network = True

    def recognises(self, path: Path) -> bool:
        """Whether the pickled mapping says which version of Lightning wrote it."""
        content = pickled(path)
        return isinstance(content, Mapping) and "pytorch-lightning_version" in content

    def read(self, path: Path, options: ReadOptions) -> Any:
        """A copy of the network with the weights of the checkpoint's state dict; see StateDict."""
        return StateDict().read(path, options)
