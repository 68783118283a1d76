"""Logs pictures of validation subjects, hyperparameters and final metrics of a training."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from voxquilt.reporting.run_logs import loggable, logs_of
from voxquilt.training.module import PatchTrainer


class TensorBoardImages(Callback):
    """Logs pictures of validation subjects, the prediction above the label, and hyperparameters, on rank 0.

    TensorBoard and every other logger of the trainer get them; pictures, those that take some.

    Args:
        configuration: The training's configuration; its plain values are the hyperparameters.
    """

    def __init__(self, configuration: Mapping[str, Any] | None = None) -> None:
        self._hyperparameters = loggable(configuration or {})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the hyperparameters, but to TensorBoard, whose table of them has the last metrics as well."""
        others = [logger for logger in _loggers(trainer) if not isinstance(logger, TensorBoardLogger)]
        for log in logs_of(others):
            log.settings(self._hyperparameters)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the pictures of this validation."""
        if not isinstance(pl_module, PatchTrainer):
            return
        for log in logs_of(_loggers(trainer)):
            for result in pl_module.validated:
                if result.picture is not None:
                    log.picture(f"validation/{result.subject}", result.picture, trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the hyperparameters and the last metrics to TensorBoard."""
        metrics = {f"final/{name}": float(value) for name, value in trainer.callback_metrics.items()}
        for logger in _loggers(trainer):
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(self._hyperparameters, metrics, trainer.global_step)


def _loggers(trainer: Trainer) -> list[Any]:
    return list(trainer.loggers) if trainer.is_global_zero else []
