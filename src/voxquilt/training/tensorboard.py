"""What does TensorBoard show of a training? Beside the curves: pictures, and hyperparameters with what they led to."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from voxquilt.training.module import PatchTrainer


class TensorBoardImages(Callback):
    """Pictures of validation subjects, the prediction above what was wanted, and the hparams tab; on rank 0.

    Args:
        configuration: Of the training; its plain values are the hyperparameters.
    """

    def __init__(self, configuration: Mapping[str, Any] | None = None) -> None:
        self._hyperparameters = {
            key: value
            for section in ("data", "preprocess", "model", "stitch", "trainer", "run")
            for key, value in _flat((configuration or {}).get(section), section)
        }

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the pictures of this validation."""
        if not isinstance(pl_module, PatchTrainer):
            return
        for logger in _of(trainer):
            for one in pl_module.validated:
                if one.picture is not None:
                    tag = f"validation/{one.subject}"
                    logger.experiment.add_image(tag, one.picture, trainer.global_step, dataformats="HWC")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the hyperparameters and the last metrics."""
        metrics = {f"final/{name}": float(value) for name, value in trainer.callback_metrics.items()}
        for logger in _of(trainer):
            logger.log_hyperparams(self._hyperparameters, metrics, trainer.global_step)


def _of(trainer: Trainer) -> list[TensorBoardLogger]:
    return [one for one in trainer.loggers if isinstance(one, TensorBoardLogger) and trainer.is_global_zero]


def _flat(node: Any, key: str) -> list[tuple[str, Any]]:
    if isinstance(node, Mapping):
        return [pair for name, child in node.items() for pair in _flat(child, f"{key}.{name}")]
    # TensorBoard takes numbers, booleans and text.
    return [] if node is None else [(key, node if isinstance(node, bool | int | float | str) else str(node))]
