"""Writes checkpoints that are complete or absent, and does not touch the one before until then."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer

from voxquilt.filesystem import replacing


class CompleteCheckpoints(TorchCheckpointIO):
    """Lightning's way to write checkpoints, but through a file in the same folder.

    Lightning's own lies in the system's temporary folder, and is copied over the last checkpoint where that is another
    file system: if the disk is full, or the process is killed, neither is left.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            OutputError: the file cannot be written; an earlier one is as it was.
        """
        if storage_options is not None or "://" in str(path):  # Lightning's to refuse, or to write elsewhere
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        torch.save(checkpoint, content)  # not into the file, since torch has errors of its own for a full disk
        with replacing(file) as target:
            target.write(content.getbuffer())


def write_complete_checkpoints(trainer: Trainer) -> None:
    """Have a trainer write its checkpoints so, unless the user, or its strategy, has a way of its own."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = CompleteCheckpoints()
