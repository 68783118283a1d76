"""Provides the callbacks that the command adds to a training: lines of progress, and room for new checkpoints."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

log = logging.getLogger("voxquilt")


class EpochLines(Callback):
    """Logs a line after each epoch, with the metrics of its validation if there was one."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the loss, and metrics that this epoch's validation computed."""
        if not trainer.is_global_zero:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        validated = (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0
        shown = {n: v for n, v in metrics.items() if n == "train_loss" or (validated and n != "val_score")}
        text = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
        log.info("epoch %d of %s: %s", trainer.current_epoch + 1, trainer.max_epochs, text)


class RemoveCheckpoints(Callback):
    """Removes the checkpoints of another training, whose best.ckpt would look like one of this training.

    Args:
        checkpoints: Files or folders.
    """

    def __init__(self, checkpoints: Sequence[Path]) -> None:
        self._checkpoints = checkpoints

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove them now, when the training can no longer be refused."""
        for path in self._checkpoints if trainer.is_global_zero else ():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
