"""Provides the LightningModule that predicts each subject by several models in turn."""

from collections.abc import Sequence

from lightning.pytorch import LightningModule

from voxquilt.data.batch import PatchBatch
from voxquilt.models.patch_network import Named
from voxquilt.models.predictor import PatchPredictor


class SeveralPredictors(LightningModule):
    """Hands each batch to the model that it was cut for.

    Args:
        predictors: The models, in the order in which they predict a subject.
    """

    def __init__(self, predictors: Sequence[PatchPredictor]) -> None:
        super().__init__()
        self._names = [f"model_{n}" for n in range(len(predictors))]
        for name, predictor in zip(self._names, predictors, strict=True):
            # As children, to which Lightning gives its trainer.
            self.add_module(name, predictor)

    @property
    def predictors(self) -> list[PatchPredictor]:
        """The models."""
        return [self.get_submodule(name) for name in self._names]  # type: ignore[misc]

    def setup(self, stage: str) -> None:
        """Prepare each model."""
        for predictor in self.predictors:
            predictor.setup(stage)

    def predict_step(self, batch: PatchBatch, batch_idx: int) -> Named | Exception:
        """Outputs by name of the model that the batch is for; see PatchPredictor."""
        return self.predictors[batch.model].predict_step(batch, batch_idx)

    def try_full_batches(self) -> None:
        """See PatchPredictor."""
        for predictor in self.predictors:
            predictor.try_full_batches()


def predictors_of(module: LightningModule) -> Sequence[LightningModule]:
    """The models of a module that has several, or the module itself."""
    return module.predictors if isinstance(module, SeveralPredictors) else [module]
