"""Writes pictures of validation subjects, hyperparameters and final metrics to TensorBoard."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from voxquilt.training.module import PatchTrainer


class TensorBoardImages(Callback):
    """Pictures of validation subjects, the prediction above the label, and the hparams tab; written by rank 0.

    Args:
        configuration: The training's configuration; its plain values are the hyperparameters.
    """

    def __init__(self, configuration: Mapping[str, Any] | None = None) -> None:
        self._hyperparameters = {
            key: value
            for section in ("data", "preprocess", "model", "stitch", "trainer", "run")
            for key, value in _flattened((configuration or {}).get(section), section)
        }

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the pictures of this validation."""
        if not isinstance(pl_module, PatchTrainer):
            return
        for logger in _tensorboard_loggers(trainer):
            for result in pl_module.validated:
                if result.picture is not None:
                    tag = f"validation/{result.subject}"
                    logger.experiment.add_image(tag, result.picture, trainer.global_step, dataformats="HWC")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the hyperparameters and the last metrics."""
        metrics = {f"final/{name}": float(value) for name, value in trainer.callback_metrics.items()}
        for logger in _tensorboard_loggers(trainer):
            logger.log_hyperparams(self._hyperparameters, metrics, trainer.global_step)


def _tensorboard_loggers(trainer: Trainer) -> list[TensorBoardLogger]:
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger for logger in loggers if isinstance(logger, TensorBoardLogger)]


def _flattened(node: Any, key: str) -> list[tuple[str, Any]]:
    if isinstance(node, Mapping):
        return [pair for name, child in node.items() for pair in _flattened(child, f"{key}.{name}")]
    # TensorBoard takes numbers, booleans and text only.
    return [] if node is None else [(key, node if isinstance(node, bool | int | float | str) else str(node))]
